"""Every combination of arguments that torch's attention and Transformer modules take, ours against theirs.

Constructors and calls are tables. Every constructor meets a part of the calls, which turns from one to the next, so
that every pair of a constructor's argument and a call's is met; a part of that with gradients. It is run in float64,
where two spellings of one formula agree to rounding. Dropout is 0 in training mode: what is
compared with is torch's training path, never its fast path. Masks leave every query a key; what happens to a query
without any is where ours differs, in docs/differences.md and tests/test_nn.py.
"""

import inspect
from itertools import product

import compare
import pytest
import torch
import torch.nn.functional as F
from modules import B, E, H, L, S, additive, assert_parity, bool_mask, pair, results, shake

from pytransformer import nn

# Of torch, about its fast path and about masks of two dtypes; ours takes both in silence.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")

GRADIENTS_EVERY = 5


def table(**columns):
    """All combinations, as dictionaries; an argument whose value is None keeps its default."""
    rows = product(*columns.values())
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def key_padding(length):
    """Padding at the end and inside; keys 0 and 2 stay, so that every mask below leaves every query a key."""
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[0, -2:], mask[1, 1] = True, True
    return mask


def causal(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool).triu(1)


def attention_masks(rows, columns):
    return {
        "none": None,
        "bool": bool_mask(rows, columns),
        "bool per head": bool_mask(B * H, rows, columns),
        "float": torch.linspace(-2, 2, rows * columns, dtype=torch.float64).view(rows, columns),
        "float per head": additive(bool_mask(B * H, rows, columns)).double() + 0.2,
        "causal": causal(rows, columns),
        "causal float": additive(causal(rows, columns)).double(),
    }


def padding_masks(length):
    return {"none": None, "bool": key_padding(length), "float": additive(key_padding(length)).double() - 0.1}


def in_layout(x, batch_first, batched):
    """[B,length,E] as the call wants it; unbatched the first of the batch, which is padded at the end."""
    if not batched:
        return x[0]
    return x if batch_first else x.transpose(0, 1)


def without_batch(mask):
    if mask is None or (mask.dim() == 2 and mask.shape[0] != B):
        return mask
    return mask[:H] if mask.dim() == 3 else mask[0]


def assert_same(theirs, ours, calls, what):
    """Equal outputs of all ``calls``, pairs of inputs and arguments; gradients of one in ``GRADIENTS_EVERY``."""
    for number, (inputs, given) in enumerate(calls):
        with torch.set_grad_enabled(number % GRADIENTS_EVERY == 0):
            if torch.is_grad_enabled():
                call = lambda module, *x, given=given: module(*x, **given)  # noqa: E731
                expected, found = (results(m, call, inputs, {}, torch.float64) for m in (theirs, ours))
            else:
                expected, found = (outputs(module(*inputs, **given)) for module in (theirs, ours))
        assert found.keys() == expected.keys()
        different = {n: x for n, x in expected.items() if not torch.equal(found[n].float(), x.float())}
        size = max(x.square().mean().sqrt() for x in expected.values()).item() if different else 0.0
        for name, x in different.items():
            message = f"{what}, {describe(given)}: {name}"
            compare.assert_close(message, found[name].float(), x, x.float(), magnitude=1e-3 * size)


def outputs(found):
    found = found if isinstance(found, tuple) else (found,)
    return {str(i): x for i, x in enumerate(found) if x is not None}


def describe(given):
    return {k: f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else x for k, x in given.items()}


def double_pair(name, *args, **kwargs):
    return pair(name, *args, **kwargs, dtype=torch.float64)


def part(calls, number, every):
    """Every ``every``-th call, from another one on for each ``number``."""
    return calls[number % every :: every]


ATTENTIONS = table(
    bias=(None, False),
    kdim=(None, 6),
    vdim=(None, 10),
    add_bias_kv=(None, True),
    add_zero_attn=(None, True),
    batch_first=(None, True),
)


