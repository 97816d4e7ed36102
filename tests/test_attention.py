"""attention over all backends: every mask level, shape and layout, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_rejects,
    assert_repeats,
    assert_wanted_gradients_only,
    check,
    gradcheck,
    randn,
    run,
)

from pytransformer import masks, ops, reference
from pytransformer.ops.attention import UNPACKED, _op

# B, H, G, T, S, D, Dv
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "one_query": (2, 4, 2, 1, 127, 64, 64),
    "one_key": (2, 2, 2, 65, 1, 33, 33),
    "ragged": (2, 3, 3, 63, 65, 33, 33),
    "gqa": (1, 6, 2, 65, 65, 64, 64),
    "mqa": (2, 4, 1, 127, 63, 80, 80),
    "longer_keys": (1, 2, 2, 33, 150, 64, 33),
    "longer_queries": (1, 2, 1, 150, 33, 8, 80),
    "wide_heads": (1, 1, 1, 17, 19, 160, 256),
}


def qkv(B, H, G, T, S, D, Dv, dtype=torch.float32):
    return {
        "query": randn(B, H, T, D, dtype=dtype),
        "key": randn(B, G, S, D, dtype=dtype),
        "value": randn(B, G, S, Dv, dtype=dtype),
    }


def lengths_for(B, S):
    return torch.tensor([S, max(S // 2, 1), 0][:B] if B < 3 else [S - i for i in range(B)]).clamp(0, S)


def padding(B, S):
    """bool [B,1,1,S] with padding in front, inside and behind."""
    keep = torch.rand(B, 1, 1, S) < 0.7
    keep[..., : S // 8] = False
    keep[..., -(S // 5) or S :] = False
    keep[..., S // 2] = True
    return keep


def dense(*shape):
    return torch.rand(*shape) < 0.6


# Each mask: (B, H, T, S) -> keyword arguments of the op; "bias" is differentiated.
MASKS = {
    "none": lambda B, H, T, S: {},
    "causal": lambda B, H, T, S: {"is_causal": True},
    "causal_bottom_right": lambda B, H, T, S: {"is_causal": True, "causal_align": "bottom_right"},
    "window": lambda B, H, T, S: {"window": 5},
    "window_left": lambda B, H, T, S: {"window": (7, 0), "causal_align": "bottom_right"},
    "window_open": lambda B, H, T, S: {"window": (None, 3)},
    "window_none_seen": lambda B, H, T, S: {"window": (0, 0), "key_lengths": torch.ones(B, dtype=torch.int64)},
    "lengths": lambda B, H, T, S: {"key_lengths": lengths_for(B, S)},
    "padding": lambda B, H, T, S: {"attn_mask": padding(B, S)},
    "padding_all": lambda B, H, T, S: {"attn_mask": torch.zeros(B, 1, 1, S, dtype=torch.bool)},
    "bool_full": lambda B, H, T, S: {"attn_mask": dense(B, H, T, S)},
    "bool_per_query": lambda B, H, T, S: {"attn_mask": dense(T, S)},
    "bool_per_head": lambda B, H, T, S: {"attn_mask": dense(H, 1, S)},
    "bool_rows": lambda B, H, T, S: {"attn_mask": dense(B, 1, T, 1)},
    "bias_full": lambda B, H, T, S: {"bias": randn(B, H, T, S)},
    "bias_per_head": lambda B, H, T, S: {"bias": randn(H, T, S)},
    "bias_per_batch": lambda B, H, T, S: {"bias": randn(B, 1, T, S)},
    "bias_per_query": lambda B, H, T, S: {"bias": randn(T, S)},
    "bias_per_key": lambda B, H, T, S: {"bias": randn(B, 1, 1, S)},
    "bias_per_row": lambda B, H, T, S: {"bias": randn(B, H, T, 1)},
    "bias_scalar": lambda B, H, T, S: {"bias": randn(1, 1, 1, 1)},
    "bias_infinite": lambda B, H, T, S: {"bias": randn(T, S).masked_fill(~dense(T, S) & ~torch.eye(T, S).bool(), -1e4)},
    "causal_padding": lambda B, H, T, S: {"is_causal": True, "attn_mask": padding(B, S)},
    "everything": lambda B, H, T, S: {
        "attn_mask": dense(B, 1, T, S),
        "bias": randn(H, 1, S),
        "is_causal": True,
        "causal_align": "bottom_right",
        "window": (40, 2),
        "key_lengths": lengths_for(B, S),
        "scale": 0.3,
    },
}


def visible(B, H, T, S, options):
    """bool [B,H,T,S]: what the masking arguments leave, from the definitions and not from the library."""
    t, s = torch.arange(T)[:, None], torch.arange(S)
    if options.get("causal_align") == "bottom_right":
        t = t + S - T
    keep = torch.ones(B, H, T, S, dtype=torch.bool)
    if options.get("is_causal"):
        keep = keep & (s <= t)
    if "window" in options:
        window = options["window"]
        left, right = window if isinstance(window, tuple) else (window, window)
        keep = keep if left is None else keep & (s >= t - left)
        keep = keep if right is None else keep & (s <= t + right)
    if "key_lengths" in options:
        keep = keep & (s < options["key_lengths"][:, None, None, None])
    return keep & options["attn_mask"] if "attn_mask" in options else keep


def case(shape, mask, dtype):
    B, H, G, T, S, D, Dv = SHAPES[shape]
    options = MASKS[mask](B, H, T, S)
    tensors = qkv(*SHAPES[shape], dtype=dtype)
    if "bias" in options:
        tensors["bias"] = options.pop("bias").to(dtype)
    return tensors, options | ({"enable_gqa": True} if G != H else {})


def cancelled(shape, mask):
    """Gradients that are 0 by cancellation, and the size of what cancels: sums of up to thousands of terms of 1.

    A softmax over one key is 1, and its row's gradients are 0: a kernel that recomputes it from the lse, itself
    rounded, gets there only to within eps |lse|.
    """
    one_key = SHAPES[shape][4] == 1 or mask == "window_none_seen"
    one_key = one_key or (shape == "one_query" and mask == "causal")
    if one_key:
        return dict.fromkeys(("dquery", "dkey", "dvalue", "dbias"), 16.0)
    if mask in ("bias_per_row", "bias_scalar"):  # a softmax does not see what is added to a whole row
        return {"dbias": 16.0}
    return {}


# Every mask on one shape, every shape on a few masks, and the rest of the product taken diagonally.
PAIRS = {("ragged", mask) for mask in MASKS}
PAIRS |= {(shape, mask) for shape in SHAPES for mask in ("none", "causal", "everything")}
PAIRS |= {(list(SHAPES)[i % len(SHAPES)], mask) for i, mask in enumerate(MASKS)}
PAIRS |= {(list(SHAPES)[(i + 4) % len(SHAPES)], mask) for i, mask in enumerate(MASKS)}
PAIRS = sorted(PAIRS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "mask"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_against_the_oracle(backend_isa, shape, mask, dtype):
    tensors, options = case(shape, mask, dtype)
    check("attention", tensors, options, backend_isa, magnitudes=cancelled(shape, mask))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_say(mask):
    """The reference against a softmax over ``visible``, written here."""
    B, H, G, T, S, D, Dv = 3, 2, 2, 9, 12, 4, 4
    options = MASKS[mask](B, H, T, S)
    q, k, v = qkv(B, H, G, T, S, D, Dv, dtype=torch.float64).values()
    options = {n: x.double() if n == "bias" else x for n, x in options.items()}
    scores = q @ k.mT * options.get("scale", 0.5) + options.get("bias", 0)
    keep = visible(B, H, T, S, options)
    wanted = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num() @ v
    torch.testing.assert_close(ops.attention(q, k, v, **options, backend="reference"), wanted)


def test_several_tiles(backend_isa):
    tensors = qkv(1, 2, 1, 300, 515, 64, 64)
    options = {"is_causal": True, "causal_align": "bottom_right", "attn_mask": padding(1, 515), "enable_gqa": True}
    check("attention", tensors, options, backend_isa)
    check("attention", tensors, {"window": (130, 4), "enable_gqa": True}, backend_isa)
    check("attention", {n: x.bfloat16() for n, x in tensors.items()}, {"enable_gqa": True}, backend_isa)


@pytest.mark.parametrize("mask", ["none", "causal", "window_left", "padding"])
def test_heads_larger_than_a_cache(backend_isa, mask):
    """Many queries are then taken at once, so that they ask less often for the keys."""
    sizes = B, H, G, T, S, D, Dv = 1, 1, 1, 700, 1300, 96, 64
    check("attention", qkv(*sizes), MASKS[mask](B, H, T, S), backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal_bottom_right", "padding"])
def test_scores_that_rise_along_the_keys(backend_isa, mask, dtype):
    """The highest scores of a row come last, far above those that its maximum was first taken of."""
    B, H, G, T, S, D, Dv = sizes = (1, 2, 1, 70, 700, 32, 40)
    tensors = qkv(*sizes, dtype=dtype)
    tensors["key"] = (tensors["key"] * torch.linspace(0.1, 12, S)[:, None]).to(dtype)
    check("attention", tensors, MASKS[mask](B, H, T, S) | {"enable_gqa": True}, backend_isa)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scores_that_are_no_numbers(backend_isa, dtype, special):
    """A key of infinite or undefined scores, beyond the first of its row: what sees it is as in plain PyTorch."""
    if backend_isa == "reference":
        pytest.skip("the reference gives NaN to every query that sees a key that is not finite")
    q, k, v = qkv(1, 1, 1, 150, 300, 32, 32, dtype=dtype).values()
    k[..., 100, 0] = special
    found = ops.attention(q, k, v, is_causal=True, backend=backend_isa)
    plain = F.scaled_dot_product_attention(*(x.double().cpu() for x in (q, k, v)), is_causal=True)
    plain = plain.to(found.device)  # torch's kernels for GPUs let a NaN behind a causal mask through
    assert torch.equal(found.isnan(), plain.isnan())
    seen = ~plain.isnan()
    torch.testing.assert_close(found[seen].double(), plain[seen], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal_bottom_right", "padding", "bias_per_head"])
def test_few_queries_and_many_keys(backend_isa, mask, dtype):
    """Decoding: the keys are split into parts, and the parts combined."""
    B, H, G, T, S, D, Dv = sizes = (1, 2, 1, 3, 1100, 24, 40)
    options = MASKS[mask](B, H, T, S) | {"enable_gqa": True} | ({"softcap": 20.0} if mask == "padding" else {})
    tensors = qkv(*sizes, dtype=dtype)
    if "bias" in options:
        tensors["bias"] = options.pop("bias").to(dtype)
    check("attention", tensors, options, backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("extra", [{"dropout_p": 0.3}, {"softcap": 2.0}, {"dropout_p": 0.1, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [("ragged", "none"), ("ragged", "everything"), ("longer_keys", "causal_bottom_right"), ("gqa", "bias_per_head")],
)
def test_dropout_and_softcap(backend_isa, shape, mask, extra, dtype):
    tensors, options = case(shape, mask, dtype)
    check("attention", tensors, options | extra | {"seed": 11}, backend_isa)


def test_dropout_over_several_tiles(backend_isa):
    tensors = qkv(1, 2, 1, 130, 700, 16, 16)
    check("attention", tensors, {"dropout_p": 0.2, "seed": 3, "enable_gqa": True, "window": (300, 40)}, backend_isa)


def test_everything_dropped(backend_isa):
    found = run("attention", qkv(1, 2, 2, 65, 70, 16, 16), {"dropout_p": 1.0}, backend_isa)
    assert not any(x.any() for x in found.values())


def test_float32_bias_with_bfloat16_inputs(backend_isa):
    tensors = qkv(*SHAPES["gqa"], dtype=torch.bfloat16) | {"bias": randn(6, 65, 65)}
    check("attention", tensors, {"enable_gqa": True}, backend_isa)


def strided(kind, x):
    """``x`` with its values in memory laid out in another way."""
    if kind == "transposed":  # [B,T,H,D] seen as [B,H,T,D]
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "packed":  # a slice of packed QKV
        room = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan, dtype=x.dtype)
        room[..., x.shape[-1] : 2 * x.shape[-1]] = x
        return room[..., x.shape[-1] : 2 * x.shape[-1]]
    if kind == "misaligned":
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)
    if kind == "column_major":
        return x.mT.contiguous().mT
    return x[:1, :1, :1].expand(x.shape)  # stride 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["transposed", "packed", "misaligned", "column_major", "stride_0"])
def test_layouts(backend_isa, kind, dtype):
    tensors = {n: strided(kind, x) for n, x in qkv(2, 4, 2, 33, 35, 33, 33, dtype=dtype).items()}
    cancels = {"dquery": 1.0, "dkey": 1.0} if kind == "stride_0" else None  # all keys alike: no score matters
    check("attention", tensors, {"is_causal": True, "enable_gqa": True}, backend_isa, magnitudes=cancels)


@pytest.mark.parametrize("D", [16, 20])
def test_results_lie_as_torchs_do(backend_isa, D):
    """A token's heads together: what joins them takes no copy."""
    if backend_isa == "reference":
        pytest.skip("results of plain PyTorch lie as its operations leave them")
    inputs = [x.requires_grad_() for x in qkv(2, 3, 3, 5, 7, D, D).values()]
    out = ops.attention(*inputs, backend=backend_isa)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *grads))


