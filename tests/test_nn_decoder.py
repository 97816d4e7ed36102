"""TransformerDecoderLayer, TransformerDecoder and Transformer against torch's, and decoding step by step."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from modules import B, E, H, L, S, additive, as_id, assert_close, assert_parity, bool_mask, call, padding, pair, shake

import pytransformer
from pytransformer import masks, nn
from pytransformer.nn._masks import LayerMasks

# Of torch's constructor, about a path that ours does not have.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "padding": {"tgt_key_padding_mask": padding(L), "memory_key_padding_mask": padding()},
    "usual": {"tgt_mask": CAUSAL, "tgt_key_padding_mask": padding(L).flip(1), "memory_key_padding_mask": padding()},
    "float": {
        "tgt_mask": additive(CAUSAL),
        "memory_mask": torch.linspace(-1, 1, L * S).view(L, S),
        "memory_key_padding_mask": additive(padding()),
    },
    "bool [B*H,...]": {"tgt_mask": bool_mask(B * H, L, L), "memory_mask": bool_mask(B * H, L, S)},
}


class Kept:
    """The protocols of nn.cache in their simplest form, for one layer: tensors concatenated."""

    def __init__(self):
        self.held = None

    @property
    def length(self):
        return 0 if self.held is None else self.held[0].shape[2]

    def append(self, key, value):
        new = (key, value)
        self.held = new if self.held is None else tuple(torch.cat(x, 2) for x in zip(self.held, new, strict=True))
        return self.held


class KeptMemory:
    def __init__(self):
        self.kept, self.computed = None, 0

    def get(self, compute):
        if self.kept is None:
            self.kept, self.computed = compute(), self.computed + 1
        return self.kept


class KeptStack:
    def __init__(self, stack):
        self.layers = [SimpleNamespace(self_attention=Kept(), cross_attention=KeptMemory()) for _ in stack.layers]

    def layer(self, index):
        return self.layers[index]


def inputs(batch_first):
    tgt, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    return (tgt, memory) if batch_first else (tgt.transpose(0, 1), memory.transpose(0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "activation": "gelu"},
        {"norm_first": True},
        {"batch_first": True, "norm_first": True, "bias": False, "activation": torch.tanh},
    ],
    ids=as_id,
)
def test_decoder_layer(options):
    theirs, ours = pair("TransformerDecoderLayer", E, H, 24, 0.0, **options)
    for given in MASKS.values():
        assert_parity(theirs, ours, call, *inputs(options.get("batch_first")), **given)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder(with_norm, batch_first):
    layers = pair("TransformerDecoderLayer", E, H, 24, 0.0, batch_first=batch_first)
    norms = pair("LayerNorm", E) if with_norm else (None, None)
    ours, theirs = nn.TransformerDecoder(layers[1], 2, norms[1]), torch.nn.TransformerDecoder(layers[0], 2, norms[0])
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    for given in MASKS.values():
        assert_parity(theirs, ours, call, *inputs(batch_first), **given)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True, "bias": False}], ids=str)
def test_transformer(options):
    theirs, ours = pair("Transformer", E, H, 2, 1, 24, 0.0, **options)
    tgt, src = inputs(options.get("batch_first"))
    for name in ("none", "usual", "float"):
        assert_parity(theirs, ours, call, src, tgt, **MASKS[name])
    given = {"src_key_padding_mask": padding(), "src_mask": torch.ones(S, S, dtype=torch.bool).triu(2)}
    theirs, ours = theirs.eval(), ours.eval()
    assert_parity(theirs, ours, call, src, tgt, **given)
    axis = 0 if options.get("batch_first") else 1
    assert_parity(theirs, ours, call, src.select(axis, 1), tgt.select(axis, 1), tgt_mask=CAUSAL)


def test_masks_reach_the_layers_as_patterns():
    """Of what torch's users pass as tensors nothing of size T x T is left."""
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 24, batch_first=True), 2).eval()
    tgt, memory = inputs(True)
    target = LayerMasks(torch.nn.Transformer.generate_square_subsequent_mask(L), padding(L), False)
    (target, _), (source, _) = decoder._prepare(tgt, memory, target, LayerMasks(None, padding(), False), None)
    assert target.attn_mask.causal
    assert target.attn_mask.keep.shape == (B, 1, 1, L)
    assert source.attn_mask.keep.shape == (B, 1, 1, S)
    assert target.key_padding_mask is source.key_padding_mask is None


def test_blocks_can_be_overridden_and_hooked():
    class Doubled(nn.TransformerDecoderLayer):
        def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
            return 2 * super()._mha_block(x, mem, attn_mask, key_padding_mask, is_causal)

    layer = Doubled(E, H, 24, batch_first=True).eval()
    tgt, memory = inputs(True)
    x = layer.norm1(tgt + layer.self_attn(tgt, tgt, tgt, need_weights=False)[0])
    x = layer.norm2(x + 2 * layer.multihead_attn(x, memory, memory, need_weights=False)[0])
    wanted = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
    assert_close(layer(tgt, memory), wanted)
    assert_close(nn.TransformerDecoder(layer, 1)(tgt, memory), wanted)
    for name, child in layer.named_children():
        fired = []
        handle = child.register_forward_hook(lambda *_, f=fired: f.append(1))
        assert_close(layer(tgt, memory), wanted, name)
        handle.remove()
        assert fired, name