@pytest.mark.parametrize("number", range(len(ATTENTIONS)), ids=lambda n: ",".join(ATTENTIONS[n]) or "default")
def test_multihead_attention(number):
    options = ATTENTIONS[number]
    theirs, ours = double_pair("MultiheadAttention", E, H, **options)
    sizes = ((L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E)))
    query, key, value = (torch.randn(B, *size, dtype=torch.float64) for size in sizes)
    appends = "add_bias_kv" in options or "add_zero_attn" in options  # torch's hint may hide the appended keys
    calls = []
    for batched, (kind, mask), padding, weights in product(
        (True, False),
        attention_masks(L, S).items(),
        padding_masks(S).values(),
        ({"need_weights": False}, {}, {"average_attn_weights": False}),
    ):
        given = {"attn_mask": mask, "key_padding_mask": padding, **weights}
        if not batched:
            given |= {"attn_mask": without_batch(mask), "key_padding_mask": without_batch(padding)}
        inputs = [in_layout(x, options.get("batch_first"), batched) for x in (query, key, value)]
        calls.append((inputs, given))
        if kind.startswith("causal") and not appends:
            calls.append((inputs, {**given, "is_causal": True}))
    assert_same(theirs, ours, part(calls, number, 7), str(options))


LAYERS = table(
    batch_first=(None, True),
    norm_first=(None, True),
    bias=(None, False),
    activation=(None, "gelu", torch.tanh, torch.nn.SiLU()),
)


def layer_calls(inputs, batch_first, masks, paddings, mask_name, padding_name, hint_name):
    """Calls of an encoder layer or stack: every mask with every padding, hinted where it is causal."""
    calls = []
    for batched, (kind, mask), padding in product((True, False), masks.items(), paddings.values()):
        given = {mask_name: mask, padding_name: padding}
        given = given if batched else {k: without_batch(m) for k, m in given.items()}
        laid_out = [in_layout(x, batch_first, batched) for x in inputs]
        calls.append((laid_out, given))
        if kind.startswith("causal"):
            calls.append((laid_out, {**given, hint_name: True}))
    return calls


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=lambda n: ",".join(LAYERS[n]) or "default")
def test_encoder_layer(number):
    options = LAYERS[number]
    theirs, ours = double_pair("TransformerEncoderLayer", E, H, 12, 0.0, layer_norm_eps=1e-4, **options)
    names = ("src_mask", "src_key_padding_mask", "is_causal")
    x = torch.randn(B, L, E, dtype=torch.float64)
    calls = layer_calls([x], options.get("batch_first"), attention_masks(L, L), padding_masks(L), *names)
    assert_same(theirs, ours, part(calls, number, 3), str(options))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_encoder(batch_first, norm_first, with_norm):
    options = {"batch_first": batch_first, "norm_first": norm_first}
    layers = double_pair("TransformerEncoderLayer", E, H, 12, 0.0, **options)
    norms = double_pair("LayerNorm", E) if with_norm else (None, None)
    theirs = torch.nn.TransformerEncoder(layers[0], 2, norms[0], enable_nested_tensor=False)
    ours = nn.TransformerEncoder(layers[1], 2, norms[1], enable_nested_tensor=False)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, L, E, dtype=torch.float64)
    names = ("mask", "src_key_padding_mask", "is_causal")
    calls = layer_calls([x], batch_first, attention_masks(L, L), padding_masks(L), *names)
    calls += [(inputs, {**given, "is_causal": False}) for inputs, given in calls if "is_causal" not in given]
    assert_same(theirs, ours, part(calls, 2 * batch_first + norm_first, 5), str(options))


