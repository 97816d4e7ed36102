"""Attention of few queries over many keys (decoding with a cache): the keys are split among programs.

With one query a head there are only B x H programs for the forward kernel, too few to draw a GPU's bandwidth, and
each would read keys and values that the query heads of a group share once for each of them. Here a program takes all
queries of a group, GROUP x T rows of one tile, over one share of the keys; a second kernel weighs the shares' outputs
by exp(lse of the share - lse of all). Shares are added up in order: the same bits in every run.

Keys and values may lie in pages of a pool: the place of each key of a tile is looked up in a table, an integer for each
page. Sequences may also lie end to end, each read from where it begins. A table is often far wider than a sequence is
long, and others are longer: shares are then cut from the keys that are there.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "PagedAttention", 2023, sec. 4.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._attention import (
    cleaned,
    exponential,
    head_start,
    output_row,
    rows_of_sequence,
    scores,
    sequence,
    visible,
)
from pytransformer.kernels._common import dot, float32_precision, processors, register_limit, rounded, store
from pytransformer.kernels.attention import (
    LENGTHS,
    Masking,
    Softmax,
    bias_strides,
    heads_like,
    outer_strides,
    sequence_arguments,
    shape_of,
)

LARGEST_TILE = 64  # rows of queries; above, the forward kernel has work enough
SHORTEST = 512  # keys; below, there is nothing to split
MOST_SPLITS = 128


@triton.jit(do_not_specialize=[*LENGTHS, "share", "stride_table"])
def split_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, bits_ptr, table_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, stride_bits_b, stride_bits_h, stride_bits_t,
    stride_table, H, T, S, at_end, share, lower, upper, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Output [splits,B,H,T,Dv] and lse [splits,B,H,T], float32, of the queries of a group over one share of keys.

    With a table, keys and values are [pages,G,PAGE,D], and the band counts from the end of the sequence.
    """
    batch, group = (tl.program_id(1) // (H // GROUP)).to(tl.int64), (tl.program_id(1) % (H // GROUP)).to(tl.int64)
    r, d, dv = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = r < GROUP * T
    queries, keys = T, S  # of this sequence
    if cu_q_ptr is not None:
        q_begin, queries, k_begin, keys, lower, upper = sequence(cu_q_ptr, cu_k_ptr, batch, lower, upper, at_end)
        keys = tl.where(queries > 0, keys, 0)
        inside = inside & (r % T < queries)
        q_ptr += q_begin * stride_qt
        k_ptr += k_begin * stride_ks
        v_ptr += k_begin * stride_vs
    head, t = group * GROUP + r // T, (r % T)[:, None]
    q_at = q_ptr + (batch * stride_qb + head[:, None] * stride_qh) * UNIT + t * stride_qt + d[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if table_ptr is None:
        k_ptr += batch * stride_kb * UNIT
        v_ptr += batch * stride_vb * UNIT
    k_ptr += group * stride_kh * UNIT
    v_ptr += group * stride_vh * UNIT
    bias_row, bits_row = bias_ptr, bits_ptr
    if bias_ptr is not None:
        rows_head = tl.where(inside, head, 0)[:, None]
        bias_row = bias_ptr + (batch * stride_bias_b + rows_head * stride_bias_h) * BIAS_UNIT
    if bits_ptr is not None:
        bits_row = bits_ptr + batch * stride_bits_b + tl.where(inside, head, 0)[:, None] * stride_bits_h
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    first = tl.program_id(0) * share
    if table_ptr is not None:
        table_ptr += batch * stride_table
        lower += length - T
        upper += length - T
    if table_ptr is not None or cu_q_ptr is not None:
        start = tl.maximum(lower, 0) // BLOCK_S * BLOCK_S
        share = tl.cdiv(tl.cdiv(length - start, BLOCK_S), tl.num_programs(0)) * BLOCK_S
        first = start + tl.program_id(0) * share
    last = tl.minimum(tl.minimum(first + share, length), queries + upper)
    first = tl.maximum(first, tl.maximum(lower, 0) // BLOCK_S * BLOCK_S)

    total = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
    weight_sum = tl.zeros((BLOCK_R,), tl.float32)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for s0 in range(first, last, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        if table_ptr is not None:
            there = (s < length) & (s >= lower)
            page = tl.load(table_ptr + s // PAGE, mask=there, other=0).to(tl.int64)
            k_row = page * stride_kb * UNIT + s % PAGE * stride_ks
            v_row = page * stride_vb * UNIT + s % PAGE * stride_vs
        else:
            there = s < keys
            k_row, v_row = s * stride_ks, s * stride_vs
        k = tl.load(k_ptr + k_row[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_ptr + v_row[:, None] + dv[None, :], mask=there[:, None] & (dv < Dv)[None, :], other=0.0)
        s = s[None, :]
        product = dot(q, k, PRECISION)
        x, _ = scores(
            product, t, s, T, S, scale, softcap, bias_row, stride_bias_t * BIAS_UNIT, stride_bias_s, False, SOFTCAP
        )
        keep = visible(t, s, s0, T, S, length, lower, upper, bits_row, stride_bits_t, 1, True, False)
        x = tl.where(keep, x, float("-inf"))
        v, total = cleaned(v, keep, total)
        larger = tl.maximum(largest, tl.max(x, 1))
        pivot = tl.where(larger == float("-inf"), 0.0, larger)
        p = exponential(x, pivot[:, None], scale, False)
        rescale = tl.exp(largest - pivot)
        weight_sum = weight_sum * rescale + tl.sum(p, 1)
        total = total * rescale[:, None] + dot(rounded(p, v.dtype), v, PRECISION)
        largest = larger

    unseen = weight_sum == 0
    divisor = tl.where(unseen, 1.0, weight_sum)
    row = ((tl.program_id(0) * (tl.num_programs(1) // (H // GROUP)) + batch) * H + head) * T + r % T
    at = row[:, None] * Dv + dv[None, :]
    tl.store(out_ptr + at, total / divisor[:, None], mask=inside[:, None] & (dv < Dv)[None, :])
    tl.store(lse_ptr + row, tl.where(unseen, float("-inf"), largest + tl.log(divisor)), mask=inside)


@triton.jit(do_not_specialize=["N", "splits", "H", "T", "tokens"])
def combine_kernel(
    parts_ptr, parts_lse_ptr, cu_q_ptr, out_ptr, lse_ptr, N, splits, H, T, tokens,
    Dv: tl.constexpr, BLOCK_DV: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of [splits,N,Dv] and [splits,N] put together, ``BLOCK`` of the splits, at most ``MOST``, at a time.

    The rows are [B,H,T]; of sequences that lie end to end the results are those of the tokens.
    """
    row, dv = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_DV)
    t, head, batch = row % T, row // T % H, row // T // H
    begin = None
    if cu_q_ptr is not None:
        begin, queries = rows_of_sequence(cu_q_ptr, batch)
        if t >= queries:
            return
    out_row = output_row(batch, head, t, T, H, begin)
    lse_row = head_start(row // T, head, T, tokens, begin) + t
    every = tl.arange(0, MOST)
    all_lse = tl.load(parts_lse_ptr + every * N + row, mask=every < splits, other=float("-inf"))
    pivot = tl.max(all_lse, 0)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    total = tl.sum(tl.exp(all_lse - pivot), 0)
    out = tl.zeros((BLOCK_DV,), tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        lse = tl.load(parts_lse_ptr + split * N + row, mask=split < splits, other=float("-inf"))
        at = parts_ptr + (split[:, None] * N + row) * Dv + dv[None, :]
        parts = tl.load(at, mask=(split < splits)[:, None] & (dv < Dv)[None, :], other=0.0)
        out += tl.sum(parts * tl.exp(lse - pivot)[:, None], 0)
    store(out_ptr + out_row * Dv + dv, out / tl.where(total == 0, 1.0, total), dv < Dv)
    tl.store(lse_ptr + lse_row, tl.where(total == 0, float("-inf"), pivot + tl.log(total)))


def key_count(key: Tensor, block_table: Tensor | None) -> int:
    """How many keys a sequence can have."""
    return key.shape[2] * (1 if block_table is None else block_table.shape[1])


def splits_of(query: Tensor, key: Tensor, softmax: Softmax, block_table: Tensor | None = None) -> int:
    """Into how many shares the keys of a call should be split; 1 where the forward kernel should serve it."""
    B, H, T, _ = query.shape
    G, S = key.shape[1], key_count(key, block_table)
    if softmax.rng is not None or H // G * T > LARGEST_TILE or S < SHORTEST:
        return 1
    one_round, many_rounds = (triton.cdiv(n * processors(query.device), B * G) for n in (2, 16))
    # Programs that all run at once, or so many that it matters little how full the last round of them is.
    wanted = many_rounds if many_rounds * SHORTEST <= S else one_round
    return max(1, min(wanted, triton.cdiv(S, SHORTEST // 4), MOST_SPLITS))


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masking,
    softmax: Softmax,
    splits: int,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``attention_fwd``, without dropout, for at most ``LARGEST_TILE`` queries a group of heads.

    With ``block_table``, int32 [B,P] of unit stride, key and value are [pages,G,page,D], and a query stands at the end
    of its sequence.
    """
    B, H, T, D = query.shape
    G, _, Dv = value.shape[1:]
    S = key_count(key, block_table)
    arch = _configs.architecture(query.device)
    config = _configs.attention("decode", query.dtype, max(D, Dv), "rich", arch)
    (block_s,) = config.tile
    narrow = masks.sequences is not None and query.dtype != torch.float32
    limit = register_limit(arch, 255 if narrow or block_table is not None else 0)
    share = triton.cdiv(triton.cdiv(S, block_s), splits) * block_s
    splits = triton.cdiv(S, share)
    parts = torch.empty(splits, B, H, T, Dv, dtype=torch.float32, device=query.device)
    parts_lse = torch.empty(splits, B, H, T, dtype=torch.float32, device=query.device)
    bits, bits_strides = (None, (0, 0, 0)) if masks.bits is None else (masks.bits.words, masks.bits.strides)
    shape = shape_of(query, key, value)
    offsets, (tokens, at_end) = sequence_arguments(masks)
    outer, unit = outer_strides(query, key, value)
    of_bias, bias_unit = bias_strides(masks.bias)
    split_kernel[(splits, B * G)](
        query, key, value, masks.bias, masks.lengths, bits, block_table, *offsets, parts, parts_lse,
        *outer, *of_bias, *bits_strides,
        0 if block_table is None else block_table.stride(0),
        H, T, S, at_end, share, masks.lower, masks.upper, softmax.scale, softmax.softcap,
        **shape, BLOCK_R=_configs.power_of_2(H // G * T), BLOCK_S=block_s, SOFTCAP=softmax.softcap > 0,
        PRECISION=float32_precision(), UNIT=unit, BIAS_UNIT=bias_unit,
        PAGE=0 if block_table is None else key.shape[2], **limit, **config.options,
    )  # fmt: skip
    out = heads_like(query, value, masks)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=query.device)
    combine_kernel[(B * H * T,)](
        parts, parts_lse, offsets[0], out, lse, B * H * T, splits, H, T, tokens,
        Dv=Dv, BLOCK_DV=shape["BLOCK_DV"], MOST=MOST_SPLITS, BLOCK=16, num_warps=4,
    )  # fmt: skip
    return out, lse