@pytest.mark.parametrize("kind", ["transposed", "packed", "misaligned", "column_major", "stride_0"])
def test_mask_layouts(backend_isa, kind):
    tensors = qkv(2, 4, 2, 33, 35, 16, 16) | {"bias": strided(kind, randn(2, 4, 33, 35))}
    keep = dense(2, 1, 1, 35).expand(2, 4, 33, 35) if kind == "stride_0" else strided(kind, dense(2, 4, 33, 35))
    cancels = {"dbias": 1.0} if kind == "stride_0" else None
    check("attention", tensors, {"attn_mask": keep, "enable_gqa": True}, backend_isa, magnitudes=cancels)


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 2, 5, 6, 8, 8), (2, 2, 2, 0, 6, 8, 8), (2, 2, 2, 5, 0, 8, 8), (2, 0, 0, 5, 6, 8, 8), (1, 2, 1, 3, 4, 8, 0)],
    ids=["no_batch", "no_query", "no_key", "no_head", "no_value_width"],
)
def test_empty(backend_isa, sizes):
    found = run("attention", qkv(*sizes), {"enable_gqa": True}, backend_isa)
    assert list(found["output"].shape) == [sizes[0], sizes[1], sizes[3], sizes[6]]
    for name, x in found.items():
        assert not x.any(), f"{name} must be zeros"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_that_see_nothing(backend_isa, dtype):
    B, H, G, T, S, D, Dv = 2, 4, 2, 65, 63, 33, 20
    keep = dense(B, 1, T, S)
    keep[0, :, 3], keep[1, :, 40:], keep[0, :, -1] = False, False, False
    tensors = qkv(B, H, G, T, S, D, Dv, dtype=dtype) | {"bias": randn(T, S, dtype=dtype)}
    options = {"attn_mask": keep, "enable_gqa": True}
    found = check("attention", tensors, options, backend_isa)
    unseen = ~keep.any(-1).expand(B, H, T)
    assert not found["output"][unseen].any(), "rows that see no key must be 0"
    assert not found["dquery"][unseen].any(), "their query gradient must be 0"
    _, lse = ops.attention(**tensors, **options, return_lse=True, backend=backend_isa)
    assert (lse[unseen] == -torch.inf).all(), "their lse must be -inf"
    assert lse[~unseen].isfinite().all()


