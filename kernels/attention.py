"""Masked softmax attention, forward: one pass over the keys with a running softmax.

A program owns a block of queries of one head and walks over the key blocks that these queries see, keeping the
largest score, the sum of exponentials and the weighted sum of values in registers: no score is ever stored, and
the traffic is q, k, v and out, with k and v read once for each block of queries, mostly from the L2 cache.

Full tiles come first and look at no mask; partial tiles follow (``_masks``, ``_attention.key_blocks``). In a partial
tile a key that some query does not see may hold NaN or Inf, for which a weight of 0 is not enough. That shows in the
result: where there is a NaN in it, the program walks once more, and carefully: values that are not finite are taken
out, and the queries that do see one become NaN. So values go from memory to the tensor cores as they are, and nothing
looks at them on the way. (Float32 and wide heads have no registers for two walks; the only one is careful then.) The
pivot of a row that has seen nothing is 0 instead of -inf, so that its weights come out as 0 and not NaN; its output is
0, its lse -inf.

Sequences may lie end to end (``Sequences``): T and S are then the longest, by which dropout counts, and a program
beyond the end of its sequence sees no key.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
2022, and "FlashAttention-2", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs, _masks
from pytransformer.kernels._attention import (
    any_nan,
    cleaned,
    exponential,
    head_start,
    keep_weights,
    key_blocks,
    listed_block,
    output_tile,
    partial_block,
    place,
    scores,
    sequence,
    visible,
)
from pytransformer.kernels._common import (
    dot,
    dropout_threshold,
    float32_precision,
    load_tile,
    register_limit,
    rounded,
    store,
)

# No kernel is compiled anew for these: numbers that are lengths, and strides that lengths are factors of. What a
# kernel must know of such a stride, that loads of 16 bytes stay aligned, comes as its unit: ``stride * UNIT``.
LENGTHS = [
    *("H", "T", "S", "section", "lower", "upper", "threshold", "n_inner", "tokens", "at_end"),
    *(f"stride_{x}{dim}" for x in "qkvd" for dim in "bh"),
    *(f"stride_bias_{dim}" for dim in "bht"),
    *(f"stride_bits_{dim}" for dim in "bhts"),
    *(f"stride_list_{dim}" for dim in "bhts"),
]
# Columns of a head of 16 bits for which a thread of each kernel has the registers of a second, careful walk.
MOST_TWICE = {"fwd": 128, "dq": 128, "dkv": 64}


@triton.jit
def _attend(
    total, weight_sum, largest, q, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
    stride_ks, stride_vs, stride_bias_t, stride_bias_s, stride_bits_t,
    T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, CAREFUL: tl.constexpr,
    RAW: tl.constexpr, SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes one key block into the running softmax; ``CAREFUL``, values behind a mask may be NaN or Inf."""
    s0 = block * BLOCK_S
    t, s = (t0 + tl.arange(0, BLOCK_T))[:, None], s0 + tl.arange(0, BLOCK_S)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = s < keys
    k_ptrs, v_ptrs = k_ptr + s[None, :] * stride_ks + d[:, None], v_ptr + s[:, None] * stride_vs + dv[None, :]
    k = load_tile(k_ptrs, inside[None, :], (d < D)[:, None], MASKED, D == BLOCK_D)
    v = load_tile(v_ptrs, inside[:, None], (dv < Dv)[None, :], MASKED, Dv == BLOCK_DV)
    s = s[None, :]
    x, _ = scores(
        dot(q, k, PRECISION), t, s, T, S, scale, softcap, bias_ptr, stride_bias_t, stride_bias_s, RAW, SOFTCAP
    )
    if MASKED:
        keep = visible(t, s, s0, T, S, length, lower, upper, bits_ptr, stride_bits_t, 1, BOUNDED, False)
        x = tl.where(keep, x, float("-inf"))
    if CAREFUL:
        v, total = cleaned(v, keep, total)
    larger = tl.maximum(largest, tl.max(x, 1) * scale if RAW else tl.max(x, 1))
    pivot = tl.where(larger == float("-inf"), 0.0, larger)
    p = exponential(x, pivot[:, None], scale, RAW)
    rescale = tl.exp2((largest - pivot) * 1.4426950408889634)
    weight_sum = weight_sum * rescale + tl.sum(p, 1)
    if rng_ptr is not None:
        kept = keep_weights(rng_ptr, row, s0, t0, T, S, threshold, BLOCK_T, BLOCK_S, OCTETS, False)
        p = tl.where(kept, p * keep_scale, 0.0)
    total = total * rescale[:, None] + dot(rounded(p, v.dtype), v, PRECISION)
    return total, weight_sum, larger


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, rng_ptr, bits_ptr, list_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_bits_b, stride_bits_h, stride_bits_t, stride_list_b, stride_list_h, stride_list_t,
    H, T, S, section, n_inner, tokens, at_end, lower, upper, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDED: tl.constexpr, TWICE: tl.constexpr, RAW: tl.constexpr,
    SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(T, BLOCK_T)
    row, served = place(n_blocks, section)  # batch and head
    block_t = n_blocks - 1 - served  # of a causal mask the long rows first
    batch, head = row // H, row % H
    t0 = block_t * BLOCK_T
    t, d = t0 + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    queries, keys = T, S  # of this sequence
    q_begin = None
    if cu_q_ptr is not None:
        q_begin, queries, k_begin, keys, lower, upper = sequence(cu_q_ptr, cu_k_ptr, batch, lower, upper, at_end)
        keys = tl.where(t0 < queries, keys, 0)  # a block beyond the end has nothing to do
        q_ptr += q_begin * stride_qt
        k_ptr += k_begin * stride_ks
        v_ptr += k_begin * stride_vs
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    q = tl.load(q_ptr + t[:, None] * stride_qt + d[None, :], mask=(t < queries)[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += (batch * stride_kb + head // GROUP * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head // GROUP * stride_vh) * UNIT
    if bias_ptr is not None:
        bias_ptr += (batch * stride_bias_b + head * stride_bias_h) * BIAS_UNIT
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    start, full_start, full_end, end = key_blocks(t0, queries, length, lower, upper, BLOCK_T, BLOCK_S)
    n_full, n_partial = full_end - full_start, full_start - start + end - full_end
    if bits_ptr is not None:
        bits_ptr += batch * stride_bits_b + head * stride_bits_h
        list_ptr += batch * stride_list_b + head * stride_list_h + block_t * stride_list_t
        n_full, n_partial = tl.load(list_ptr), tl.load(list_ptr + 1)

    total = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    weight_sum = tl.zeros((BLOCK_T,), tl.float32)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for i in range(n_full):
        block = tl.load(list_ptr + 2 + i) if bits_ptr is not None else full_start + i
        total, weight_sum, largest = _attend(
            total, weight_sum, largest, q, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
            T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
            D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, False, BOUNDED, False, RAW, SOFTCAP, OCTETS, PRECISION,
        )  # fmt: skip
    for i in range(n_partial):
        if bits_ptr is not None:
            block = tl.load(list_ptr + 1 + n_inner - i)
        else:
            block = partial_block(i, start, full_start, full_end)
        total, weight_sum, largest = _attend(
            total, weight_sum, largest, q, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
            T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
            D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, not TWICE, RAW, SOFTCAP, OCTETS, PRECISION,
        )  # fmt: skip
    if TWICE and any_nan(total):
        total = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
        weight_sum = tl.zeros((BLOCK_T,), tl.float32)
        largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        for i in tl.range(n_full + n_partial, num_stages=1):
            block = listed_block(i, n_full, n_inner, list_ptr, start, full_start, full_end)
            total, weight_sum, largest = _attend(
                total, weight_sum, largest, q, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
                stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
                T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
                D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, True, RAW, SOFTCAP, OCTETS, PRECISION,
            )  # fmt: skip

    unseen = weight_sum == 0
    out = total / tl.where(unseen, 1.0, weight_sum)[:, None]
    lse = tl.where(unseen, float("-inf"), largest + tl.log(tl.where(unseen, 1.0, weight_sum)))
    dv = tl.arange(0, BLOCK_DV)
    at = output_tile(out_ptr, batch, head, t0, T, H, q_begin, Dv, BLOCK_T) + dv[None, :]
    store(at, out, (t < queries)[:, None] & (dv < Dv)[None, :])
    tl.store(lse_ptr + head_start(row, head, T, tokens, q_begin) + t, lse, mask=t < queries)


def _version(x: Tensor | None) -> int:
    return 0 if x is None else x._version


class Sequences(NamedTuple):
    """Sequences that lie end to end, of which kernels take views [N,H,longest,D] that begin with the first of all.

    Attributes:
        cu_q, cu_k: int32 [N+1], contiguous: sequence n begins at row ``cu[n]`` and ends before ``cu[n + 1]``.
        total_q, total_k: the rows of all sequences.
        at_end: the band counts from the end of each sequence: ``lower <= s - (keys - queries + t) <= upper``.
    """

    cu_q: Tensor
    cu_k: Tensor
    total_q: int
    total_k: int
    at_end: bool


@dataclass(frozen=True)
class Masking:
    """Everything that hides scores or is added to them.

    Attributes:
        bits: a packed bool mask, or None.
        bias: any strides, expanded to [B,H,T,S], or None.
        lengths: int64 [B], or None.
        lower, upper: key s is visible to query t only if ``lower <= s - t <= upper``.
        packed: what was made of the bool mask before.
        sequences: those that lie end to end, without bits, bias and lengths; or None.
    """

    bits: _masks.Bits | None
    bias: Tensor | None
    lengths: Tensor | None
    lower: int
    upper: int
    packed: dict[Any, Any]
    sequences: Sequences | None = None

    @property
    def banded(self) -> bool:
        """Is the band bounded on a side?"""
        return self.lower > -_masks.OPEN or self.upper < _masks.OPEN

    @property
    def bounded(self) -> bool:
        """Does a partial tile have to ask for more than a query's bits: for the band and the lengths?"""
        return self.bits is None or self.lengths is not None or self.banded

    @property
    def bits_by_keys(self) -> _masks.Bits | None:
        """The bits transposed, as the backward of keys and values reads them."""
        if self.bits is not None and "bits by keys" not in self.packed:
            self.packed["bits by keys"] = _masks.by_keys(self.bits)
        return self.packed.get("bits by keys")

    def tiles(self, block_t: int, block_s: int, group: int | None = None) -> _masks.TileList | None:
        """The lists for tiles of this size, by queries, or by keys that ``group`` heads share; None where the kernels
        compute ranges instead."""
        if self.bits is None:
            return None
        key = self.lower, self.upper, block_t, block_s, group
        if key in self.packed:
            lengths, version, tiles = self.packed[key]
            if lengths is self.lengths and version == _version(lengths):
                return cast("_masks.TileList", tiles)
        tiles = _masks.list_tiles(self.bits, self.lengths, *key)
        if self.lengths is None or not self.lengths.is_inference():  # which has no version to tell a change by
            self.packed[key] = self.lengths, _version(self.lengths), tiles
        return tiles


def masking(
    mask: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    lower: int | None,
    upper: int | None,
    packed: dict[Any, Any] | None = None,
    sequences: Sequences | None = None,
) -> Masking:
    """From a bool mask and a bias, both expanded to [B,H,T,S], lengths and a band, or sequences and a band.

    ``packed`` belongs to this mask, and keeps what is made of it for the next call.
    """
    packed = {} if packed is None else packed
    if mask is not None and "bits" not in packed:
        packed["bits"] = _masks.pack(mask)
    return Masking(
        packed.get("bits"),
        bias,
        lengths,
        -_masks.OPEN if lower is None else max(lower, -_masks.OPEN),
        _masks.OPEN if upper is None else min(upper, _masks.OPEN),
        packed,
        sequences,
    )


@dataclass(frozen=True)
class Softmax:
    """How scores become weights; ``scale`` is positive, a ``softcap`` of 0 is none, ``rng`` is int64 [2] or None."""

    scale: float
    softcap: float
    dropout_p: float
    rng: Tensor | None

    def flags(self, query: Tensor, bias: Tensor | None, key_length: int) -> dict[str, Any]:
        """The constants of a kernel that depend on all this.

        ``OCTETS`` alone depends on a length, and only where there is dropout: eight neighbours share random words.
        """
        plain = bias is None and self.softcap == 0
        return {
            "RAW": plain and query.dtype != torch.float32,
            "SOFTCAP": self.softcap > 0,
            "OCTETS": self.rng is not None and key_length % 8 == 0,
            "PRECISION": float32_precision() if query.dtype == torch.float32 else "ieee",
        }


def shape_of(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    """The constants of a kernel that depend on the head dims."""
    D, Dv = query.shape[-1], value.shape[-1]
    arch = _configs.architecture(query.device)
    block_d, block_dv = (_configs.head_tile(size, query.dtype, arch) for size in (D, Dv))
    return {"GROUP": query.shape[1] // key.shape[1], "D": D, "Dv": Dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv}


def shape_class(masks: Masking, softmax: Softmax) -> str:
    """By what it takes registers for beyond a plain call's: "rich" with a bias, dropout or a soft cap, else "masked"
    with a bool mask, else "plain"."""
    if masks.bias is not None or softmax.rng is not None or softmax.softcap > 0:
        return "rich"
    return "plain" if masks.bits is None else "masked"


def walks_twice(kernel: str, query: Tensor, widest: int) -> bool:
    """Does a kernel look for NaN in its result instead of among what partial tiles hide? ``widest`` is of the heads."""
    return query.dtype != torch.float32 and widest <= MOST_TWICE[kernel]


def outer_strides(*tensors: Tensor) -> tuple[tuple[int, ...], int]:
    """``(strides, UNIT)``: of batch and head in units, then of the rows, tensor by tensor.

    With head dims that are multiples of 8 the unit is 8 whatever the lengths are: 16 bytes or more.
    """
    strides = [x.stride() for x in tensors]
    unit = 8 if all((batch | head) % 8 == 0 for batch, head, *_ in strides) else 1
    return tuple(n for batch, head, row, _ in strides for n in (batch // unit, head // unit, row)), unit


def bias_strides(bias: Tensor | None) -> tuple[tuple[int, ...], int]:
    """``(strides, BIAS_UNIT)``; those of batch, head and query are in units."""
    if bias is None:
        return (0, 0, 0, 0), 1
    *outer, last = bias.stride()
    unit = 4 if all(n % 4 == 0 for n in outer) else 1
    return (*(n // unit for n in outer), last), unit


def mask_arguments(
    bits: _masks.Bits | None, tiles: _masks.TileList | None
) -> tuple[tuple[Any, ...], tuple[int, ...], int]:
    """Pointers, strides and the width of a list, as kernels take them."""
    if bits is None or tiles is None:
        return (None, None), (0,) * 6, 0
    return (bits.words, tiles.rows), (*bits.strides, *tiles.strides), tiles.n_inner


def sequence_arguments(masks: Masking) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, int]]:
    """Where sequences that lie end to end begin, and the numbers ``tokens`` and ``at_end``, as kernels take them."""
    if masks.sequences is None:
        return (None, None), (0, 0)
    cu_q, cu_k, tokens, _, at_end = masks.sequences
    return (cu_q, cu_k), (tokens, int(at_end))


def rows_together(masks: Masking, rows: int, row_bytes: int, device: torch.device) -> int:
    """Of how many rows, batches and heads, the longest blocks are served first, then the second longest.

    Where blocks differ in length, row by row would leave the long blocks of the last row to run alone: a fifth of the
    time of 16 causal heads of 4,096 tokens on 132 multiprocessors. What these rows read, ``row_bytes`` each, has to
    stay in the L2 cache, of which this takes 5/8: FlashAttention-3 takes 32 MB of an H100's 50.
    """
    if masks.bits is None and not masks.banded:
        return 1
    return min(max(_configs.l2_bytes(device) * 5 // 8 // max(row_bytes, 1), 1), rows)


def heads_like(x: Tensor, columns: Tensor, masks: Masking, of_keys: bool = False) -> Tensor:
    """Room for [B,H,T] of ``x``, or [1,H,tokens], and the last dimension of ``columns``: a row a token."""
    B, H, T, _ = x.shape
    if masks.sequences is not None:
        B, T = 1, masks.sequences.total_k if of_keys else masks.sequences.total_q
    return x.new_empty(B, T, H, columns.shape[3]).transpose(1, 2)


def attention_fwd(query: Tensor, key: Tensor, value: Tensor, masks: Masking, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """``(out [B,H,T,Dv], lse float32 [B,H,T])`` of [B,H,T,D], [B,G,S,D], [B,G,S,Dv], any strides whose last is 1.

    Of sequences that lie end to end the results are those of all tokens, [1,H,tokens,Dv] and [1,H,tokens].
    """
    B, H, T, D = query.shape
    S, Dv = value.shape[2:]
    out = heads_like(query, value, masks)
    lse = query.new_empty(out.shape[:3], dtype=torch.float32)
    arch, widest = _configs.architecture(query.device), max(D, Dv)
    config = _configs.attention("fwd", query.dtype, widest, shape_class(masks, softmax), arch)
    most = 255 if query.dtype == torch.float32 or masks.sequences is not None else 0
    limit = register_limit(arch, config.registers or most)
    block_t, block_s = config.tile
    pointers, strides, n_inner = mask_arguments(masks.bits, masks.tiles(block_t, block_s))
    offsets, counts = sequence_arguments(masks)
    outer, unit = outer_strides(query, key, value)
    of_bias, bias_unit = bias_strides(masks.bias)
    section = rows_together(masks, B * H, S * (D + Dv) * key.element_size() * key.shape[1] // H, query.device)
    forward_kernel[(triton.cdiv(T, block_t) * B * H,)](
        query, key, value, masks.bias, masks.lengths, softmax.rng, *pointers, *offsets, out, lse,
        *outer, *of_bias, *strides,
        H, T, S, section, n_inner, *counts, masks.lower, masks.upper, softmax.scale, softmax.softcap,
        *dropout_threshold(softmax.dropout_p), **shape_of(query, key, value),
        BLOCK_T=block_t, BLOCK_S=block_s, BOUNDED=masks.bounded, TWICE=walks_twice("fwd", query, widest),
        UNIT=unit, BIAS_UNIT=bias_unit, **softmax.flags(query, masks.bias, S), **limit, **config.options,
    )  # fmt: skip
    return out, lse
