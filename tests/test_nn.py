"""The modules of pytransformer.nn against torch.nn's: outputs, gradients, weights and conventions.

The numerics of the kernels are judged in the tests of the ops, by compare.py. Here two float32 spellings of a
whole module are compared, and what may go wrong is a mask, a scale, a layout or a missing term: errors of the
size of the result, far above the one tolerance of ``assert_close``.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from modules import B, E, H, L, S, additive, as_id, assert_close, assert_parity, bool_mask, call, padding, pair, shake

import pytransformer
from pytransformer import masks, nn
from pytransformer.nn._masks import LayerMasks

MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": additive(padding()) + 0.3},
    "bool [L,S]": {"attn_mask": bool_mask(L, S)},
    "bool [B*H,L,S]": {"attn_mask": bool_mask(B * H, L, S)},
    "float [L,S]": {"attn_mask": torch.linspace(-2, 2, L * S).view(L, S)},
    "float [B*H,L,S] with -inf": {"attn_mask": additive(bool_mask(B * H, L, S)) + 0.2},
    "bool both": {"attn_mask": bool_mask(L, S), "key_padding_mask": padding()},
    "float both": {"attn_mask": additive(bool_mask(B * H, L, S)), "key_padding_mask": additive(padding())},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_masks(kind, need_weights):
    theirs, ours = pair("MultiheadAttention", E, H, batch_first=True)
    inputs = torch.randn(B, L, E), torch.randn(B, S, E), torch.randn(B, S, E)
    assert_parity(theirs, ours, call, *inputs, need_weights=need_weights, **MASKS[kind])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["none", "bool both", "float both"])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_options(options, kind, batched):
    theirs, ours = pair("MultiheadAttention", E, H, **options)
    sizes = (L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))
    axis = 0 if options.get("batch_first") else 1
    inputs = [torch.randn(size).unsqueeze(axis).repeat_interleave(B, axis) for size in sizes]
    given = dict(MASKS[kind])
    if not batched:
        inputs = [x.select(axis, 0) for x in inputs]
        given = {k: m[0] if k == "key_padding_mask" else m[:H] if m.dim() == 3 else m for k, m in given.items()}
    for average in (True, False):
        assert_parity(theirs, ours, call, *inputs, average_attn_weights=average, **given)


def test_self_attention_is_packed_and_equal():
    theirs, ours = pair("MultiheadAttention", E, H, batch_first=True)
    assert_parity(theirs, ours, lambda m, x: m(x, x, x, need_weights=False), torch.randn(B, L, E))


def test_attention_mask_gets_its_gradient():
    theirs, ours = pair("MultiheadAttention", E, H, batch_first=True)
    inputs = torch.randn(B, L, E), torch.randn(L, L)
    assert_parity(theirs, ours, lambda m, x, bias: m(x, x, x, attn_mask=bias, need_weights=False)[0], *inputs)


def test_causal_hint_and_mask_both_apply():
    _, ours = pair("MultiheadAttention", E, H, batch_first=True)
    x, causal = torch.randn(B, L, E), torch.ones(L, L, dtype=torch.bool).triu(1)
    window = torch.ones(L, L, dtype=torch.bool).tril(-3)
    wanted = ours(x, x, x, attn_mask=causal | window, need_weights=False)[0]
    assert_close(ours(x, x, x, attn_mask=window, is_causal=True, need_weights=False)[0], wanted)
    assert_close(ours(x, x, x, attn_mask=window, is_causal=True)[0], wanted)
    m = masks.causal() & masks.window(2, None)
    assert_close(ours(x, x, x, attn_mask=m, need_weights=False)[0], wanted)
    with pytest.raises(RuntimeError, match="attn_mask is None"):
        ours(x, x, x, is_causal=True)


def test_appended_keys_are_visible_under_a_causal_mask():
    _, ours = pair("MultiheadAttention", E, H, batch_first=True, add_bias_kv=True)
    x, causal = torch.randn(B, L, E), torch.ones(L, L, dtype=torch.bool).triu(1)
    weights = ours(x, x, x, attn_mask=causal, is_causal=True)[1]
    assert weights.shape == (B, L, L + 1)
    assert (weights[..., -1] > 0).all()
    assert (weights[:, 0, 1:-1] == 0).all()


@pytest.mark.parametrize("float_mask", [False, True])
def test_fully_masked_rows_are_finite(float_mask):
    _, ours = pair("MultiheadAttention", E, H, batch_first=True)
    mask = padding()
    mask[2] = True
    mask = additive(mask) if float_mask else mask
    q, kv = torch.randn(B, L, E, requires_grad=True), torch.randn(B, S, E, requires_grad=True)
    out, weights = ours(q, kv, kv, key_padding_mask=mask)
    out.sum().backward()
    assert_close(out[2], ours.out_proj.bias.expand(L, E))
    assert (weights[2] == 0).all()
    assert out.isfinite().all()
    grads = [q.grad, kv.grad, *(p.grad for p in ours.parameters())]
    assert all(g.isfinite().all() for g in grads)
    assert (kv.grad[2] == 0).all()


LAYERS = [
    {},
    {"batch_first": True},
    {"norm_first": True},
    {"batch_first": True, "norm_first": True, "bias": False},
    {"batch_first": True, "activation": "gelu", "layer_norm_eps": 1e-3},
    {"activation": F.silu, "bias": False},
    {"activation": torch.nn.GELU("tanh"), "norm_first": True},
    {"activation": torch.tanh},
]


def right_padding():
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, -2:] = True
    mask[2, 3:] = True
    return mask


def layer_masks():
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding(L)},
        "causal": {"src_mask": causal, "is_causal": True},
        "float": {"src_mask": additive(causal), "src_key_padding_mask": additive(right_padding())},
        "bool [B*H,L,L]": {"src_mask": bool_mask(B * H, L, L), "src_key_padding_mask": padding(L)},
    }


@pytest.mark.parametrize("options", LAYERS, ids=as_id)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_layer(options, mode):
    theirs, ours = pair("TransformerEncoderLayer", E, H, 24, 0.0 if mode == "train" else 0.3, **options)
    theirs.train(mode == "train"), ours.train(mode == "train")
    x = torch.randn(B, L, E) if options.get("batch_first") else torch.randn(L, B, E)
    for given in layer_masks().values():
        assert_parity(theirs, ours, call, x, **given)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_encoder(norm_first, with_norm):
    layers = pair("TransformerEncoderLayer", E, H, 24, 0.0, batch_first=True, norm_first=norm_first)
    norms = pair("LayerNorm", E) if with_norm else (None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = nn.TransformerEncoder(layers[1], 2, norms[1], enable_nested_tensor=False)
    theirs = torch.nn.TransformerEncoder(layers[0], 2, norms[0], enable_nested_tensor=False)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    right = right_padding()
    for given in (
        {},
        {"src_key_padding_mask": right},
        {"mask": causal},
        {"mask": additive(causal), "is_causal": True},
        {"mask": causal, "src_key_padding_mask": right},
        {"mask": additive(causal), "src_key_padding_mask": additive(right)},
    ):
        assert_parity(theirs, ours, call, torch.randn(B, L, E), **given)


def test_encoder_takes_unbatched_input_and_recognises_a_causal_mask():
    ours = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, batch_first=True), 2).eval()
    x, causal = torch.randn(B, L, E), torch.nn.Transformer.generate_square_subsequent_mask(L)
    seen = []
    attend = ours.layers[0].self_attn._project
    ours.layers[0].self_attn._project = lambda *a: seen.append(1) or attend(*a)
    batched = ours(x, mask=causal, src_key_padding_mask=torch.zeros(B, L, dtype=torch.bool))
    alone = ours(x[1], mask=causal, src_key_padding_mask=torch.zeros(L, dtype=torch.bool))
    assert seen
    assert_close(alone, batched[1])

    def given(mask):
        return LayerMasks(mask, None, False)

    prepared = ours._prepare(x, given(causal))[0].attn_mask
    assert isinstance(prepared, masks.Mask)
    assert prepared.causal
    assert prepared.keep is None
    learned = causal.clone().requires_grad_()
    assert ours._prepare(x, given(learned))[0].attn_mask is learned


def test_encoder_runs_torch_layers():
    theirs = torch.nn.TransformerEncoderLayer(E, H, 24, batch_first=True).eval()
    x, causal = torch.randn(B, L, E), torch.nn.Transformer.generate_square_subsequent_mask(L)
    wanted = torch.nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False).eval()(x, mask=causal)
    assert_close(nn.TransformerEncoder(theirs, 2).eval()(x, mask=causal), wanted)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("MultiheadAttention", (E, H), {}),
        ("MultiheadAttention", (E, H), {"kdim": 6, "vdim": 10, "add_bias_kv": True}),
        ("MultiheadAttention", (E, H), {"bias": False, "dtype": torch.float64}),
        ("LayerNorm", (E,), {"bias": False}),
        ("LayerNorm", ([3, E],), {"elementwise_affine": False}),
        ("RMSNorm", (E,), {}),
        ("TransformerEncoderLayer", (E, H, 24), {"batch_first": True}),
        ("TransformerEncoderLayer", (E, H, 24), {"bias": False, "norm_first": True}),
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
        assert ours.state_dict()[key].dtype == x.dtype
    shake(ours)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for duplicate in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert list(duplicate.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("shape", [(E,), (3, E)])
@pytest.mark.parametrize("kwargs", [{}, {"elementwise_affine": False}, {"eps": 1e-2}])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms(name, shape, kwargs):
    theirs, ours = pair(name, shape, **kwargs)
    assert_parity(theirs, ours, call, torch.randn(2, 3, E))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", torch.tanh])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(activation, gated):
    ours = nn.FeedForward(E, 24, activation, gated=gated)

    class Plain(torch.nn.Module):
        def forward(self, x):
            hidden = self.activation(self.linear1(x))
            return self.linear2(hidden * self.linear_gate(x) if gated else hidden)

    theirs = copy.deepcopy(ours)
    theirs.__class__ = Plain
    assert_parity(theirs, ours, call, torch.randn(B, L, E))


def test_hooks_fire_and_change_nothing():
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    x = torch.randn(B, L, E)
    wanted = layer(x)
    children = ["self_attn", "self_attn.out_proj", "linear1", "dropout", "linear2"]
    children += ["norm1", "norm2", "dropout1", "dropout2"]
    for name in children:
        fired = []
        handle = layer.get_submodule(name).register_forward_hook(lambda *_, f=fired: f.append("forward"))
        backward = layer.get_submodule(name).register_full_backward_hook(lambda *_, f=fired: f.append("backward"))
        out = layer(x.clone().requires_grad_())
        assert_close(out, wanted, name)
        out.sum().backward()
        handle.remove(), backward.remove()
        assert "forward" in fired, name
        assert "backward" in fired, name


def test_global_hooks_fire():
    layer, seen = nn.TransformerEncoderLayer(E, H, 24, batch_first=True), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    layer(torch.randn(B, L, E))
    handle.remove()
    assert {id(m) for m in layer.children()} <= {id(m) for m in seen}


def test_overridden_blocks_and_replaced_submodules_are_used():
    class Doubled(nn.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, *, is_causal):
            return 2 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal=is_causal)

        def _ff_block(self, x):
            return 3 * super()._ff_block(x)

    layer = Doubled(E, H, 24, batch_first=True).eval()
    x = torch.randn(B, L, E)
    y = layer.norm1(x + 2 * layer.self_attn(x, x, x, need_weights=False)[0])
    wanted = layer.norm2(y + 3 * layer.linear2(F.relu(layer.linear1(y))))
    assert_close(layer(x), wanted)
    assert_close(
        nn.TransformerEncoder(layer, 1)(x, mask=torch.zeros(L, L), src_key_padding_mask=torch.zeros(B, L)), wanted
    )

    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True).eval()
    layer.norm1, layer.linear1 = nn.RMSNorm(E), torch.nn.Sequential(layer.linear1)
    layer.self_attn.out_proj = torch.nn.Sequential(layer.self_attn.out_proj)
    y = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    assert_close(layer(x), layer.norm2(y + layer.linear2(F.relu(layer.linear1(y)))))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_follows_the_mode(norm_first):
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.5, batch_first=True, norm_first=norm_first)
    x = torch.randn(B, L, E)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first):
    theirs, ours = pair("TransformerEncoderLayer", E, H, 24, 0.0, batch_first=True, norm_first=norm_first)
    x = torch.randn(B, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = theirs(x), ours(x)
        half = nn.FeedForward(E, 24)(x.bfloat16())
    assert found.dtype == wanted.dtype
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_the_layer_runs_fused():
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    decisions = pytransformer.explain(layer, torch.randn(B, L, E)).decisions
    assert [d.op for d in decisions] == ["linear", "attention", "linear", "layer_norm", "ffn", "layer_norm"]
    layer.linear1.register_forward_hook(lambda *_: None)
    decisions = pytransformer.explain(layer, torch.randn(B, L, E)).decisions
    assert [d.op for d in decisions] == ["linear", "attention", "linear", "layer_norm", "layer_norm"]


def test_compiles_to_one_graph():
    torch.compiler.reset()
    causal, right, x = torch.ones(L, L, dtype=torch.bool).triu(1), right_padding(), torch.randn(B, L, E)
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True, norm_first=norm_first)
        compiled = torch.compile(layer, fullgraph=True, backend="eager" if norm_first else "aot_eager")
        given = {"src_mask": causal, "src_key_padding_mask": right}
        assert_close(compiled(x, **given), layer(x, **given))
        compiled(x, **given).sum().backward()
        assert layer.linear1.weight.grad.isfinite().all()
    encoder = nn.TransformerEncoder(layer, 1)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    given = {"mask": causal, "src_key_padding_mask": right}
    assert_close(compiled(x, **given), encoder(x, **given))


def test_bad_inputs_name_values():
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, L, E)
    for error, words, bad_call in (
        (ValueError, r"key must be .*size 16 last, got \[3, 7, 15\]", lambda: attention(x, x[..., 1:], x)),
        (ValueError, r"query \[3, 7, 16\], key \[3, 7, 16\] and value \[3, 6, 16\]", lambda: attention(x, x, x[:, 1:])),
        (ValueError, r"query \[3, 7, 16\], key \[2, 7, 16\]", lambda: attention(x, x[1:], x[1:])),
        (ValueError, r"got \[7, 6\]", lambda: attention(x, x, x, attn_mask=torch.zeros(L, 6))),
        (ValueError, r"\[12, 7, 7\], got \[3, 7, 7\]", lambda: attention(x, x, x, attn_mask=torch.zeros(B, L, L))),
        (TypeError, "int64", lambda: attention(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))),
        (ValueError, r"got \[2, 7\]", lambda: attention(x, x, x, key_padding_mask=torch.zeros(2, L))),
        (TypeError, "list", lambda: attention(x, x, x, key_padding_mask=[0])),
        (ValueError, "divide embed_dim, got 3 and 16", lambda: nn.TransformerEncoderLayer(E, 3)),
        (ValueError, "'swishy'", lambda: nn.TransformerEncoderLayer(E, H, activation="swishy")),
        (ValueError, r"\[\.\.\., \*\[16\]\], got \[3, 7, 15\]", lambda: nn.LayerNorm(E)(x[..., 1:])),
    ):
        with pytest.raises(error, match=words):
            bad_call()
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"got \[5, 5\]"):
        encoder(x, mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    with pytest.raises(RuntimeError, match="attn_mask is None"):
        encoder(x, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    """Taken wherever torch takes them, and in training and both layouts besides."""
    sequences = [torch.randn(length, E, requires_grad=True) for length in (3, 5, 1)]

    def nested():
        return torch.nested.as_nested_tensor(sequences, layout=layout)

    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    for module in (layer, nn.TransformerEncoder(layer, 2), nn.LayerNorm(E)):
        found = module(nested())
        assert found.layout == layout
        for x, y in zip(found.unbind(), sequences, strict=True):
            assert_close(x, module(y[None])[0])
    sum(x.sum() for x in nn.TransformerEncoder(layer, 1)(nested()).unbind()).backward()
    assert all(x.grad.isfinite().all() for x in sequences)
    x = nested()
    out, weights = layer.self_attn(x, x, x)
    for i, y in enumerate(sequences):
        wanted = layer.self_attn(y, y, y)
        assert_close(out.unbind()[i], wanted[0])
        assert_close(weights[i, : len(y), : len(y)], wanted[1])
        assert (weights[i, len(y) :] == 0).all()
    for words, bad_call in (
        ("cannot go with src_key_padding_mask", lambda: layer(x, src_key_padding_mask=torch.zeros(3, 5))),
        ("cannot go with mask", lambda: nn.TransformerEncoder(layer, 1)(x, torch.zeros(5, 5))),
        ("needs batch_first=True", lambda: nn.TransformerEncoderLayer(E, H)(x)),
        ("to be one", lambda: layer.self_attn(x, nested(), x)),
        ("must not be nested", lambda: nn.TransformerDecoderLayer(E, H, batch_first=True)(x, x)),
        ("must not be nested", lambda: nn.Transformer(E, H, 1, 1).decoder(x, x)),
    ):
        with pytest.raises(TypeError, match=words):
            bad_call()


def test_empty_batch():
    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True)
    assert layer(torch.randn(0, L, E)).shape == (0, L, E)