HIDDEN = {
    "causal": lambda: {"is_causal": True},
    "lengths": lambda: {"key_lengths": torch.tensor([20, 33])},
    "padding": lambda: {"attn_mask": (torch.arange(40) < 25).expand(2, 1, 1, 40)},
    "interior": lambda: {"attn_mask": ((torch.arange(40) < 8) | (torch.arange(40) > 30)).expand(2, 1, 1, 40)},
    "window": lambda: {"window": (3, 2)},
    "dense": lambda: {"attn_mask": torch.rand(2, 1, 40, 40) < 0.5},
}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", HIDDEN)
def test_what_is_behind_the_mask_never_leaks(backend_isa, mask, dtype, poison):
    """Keys and values that no query sees, and the bias wherever it is masked."""
    options = HIDDEN[mask]()
    clean = qkv(2, 4, 2, 40, 40, 24, 24, dtype=dtype) | {"bias": randn(2, 1, 40, 40, dtype=dtype)}
    keep = visible(2, 1, 40, 40, options)
    if mask in ("causal", "window", "dense"):  # these leave no key unseen by all queries
        keep[..., 17] = keep[..., 39] = False
        options["attn_mask"] = keep
    unseen = ~keep.any(2)  # [2,1,40]
    hidden, harmless = dict(clean), dict(clean)
    for name in ("key", "value"):
        hidden[name] = torch.where(unseen[..., None], poison, clean[name])
        harmless[name] = torch.where(unseen[..., None], 0, clean[name])
    hidden["bias"], harmless["bias"] = (torch.where(keep, clean["bias"], x) for x in (poison, 0))
    options["enable_gqa"] = True
    found = check("attention", hidden, options, backend_isa, harmless=harmless)
    for name in ("key", "value"):
        assert not found[f"d{name}"][unseen.expand(2, 2, 40)].any(), f"a masked {name} has a gradient"
    assert not found["dbias"][~keep].any(), "masked bias has a gradient"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["key", "value"])