def decoder_calls(inputs, batch_first, source, number, every=37):
    """A part of the calls with target masks x memory masks x both paddings x batched."""
    calls = []
    columns = (
        (True, False),
        attention_masks(L, L).items(),
        attention_masks(L, S).items(),
        padding_masks(L).values(),
        padding_masks(S).values(),
    )
    rows = list(product(*columns))
    for batched, (kind, mask), (memory_kind, memory_mask), padding, memory_padding in part(rows, number, every):
        given = {
            "tgt_mask": mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": padding,
            "memory_key_padding_mask": memory_padding,
            **source,
        }
        given = given if batched else {k: without_batch(m) for k, m in given.items()}
        hints = {"tgt_is_causal": kind.startswith("causal"), "memory_is_causal": memory_kind.startswith("causal")}
        hinted = number % 2 == 0 and memory_padding is None
        calls.append(([in_layout(x, batch_first, batched) for x in inputs], given | (hints if hinted else {})))
    return calls


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_decoder_layer(number):
    options = LAYERS[number]
    theirs, ours = double_pair("TransformerDecoderLayer", E, H, 12, 0.0, **options)
    inputs = [torch.randn(B, length, E, dtype=torch.float64) for length in (L, S)]
    assert_same(theirs, ours, decoder_calls(inputs, options.get("batch_first"), {}, number), str(options))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_decoder(batch_first, with_norm):
    layers = double_pair("TransformerDecoderLayer", E, H, 12, 0.0, batch_first=batch_first, norm_first=with_norm)
    norms = double_pair("LayerNorm", E) if with_norm else (None, None)
    theirs, ours = torch.nn.TransformerDecoder(layers[0], 2, norms[0]), nn.TransformerDecoder(layers[1], 2, norms[1])
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(B, length, E, dtype=torch.float64) for length in (L, S)]
    assert_same(theirs, ours, decoder_calls(inputs, batch_first, {}, 2 * batch_first + with_norm), "decoder")


@pytest.mark.parametrize("number", range(8))
def test_transformer(number):
    options = table(batch_first=(None, True), norm_first=(None, True), bias=(None, False))[number]
    theirs, ours = double_pair("Transformer", E, H, 1, 1, 12, 0.0, **options)
    inputs = [torch.randn(B, length, E, dtype=torch.float64) for length in (S, L)]
    source = {"src_mask": attention_masks(S, S)["bool"], "src_key_padding_mask": key_padding(S)}
    source = {} if number % 3 == 0 else source
    assert_same(theirs, ours, decoder_calls(inputs, options.get("batch_first"), source, number), str(options))


def test_self_attention_of_one_tensor_and_shared_memory():
    for options in ({}, {"batch_first": True, "bias": False}, {"add_bias_kv": True}):
        theirs, ours = pair("MultiheadAttention", E, H, **options)
        for batched in (True, False):
            x, y = (in_layout(torch.randn(B, n, E), options.get("batch_first"), batched) for n in (L, S))
            assert_parity(theirs, ours, lambda m, x: m(x, x, x), x)
            assert_parity(theirs, ours, lambda m, x, y: m(x, y, y), x, y)


SIGNED = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder")
SIGNED = (*SIGNED, "TransformerDecoder", "Transformer", "LayerNorm", "RMSNorm", "Embedding")


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_begin_with_torchs(name, method):
    """The same names and defaults in the same order; what is ours alone is optional."""
    theirs, ours = (
        list(inspect.signature(getattr(getattr(module, name), method)).parameters.values()) for module in (torch.nn, nn)
    )
    for x, y in zip(theirs, ours, strict=False):
        assert (x.name, x.default, x.kind) == (y.name, y.default, y.kind)
    assert len(ours) >= len(theirs)
    assert all(y.default is not inspect.Parameter.empty for y in ours[len(theirs) :])


def test_positional_calls():
    x, y = torch.randn(B, L, E), torch.randn(B, S, E)
    mask, padded = causal(L, L), key_padding(L)
    theirs, ours = pair("MultiheadAttention", E, H, 0.0, True, False, False, None, None, True)
    assert_parity(theirs, ours, lambda m, x: m(x, x, x, padded, True, mask, False, True), x)
    theirs, ours = pair("TransformerEncoderLayer", E, H, 12, 0.0, F.gelu, 1e-4, True, True, False)
    assert_parity(theirs, ours, lambda m, x: m(x, mask, padded, True), x)
    theirs, ours = pair("TransformerDecoderLayer", E, H, 12, 0.0, F.gelu, 1e-4, True, True, False)
    assert_parity(theirs, ours, lambda m, x, y: m(x, y, mask, None, padded, key_padding(S), True, False), x, y)
    theirs, ours = pair("Transformer", E, H, 1, 1, 12, 0.0, F.gelu, None, None, 1e-4, True, True, False)
    assert_parity(theirs, ours, lambda m, y, x: m(y, x, None, mask, None, None, padded, key_padding(S)), y, x)
