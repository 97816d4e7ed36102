"""Padding that is not computed: same results and gradients at real positions, wherever padding stands."""

import pytest
import torch
from modules import B, E, H, L, S, additive, assert_close, assert_parity, bool_mask, padding, pair, shake

from pytransformer import masks, nn, ops
from pytransformer.nn import ffn
from pytransformer.nn._packing import Rows, worthwhile_rows

# Of torch, about masks of two dtypes.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDED = padding(L)
MASKS = {
    "padding": {"src_key_padding_mask": PADDED},
    "float": {"src_key_padding_mask": additive(PADDED)},
    "float, more than -inf": {"src_key_padding_mask": additive(PADDED) + torch.linspace(-1, 1, L)},
    "with a mask": {"src_key_padding_mask": PADDED, "mask": bool_mask(L, L)},
    "with a mask per head": {"src_key_padding_mask": PADDED, "mask": bool_mask(B * H, L, L)},
    "with a bias": {"src_key_padding_mask": PADDED, "mask": torch.linspace(-1, 1, L * L).view(L, L)},
    "with a causal mask": {"src_key_padding_mask": PADDED.flip(1), "mask": CAUSAL | ~CAUSAL.T & ~torch.eye(L).bool()},
}


@pytest.fixture
def rows_seen(monkeypatch):
    """The shapes that the feed-forward networks are given."""
    seen, plain = [], ffn.ops.ffn
    monkeypatch.setattr(
        ffn.ops, "ffn", lambda x, *args, **kwargs: seen.append(list(x.shape)) or plain(x, *args, **kwargs)
    )
    return seen


def encoders(with_norm=True, **options):
    layers = pair("TransformerEncoderLayer", E, H, 24, 0.0, **options)
    norms = pair("LayerNorm", E) if with_norm else (None, None)
    theirs = torch.nn.TransformerEncoder(layers[0], 2, norms[0], enable_nested_tensor=False)
    ours = nn.TransformerEncoder(layers[1], 2, norms[1])
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True, "with_norm": False}], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_real_tokens_alone_are_computed(options, kind, rows_seen):
    theirs, ours = encoders(**options)
    given = MASKS[kind]
    padded = given["src_key_padding_mask"]
    padded = padded == -torch.inf if padded.is_floating_point() else padded
    x = torch.randn(B, L, E)
    if not options.get("batch_first"):
        padded, x = padded.T, x.transpose(0, 1)

    def at_real_positions(module, x, **given):
        return module(x, **given).masked_fill(padded[..., None], 0)

    assert_parity(theirs, ours, at_real_positions, x, **given)
    assert set(map(tuple, rows_seen)) == {(int((~padded).sum()), E)}
    assert (ours(x, **given)[padded] == 0).all()


@pytest.mark.parametrize("kind", MASKS)
def test_attention_reads_rows_where_they_lie_unless_the_mask_says_more(kind, monkeypatch):
    seen, plain = [], ops.attention_varlen
    monkeypatch.setattr(ops, "attention_varlen", lambda *args, **kw: seen.append(kw["is_causal"]) or plain(*args, **kw))
    _, ours = encoders(batch_first=True)
    ours(torch.randn(B, L, E), **MASKS[kind])
    causal = {"padding": False, "float": False, "with a causal mask": True}
    assert seen == ([causal[kind]] * 2 if kind in causal else [])
    seen.clear()
    ours(torch.randn(B, L, E), mask=masks.padding(~PADDED) & masks.window(2))
    assert not seen


def test_the_output_is_the_same_where_padding_is_computed(rows_seen):
    """With a hook on a child, a replaced child, under vmap, without a batch; or asked to."""
    _, ours = encoders(batch_first=True)
    ours = ours.eval()
    x, given = torch.randn(B, L, E), {"src_key_padding_mask": PADDED}
    wanted = ours(x, **given)
    assert rows_seen.pop() == rows_seen.pop() == [B * L - 3, E]
    handle = ours.layers[1].norm1.register_forward_hook(lambda *_: None)
    assert_close(ours(x, **given), wanted, "hook")
    handle.remove()
    plain = ours.layers[0].norm2
    ours.layers[0].norm2 = torch.nn.Sequential(plain)
    assert_close(ours(x, **given), wanted, "replaced")
    ours.layers[0].norm2 = plain
    mapped = torch.func.vmap(lambda x, p: ours(x[None], src_key_padding_mask=p[None])[0])(x, PADDED)
    assert_close(mapped, wanted, "vmap")
    assert_close(ours(x[0], src_key_padding_mask=PADDED[0]), wanted[0], "unbatched")
    assert all(shape[-2] == L for shape in rows_seen)
    computed = ours(x, **given, skip_padding=False)
    assert_close(computed.masked_fill(PADDED[..., None], 0), wanted)
    assert (computed[PADDED] != 0).all()
    ours.enable_nested_tensor = False
    assert_close(ours(x, **given), computed)


def test_nothing_but_padding_and_no_padding_at_all():
    _, ours = encoders(batch_first=True)
    x = torch.randn(B, L, E)
    assert (ours(x, src_key_padding_mask=torch.ones(B, L, dtype=torch.bool)) == 0).all()
    assert_close(ours(x, src_key_padding_mask=torch.zeros(B, L, dtype=torch.bool)), ours(x))
    poisoned = x.clone()
    poisoned[PADDED] = torch.nan
    assert_close(ours(poisoned, src_key_padding_mask=PADDED), ours(x, src_key_padding_mask=PADDED))