def test_poison_reaches_the_queries_that_see_it_only(backend_isa, name, dtype, poison):
    tensors = qkv(1, 2, 2, 70, 70, 16, 16, dtype=dtype)
    clean = ops.attention(**tensors, is_causal=True, backend=backend_isa)
    tensors[name][:, :, 37] = poison
    out = ops.attention(**tensors, is_causal=True, backend=backend_isa)
    torch.testing.assert_close(out[:, :, :37], clean[:, :, :37], msg=f"a {poison} {name} leaked to earlier queries")
    if name == "value" or poison != poison:  # a score of -inf may hide a key of Inf
        assert not out[:, :, 37:].isfinite().any(), f"a visible {poison} {name} was lost"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_padded_queries_may_hold_nan(backend_isa, dtype):
    keep = torch.ones(2, 1, 33, 20, dtype=torch.bool)
    keep[:, :, 30:] = False
    tensors = qkv(2, 2, 2, 33, 20, 16, 16, dtype=dtype)
    harmless = dict(tensors, query=tensors["query"].clone())
    tensors["query"][:, :, 30:], harmless["query"][:, :, 30:] = torch.nan, 0
    check("attention", tensors, {"attn_mask": keep}, backend_isa, harmless=harmless)


def test_extreme_scores(backend_isa):
    tensors = qkv(1, 2, 2, 33, 65, 16, 16)
    tensors["query"] *= 1000
    out = ops.attention(**tensors, is_causal=True, backend=backend_isa)
    wanted = ops.attention(**{n: x.double() for n, x in tensors.items()}, is_causal=True, backend="reference")
    torch.testing.assert_close(out, wanted, check_dtype=False, rtol=2e-3, atol=2e-3)
    bias = torch.full((33, 65), -3e38)
    assert ops.attention(**tensors, bias=bias, backend=backend_isa).isfinite().all(), "a huge negative bias overflowed"


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.02, 0.02)], ids=str
)
def test_a_bias_of_minus_infinity_masks(backend_isa, dtype, rtol, atol):
    """As in SDPA; a row of nothing else included."""
    tensors = {name: x.to(dtype) for name, x in qkv(2, 2, 2, 33, 35, 16, 16).items()}
    keep = dense(33, 35)
    keep[:, 0] = True
    keep[7] = False
    bias = torch.zeros(33, 35, dtype=dtype).masked_fill(~keep, -torch.inf)
    actual = run("attention", tensors, {"attn_mask": bias}, backend_isa)
    wanted = run("attention", tensors, {"attn_mask": keep}, "reference")
    for name, x in actual.items():
        torch.testing.assert_close(x, wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", ["none", "everything", "bias_per_key"])
def test_repeated_runs_are_bitwise_equal(backend_isa, mask, dtype):
    assert_repeats("attention", *case("gqa", mask, dtype), backend_isa)


def test_only_the_wanted_gradients(backend_isa):
    tensors = qkv(2, 4, 2, 17, 19, 16, 16) | {"bias": randn(17, 19)}
    assert_wanted_gradients_only("attention", tensors, {"enable_gqa": True}, backend_isa)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "everything", "padding_all"])