def test_the_layer_runs_fused():
    layer = nn.TransformerDecoderLayer(E, H, 24, 0.0, batch_first=True)
    decisions = pytransformer.explain(layer, *inputs(True)).decisions
    attends = ["linear", "attention", "linear", "layer_norm"]  # of memory the keys have a product of their own
    assert [d.op for d in decisions] == [*attends, "linear", *attends, "ffn", "layer_norm"]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("TransformerDecoderLayer", (E, H, 24), {"batch_first": True}),
        ("TransformerDecoderLayer", (E, H, 24), {"bias": False, "norm_first": True, "dtype": torch.float64}),
        ("Transformer", (E, H, 2, 1, 24), {}),
        ("Transformer", (E, H, 1, 2, 24), {"bias": False}),
    ],
)
def test_same_seed_same_weights_and_state_dicts_load_both_ways(name, args, kwargs):
    torch.manual_seed(7)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    torch.manual_seed(7)
    ours = getattr(nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(torch.nn, name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], x), key
    theirs.load_state_dict(ours.state_dict())
    assert list(copy.deepcopy(ours).state_dict()) == list(theirs.state_dict())


def test_copies_keep_an_activation_that_is_a_module():
    layer = nn.TransformerDecoderLayer(E, H, 24, activation=torch.nn.GELU("tanh"))
    stack = nn.TransformerDecoder(layer, 2)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), *stack.layers):
        assert isinstance(duplicate.activation, torch.nn.GELU)


def test_custom_stacks_stay():
    class Custom(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return args[0] * 2

    both = nn.Transformer(E, H, custom_encoder=Custom(), custom_decoder=torch.nn.Sequential())
    assert isinstance(both.encoder, Custom)
    assert isinstance(both.decoder, torch.nn.Sequential)


STEPS = [(1,) * L, (3, 1, 1, 2), (L,)]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_decoding_with_a_cache_repeats_the_whole_pass(options, steps):
    """Left padding too: what the whole pass gives at the last positions is what each step gives."""
    layer = nn.TransformerDecoderLayer(E, H, 24, **options)
    decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(E)).eval()
    shake(decoder)
    axis = 1 if options.get("batch_first") else 0
    tgt, memory = inputs(axis == 1)
    target_padding = torch.zeros(B, L, dtype=torch.bool)
    target_padding[1, :2] = True
    wanted = decoder(tgt, memory, CAUSAL, None, target_padding, padding())
    cache, start = KeptStack(decoder), 0
    for step in steps:
        out = decoder(
            tgt.narrow(axis, start, step),
            memory,
            tgt_key_padding_mask=target_padding[:, : start + step],
            memory_key_padding_mask=padding(),
            cache=cache,
        )
        assert_close(out, wanted.narrow(axis, start, step), f"tokens {start} to {start + step}")
        start += step
    assert [cache.layer(i).cross_attention.computed for i in range(2)] == [1, 1]


@pytest.mark.parametrize("mask", [None, "bool", "float", "window"])
def test_a_decoder_only_stack_takes_a_cache(mask):
    """An encoder with a causal mask is a decoder-only model; masks cover cached and new keys."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, batch_first=True), 2).eval()
    x = torch.randn(B, L, E)
    later = CAUSAL | (torch.ones(L, L, dtype=torch.bool).tril(-3) if mask == "window" else False)
    wanted, cache = stack(x, mask=later), KeptStack(stack)
    for rows in (slice(0, 3), slice(3, 4), slice(4, L)):
        given = {None: None, "bool": CAUSAL, "float": additive(CAUSAL), "window": masks.window(2, 0)}[mask]
        given = given[rows, : rows.stop] if isinstance(given, torch.Tensor) else given
        assert_close(stack(x[:, rows], mask=given, cache=cache), wanted[:, rows])


def test_attention_takes_caches_with_weights_appended_keys_and_no_batch():
    attention = nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True).eval()
    x = torch.randn(L, E)
    wanted, weights = attention(x, x, x, attn_mask=CAUSAL)
    cache = Kept()
    attention(x[:4], x[:4], x[:4], is_causal=True, cache=cache)
    out, last = attention(x[4:], x[4:], x[4:], is_causal=True, cache=cache)
    assert_close(out, wanted[4:])
    assert_close(last, weights[4:])


def test_bad_inputs_name_values():
    transformer = nn.Transformer(E, H, 1, 1, 24, batch_first=True)
    decoder = transformer.decoder
    x, memory = inputs(True)
    short = KeptMemory()
    short.get(lambda: (torch.zeros(2, H, S, 4),) * 2)
    attention = decoder.layers[0].multihead_attn
    for error, words, bad_call in (
        (ValueError, r"got \[3, 7, 16\] and \[2, 7, 16\]", lambda: transformer(x, x[1:])),
        (ValueError, r"d_model = 16 last, got \[3, 7, 15\]", lambda: transformer(x[..., 1:], x)),
        (ValueError, r"got \[3, 4\]", lambda: decoder(x, memory, memory_key_padding_mask=padding()[:, 1:])),
        (RuntimeError, "attn_mask is None", lambda: decoder(x, memory, tgt_is_causal=True)),
        (TypeError, "append .* or get .*cache.layer", lambda: attention(x, x, x, cache=KeptStack(decoder))),
        (ValueError, "cache holds a batch of 2, query has one of 3", lambda: attention(x, memory, memory, cache=short)),
        (
            ValueError,
            "causal mask or window over cached memory",
            lambda: decoder(x, memory, memory_mask=masks.causal(), cache=KeptStack(decoder)),
        ),
    ):
        with pytest.raises(error, match=words):
            bad_call()