def test_dropout_and_autocast():
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.5, batch_first=True)
    ours = nn.TransformerEncoder(layer, 2)
    x, given = torch.randn(B, L, E), {"src_key_padding_mask": PADDED}
    torch.manual_seed(1)
    first = ours(x, **given)
    torch.manual_seed(1)
    assert torch.equal(ours(x, **given), first)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours.eval()(x, **given)
    torch.testing.assert_close(half.float(), ours(x, **given), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "bias"])
@pytest.mark.parametrize("hides", ["target", "memory", "both"])
def test_a_decoder_skips_padding_of_its_target_if_asked_to_and_of_its_memory(options, mask, hides, rows_seen):
    layers, norms = pair("TransformerDecoderLayer", E, H, 24, 0.0, **options), pair("LayerNorm", E)
    theirs = torch.nn.TransformerDecoder(layers[0], 2, norms[0])
    ours = nn.TransformerDecoder(layers[1], 2, norms[1], enable_nested_tensor=True)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    padded = torch.zeros(B, L, dtype=torch.bool)
    if hides != "memory":
        padded[0, 1:3], padded[2, 4:] = True, True  # not key 0: torch's answer to a query without a key is NaN
    given = {None: {}, "causal": {"tgt_mask": CAUSAL}, "bias": {"memory_mask": torch.linspace(-1, 1, L * S).view(L, S)}}
    given = given[mask] | {"tgt_key_padding_mask": padded} if hides != "memory" else given[mask]
    given = given | {"memory_key_padding_mask": padding()} if hides != "target" else given
    inputs = torch.randn(B, L, E), torch.randn(B, S, E)
    across = padded
    if not options.get("batch_first"):
        inputs, across = [x.transpose(0, 1) for x in inputs], padded.T

    def at_real_positions(module, *inputs, **given):
        return module(*inputs, **given).masked_fill(across[..., None], 0)

    assert_parity(theirs, ours, at_real_positions, *inputs, **given)
    assert set(map(tuple, rows_seen)) == {(int((~padded).sum()), E)}
    assert (ours(*inputs, **given)[across] == 0).all()
    computed = ours(*inputs, **given, skip_padding=False)
    assert_close(computed.masked_fill(across[..., None], 0), ours(*inputs, **given))
    assert (computed[across] != 0).all()


def test_a_transformer_computes_what_its_decoder_reads():
    theirs, ours = pair("Transformer", E, H, 1, 1, 24, 0.0, batch_first=True)
    src, tgt = torch.randn(B, S, E), torch.randn(B, L, E)
    given = {"src_key_padding_mask": padding()}
    assert_parity(theirs, ours, lambda m, *x, **given: m(*x, **given), src, tgt, **given)
    given["memory_key_padding_mask"] = padding()
    assert_parity(theirs, ours, lambda m, *x, **given: m(*x, **given), src, tgt, **given)


def test_gathering_and_scattering_differentiate_twice():
    rows = worthwhile_rows(~PADDED)
    assert rows.index.tolist() == (~PADDED).flatten().nonzero()[:, 0].tolist()
    x = torch.randn(B, L, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rows.scatter(rows.gather(x).sin()), [x])
    assert torch.autograd.gradgradcheck(lambda x: rows.scatter(rows.gather(x).sin()), [x])
    assert worthwhile_rows(torch.ones(B, L, dtype=torch.bool)) is None
    assert worthwhile_rows(torch.zeros(B, L, dtype=torch.bool)) is None
    assert isinstance(worthwhile_rows(~PADDED, torch.zeros(1)), Rows)
    assert worthwhile_rows(~PADDED, torch.zeros(1, device="meta")) is None


@pytest.mark.parametrize("lengths", [False, True])
def test_padding_in_a_mask_object_is_padding(lengths, rows_seen):
    _, ours = encoders(batch_first=True)
    padded = torch.arange(L) >= torch.tensor([4, 7, 2])[:, None]
    given = masks.padding(torch.tensor([4, 7, 2]) if lengths else ~padded)
    x = torch.randn(B, L, E)
    wanted = ours(x, mask=CAUSAL, src_key_padding_mask=padded)
    assert_close(ours(x, mask=given & masks.causal()), wanted)
    assert set(map(tuple, rows_seen)) == {(13, E)}
    assert_close(ours(x[2], mask=masks.causal() & masks.padding(torch.tensor([2]))), wanted[2])
    rows_seen.clear()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 24, 0.0, batch_first=True), 1)
    out = decoder(x, wanted, given & masks.causal(), given, skip_padding=True)
    again = decoder(x, wanted, CAUSAL, None, padded, padded).masked_fill(padded[..., None], 0)
    assert_close(out, again)
    assert rows_seen[0] == [13, E]


def test_bad_inputs_name_values():
    _, ours = encoders(batch_first=True)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 24, batch_first=True), 1)
    x, memory, given = torch.randn(B, L, E), torch.randn(B + 1, S, E), {"memory_key_padding_mask": padding()}
    for words, bad_call in (
        ("size 16 last, got 15", lambda: ours(x[..., 1:], src_key_padding_mask=PADDED)),
        (r"got \[3, 5\]", lambda: ours(x, src_key_padding_mask=padding())),
        (r"query \[3, 7, 16\], key \[4, 5, 16\]", lambda: decoder(x, memory, **given)),
        ("size 16 last, got 15", lambda: decoder(x, memory[1:, :, 1:], **given)),
    ):
        with pytest.raises(ValueError, match=words):
            bad_call()