def test_lse_and_weights(backend_isa, mask, return_weights):
    tensors, options = case("mqa", mask, torch.float32)
    options |= {"return_lse": True, "return_weights": return_weights}
    found = ops.attention(**tensors, **options, backend=backend_isa)
    wanted = ops.attention(**{n: x.double() for n, x in tensors.items()}, **options, backend="reference")
    assert len(found) == 2 + return_weights
    assert found[1].dtype == torch.float32
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_gradients_through_lse_and_weights():
    tensors = qkv(1, 2, 1, 5, 6, 4, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(q, k, v):
        return ops.attention(q, k, v, is_causal=True, enable_gqa=True, return_lse=True, return_weights=True)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.5},
        {"attn_mask": "bool"},
        {"attn_mask": "float"},
        {"attn_mask": "row"},
        {"enable_gqa": True},
    ],
    ids=lambda o: "-".join(map(str, o.items())) or "plain",
)
def test_drop_in_for_sdpa(options, dtype):
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = qkv(2, 4, heads, 17, 23, 16, 16, dtype=dtype).values()
    kinds = {"bool": dense(2, 1, 17, 23), "float": randn(17, 23, dtype=dtype), "row": dense(2, 1, 1, 23)}
    options = {n: kinds.get(x, x) if n == "attn_mask" else x for n, x in options.items()}
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    bound = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ops.attention(q, k, v, **options), wanted, **bound)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 2)], ids=str)
def test_leading_dimensions_as_in_sdpa(lead):
    q, k, v = randn(*lead, 7, 8), randn(*lead, 9, 8), randn(*lead, 9, 5)
    torch.testing.assert_close(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    mask = dense(7, 9)
    torch.testing.assert_close(ops.attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


def test_positional_arguments_are_those_of_sdpa():
    q, k, v = qkv(1, 2, 2, 5, 5, 4, 4).values()
    wanted = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.2)
    torch.testing.assert_close(ops.attention(q, k, v, None, 0.0, True, 0.2), wanted)


def test_masks_objects_equal_their_arguments(backend_isa):
    q, k, v = qkv(2, 2, 2, 33, 40, 16, 16).values()
    keep = dense(2, 40)
    lengths = torch.tensor([33, 40])
    same = [
        ({"attn_mask": masks.causal()}, {"is_causal": True}),
        ({"attn_mask": masks.causal("bottom_right")}, {"is_causal": True, "causal_align": "bottom_right"}),
        ({"attn_mask": masks.window(4)}, {"window": 4}),
        ({"attn_mask": masks.padding(lengths)}, {"key_lengths": lengths}),
        ({"attn_mask": masks.padding(keep)}, {"attn_mask": keep[:, None, None]}),
        ({"attn_mask": masks.causal() & masks.padding(keep)}, {"is_causal": True, "attn_mask": keep[:, None, None]}),
    ]
    for left, right in same:
        found = [ops.attention(q, k, v, **options, backend=backend_isa) for options in (left, right)]
        assert torch.equal(*found), (left, right)


def test_dropout_of_the_reference():
    q, k, v = qkv(2, 2, 2, 33, 35, 16, 16).values()
    p = 0.4
    out, weights = ops.attention(q, k, v, dropout_p=p, seed=9, return_weights=True)
    _, whole = ops.attention(q, k, v, return_weights=True)
    wanted = whole * reference.dropout_multiplier(whole.shape, torch.tensor([9, 0]), p, whole.dtype)
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(out, wanted @ v)
    assert torch.equal(out, ops.attention(q, k, v, dropout_p=p, seed=9))
    assert not torch.equal(out, ops.attention(q, k, v, dropout_p=p, seed=10))
    assert not ops.attention(q, k, v, dropout_p=1.0).any()


def test_softcap_of_the_reference():
    q, k, v = qkv(1, 2, 2, 9, 11, 8, 8, dtype=torch.float64).values()
    scores = 2.0 * torch.tanh(q @ k.mT / math.sqrt(8) / 2.0)
    torch.testing.assert_close(ops.attention(q, k, v, softcap=2.0), scores.softmax(-1) @ v)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "bias_per_head", "bool_full"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference(mask, dropout_p):
    B, H, G, T, S, D, Dv = sizes = (2, 2, 1, 4, 5, 3, 2)
    options = MASKS[mask](B, H, T, S)
    tensors = qkv(*sizes, dtype=torch.float64)
    if "bias" in options:
        tensors["bias"] = options.pop("bias").double()
    options |= {"softcap": 3.0, "dropout_p": dropout_p, "seed": 4, "enable_gqa": True}
    gradcheck("attention", tensors, options, twice=dropout_p == 0)


def test_gradcheck_of_the_library_op_on_the_reference():
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 4, 5, 3, 2, dtype=torch.float64).values()]
    bias = randn(1, 2, 1, 5, dtype=torch.float64).requires_grad_()
    keep = dense(1, 1, 4, 5).expand(1, 2, 4, 5)

    def function(q, k, v, b):
        numbers = (None, 0, 0.5, 0.0, 0.0)
        return _op.library_forward(q, k, v, keep, b, None, None, *numbers, None, *UNPACKED, "reference")[0]

    assert torch.autograd.gradcheck(function, (*leaves, bias))


def test_double_backward(backend_isa):
    def second(backend, dtype):
        torch.manual_seed(5)
        leaves = [x.to(dtype).requires_grad_() for x in qkv(1, 2, 1, 5, 6, 8, 8).values()]
        out = ops.attention(*leaves, is_causal=True, enable_gqa=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for actual, wanted in zip(second(backend_isa, torch.float32), second("reference", torch.float64), strict=True):
        torch.testing.assert_close(actual, wanted, check_dtype=False, rtol=1e-3, atol=1e-4)


def test_what_the_cuda_kernels_do_not_serve():
    pytest.importorskip("pytransformer._cuda", reason="the CUDA module is not built")
    from pytransformer.backends.cuda import attention as adapter

    def reason(dtype=torch.bfloat16, D=64, bias=None, T=2, table=None):
        q = torch.empty(1, 1, T, D, dtype=dtype)
        return adapter.why_not(q, q, q, None, bias, None, None, None, None, 1.0, 0.0, 0.0, table)

    assert reason() is None
    assert reason(torch.float16, 256, torch.empty(1, 1, 2, 2)) is None
    assert reason(torch.float32) == "it takes float16 and bfloat16, not torch.float32; Triton's kernels serve float32"
    assert reason(D=257) == "head dims go up to 256, got 257 and 257"
    assert reason(bias=torch.empty(2, dtype=torch.float16)) == (
        "bias must be float32 or torch.bfloat16, not torch.float16"
    )
    table = torch.zeros(1, 1, dtype=torch.int32)
    assert reason(T=64, table=table) is None
    assert reason(T=65, table=table) == "pages are read for up to 64 queries a key head, not 65"
    assert reason(D=36, table=table) == "in pages head dims must be multiples of 8, got 36 and 36"


Q = torch.ones(2, 4, 5, 8)
K = torch.ones(2, 4, 7, 8)
GOOD = {"query": Q, "key": K, "value": K}
NAN = float("nan")
NESTED = torch.nested.nested_tensor([torch.ones(5, 8), torch.ones(7, 8)], layout=torch.jagged)
BAD = [
    ({"query": None}, TypeError, "query must be a tensor, got NoneType None"),
    ({"query": Q.int()}, TypeError, "query must be a floating-point tensor, got int32 [2, 4, 5, 8]"),
    ({"query": Q.to_sparse()}, TypeError, "query must be a dense tensor, got torch.sparse_coo of float32 [2, 4, 5, 8]"),
    ({"query": NESTED}, TypeError, "query must not be a nested tensor; pass its values(), the sequences end to end"),
    ({"query": torch.ones(8)}, ValueError, "query must be [B,H,T,D], got float32 [8]"),
    ({"key": K.double()}, TypeError, "key must have query's dtype torch.float32, got float64"),
    ({"key": torch.ones(2, 4, 7, 9)}, ValueError, "key must be [B,G,S,D] = [2, 4, 7, 8], got float32 [2, 4, 7, 9]"),
    ({"key": torch.ones(3, 4, 7, 8)}, ValueError, "key must be [B,G,S,D] = [2, 4, 7, 8], got float32 [3, 4, 7, 8]"),
    (
        {"value": torch.ones(2, 4, 6, 8)},
        ValueError,
        "value must be [B,G,S,Dv] = [2, 4, 7, 8], got float32 [2, 4, 6, 8]",
    ),
    ({"value": K.to("meta")}, ValueError, "value must be on query's device cpu, got float32 [2, 4, 7, 8] on meta"),
    ({"key": K[:, :2], "value": K[:, :2]}, ValueError, "key must have query's 4 heads, got 2; pass enable_gqa=True"),
    (
        {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True},
        ValueError,
        "query's heads must be a multiple of key's, got 4 and 3",
    ),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability in [0, 1], got -0.1"),
    ({"scale": NAN}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": "x"}, ValueError, "scale must be a finite number, got 'x'"),
    ({"softcap": -2.0}, ValueError, "softcap must not be negative, got -2.0"),
    ({"softcap": math.inf}, ValueError, "softcap must be a finite number, got inf"),
    ({"causal_align": "left"}, ValueError, "causal_align must be one of 'top_left', 'bottom_right'; got 'left'"),
    ({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be bool or floating point, got int32 [5, 7]"),
    (
        {"attn_mask": torch.ones(5, 6).bool()},
        ValueError,
        "attn_mask must broadcast to [B,H,T,S] = [2, 4, 5, 7], got bool [5, 6]",
    ),
    ({"attn_mask": torch.ones(1, 2, 4, 5, 7)}, ValueError, "attn_mask must broadcast to [B,H,T,S]"),
    ({"attn_mask": "causal"}, TypeError, "attn_mask must be a tensor, a Mask or None, got str 'causal'"),
    ({"attn_mask": torch.ones(5, 7, device="meta")}, ValueError, "must be on query's device cpu, got float32 [5, 7]"),
    ({"attn_mask": torch.ones(5, 7, device="meta").bool()}, ValueError, "attn_mask must be on query's device cpu"),
    ({"attn_mask": masks.padding(torch.ones(2, 9).bool())}, ValueError, "attn_mask must broadcast to [B,H,T,S]"),
    ({"bias": torch.ones(2, 7)}, ValueError, "bias must broadcast to [B,H,T,S] = [2, 4, 5, 7], got float32 [2, 7]"),
    ({"bias": torch.ones(5, 7).bool()}, TypeError, "bias must be a floating-point tensor, got bool [5, 7]"),
    ({"window": -1}, ValueError, "window must be a non-negative integer, a pair of them or None, got -1"),
    ({"window": (1, 2, 3)}, ValueError, "window must be a non-negative integer, a pair of them or None, got (1, 2, 3)"),
    ({"key_lengths": [3, 4]}, TypeError, "key_lengths must be a tensor, got list [3, 4]"),
    ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be integer [B], got float32 [2]"),
    ({"key_lengths": torch.tensor([3, 4, 5])}, ValueError, "key_lengths must broadcast to [B] = [2], got int64 [3]"),
    ({"dropout_p": 0.5, "seed": "x"}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
def test_bad_input(change, error, message):
    assert_rejects(ops.attention, {**GOOD, **change}, error, message)
