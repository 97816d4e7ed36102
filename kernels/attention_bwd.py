"""Attention, backward: the weights are made again, tile by tile, from the scores and the lse.

    P = exp(scores - lse);  dV = P^T dOut;  dP = dOut V^T;  dS = P * (dP - delta);  dQ = dS K;  dK = dS^T Q

with delta = sum(dOut * out) of each row. Two kernels, each of which owns what it adds up: one walks over the key
blocks of a query block for dQ, the other over the query blocks of a key block, of all query heads that share it, for
dK and dV. That is seven products where one kernel would do with five, and no atomics: the same bits in every run.
The second holds its tiles transposed, [S,T], so that P^T and dS^T are left operands as they stand.

The gradient of a bias is dS summed over the dimensions that the bias is broadcast in, by a third kernel whose
programs own a tile of the bias and walk over everything that saw it, in a fixed order.

As in the forward, what a partial tile hides may be NaN, which a weight of 0 does not hide: a program that finds a NaN
in its result walks once more, and cleans what it multiplies. (Where there are no registers for that, the only walk
does.)

Source: Dao et al., "FlashAttention", 2022, algorithm 4; Dao, "FlashAttention-2", 2023, section 3.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._attention import (
    any_nan,
    exponential,
    finite,
    head_start,
    keep_weights,
    key_blocks,
    listed_block,
    output_tile,
    partial_block,
    place,
    query_blocks,
    scores,
    sequence,
    visible,
)
from pytransformer.kernels._common import dot, dropout_threshold, load, load_tile, register_limit, rounded, store
from pytransformer.kernels.attention import (
    LENGTHS,
    Masking,
    Softmax,
    bias_strides,
    heads_like,
    mask_arguments,
    outer_strides,
    rows_together,
    sequence_arguments,
    shape_class,
    shape_of,
    walks_twice,
)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    dout_ptr, out_ptr, delta_ptr, stride_db, stride_dh, stride_dt, H, T,
    Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``delta = sum(dout * out)`` of each row of [B,H,T]; out lies as [B,T,H,Dv]."""
    n_blocks = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    t0 = tl.program_id(0) % n_blocks * BLOCK_T
    t, dv = t0 + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_DV)[None, :]
    mask = (t < T)[:, None] & (dv < Dv)
    batch, head = row // H, row % H
    dout_ptr += (batch * stride_db + head * stride_dh) * UNIT
    dout = load(dout_ptr + t[:, None] * stride_dt + dv, mask)
    out = load(output_tile(out_ptr, batch, head, t0, T, H, None, Dv, BLOCK_T) + dv, mask)
    tl.store(delta_ptr + row * T + t, tl.sum(dout * out, 1), mask=t < T)


@triton.jit
def _score_gradient(
    product, dp, t, s, t0, s0, row, lse, delta, bias_ptr, bits_ptr, rng_ptr,
    stride_bias_t, stride_bias_s, stride_bits, stride_word,
    T, S, length, lower, upper, scale, softcap, threshold, keep_scale,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, CAREFUL: tl.constexpr,
    RAW: tl.constexpr, SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """``(P after dropout, dS, d product)`` of a tile; dS is the gradient of the bias.

    ``CAREFUL``, nothing comes of what a mask hides, else P alone is 0 there, and where NaN or Inf meets it, NaN.
    """
    x, th = scores(product, t, s, T, S, scale, softcap, bias_ptr, stride_bias_t, stride_bias_s, RAW, SOFTCAP)
    p = exponential(x, tl.where(lse == float("-inf"), 0.0, lse), scale, RAW)
    if MASKED:
        first = t0 if TRANSPOSED else s0
        keep = visible(t, s, first, T, S, length, lower, upper, bits_ptr, stride_bits, stride_word, BOUNDED, TRANSPOSED)
        p = tl.where(keep, p, 0.0)
        if CAREFUL:
            dp = tl.where(keep, dp, 0.0)
    dropped = p
    if rng_ptr is not None:
        kept = keep_weights(rng_ptr, row, s0, t0, T, S, threshold, BLOCK_T, BLOCK_S, OCTETS, TRANSPOSED)
        dropped, dp = tl.where(kept, p * keep_scale, 0.0), tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    dproduct = ds
    if SOFTCAP:
        dproduct = ds * (1.0 - th * th)
    if MASKED and CAREFUL:  # the tanh of a score that nobody sees may be NaN
        dproduct = tl.where(keep, dproduct, 0.0)
    return dropped, ds, dproduct


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
    stride_ks, stride_vs, stride_bias_t, stride_bias_s, stride_bits_t,
    T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, CAREFUL: tl.constexpr,
    RAW: tl.constexpr, SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one key block adds to dQ; ``CAREFUL``, keys behind a mask may be NaN or Inf."""
    s0 = block * BLOCK_S
    t, s = (t0 + tl.arange(0, BLOCK_T))[:, None], (s0 + tl.arange(0, BLOCK_S))[None, :]
    d, dv = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_DV)[:, None]
    k = load_tile(k_ptr + s * stride_ks + d, s < keys, d < D, MASKED, D == BLOCK_D)
    v = load_tile(v_ptr + s * stride_vs + dv, s < keys, dv < Dv, MASKED, Dv == BLOCK_DV)
    _, _, ds = _score_gradient(
        dot(q, k, PRECISION), dot(dout, v, PRECISION), t, s, t0, s0, row, lse[:, None], delta[:, None],
        bias_ptr, bits_ptr, rng_ptr, stride_bias_t, stride_bias_s, stride_bits_t, 1,
        T, S, length, lower, upper, scale, softcap, threshold, keep_scale,
        BLOCK_T, BLOCK_S, MASKED, BOUNDED, CAREFUL, RAW, SOFTCAP, OCTETS, False,
    )  # fmt: skip
    if CAREFUL:
        k = finite(k)
    return dq + dot(rounded(ds, k.dtype), tl.trans(k), PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, rng_ptr, bits_ptr, list_ptr, cu_q_ptr, cu_k_ptr,
    dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_bits_b, stride_bits_h, stride_bits_t, stride_list_b, stride_list_h, stride_list_t,
    H, T, S, section, n_inner, tokens, at_end, lower, upper, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDED: tl.constexpr, TWICE: tl.constexpr, RAW: tl.constexpr,
    SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(T, BLOCK_T)
    row, served = place(n_blocks, section)
    block_t = n_blocks - 1 - served
    batch, head = row // H, row % H
    t0 = block_t * BLOCK_T
    t, d, dv = t0 + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    queries, keys = T, S  # of this sequence
    q_begin = None
    if cu_q_ptr is not None:
        q_begin, queries, k_begin, keys, lower, upper = sequence(cu_q_ptr, cu_k_ptr, batch, lower, upper, at_end)
        keys = tl.where(t0 < queries, keys, 0)  # a block beyond the end has nothing to do
        q_ptr += q_begin * stride_qt
        dout_ptr += q_begin * stride_dt
        k_ptr += k_begin * stride_ks
        v_ptr += k_begin * stride_vs
    inside = (t < queries)[:, None]
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    dout_ptr += (batch * stride_db + head * stride_dh) * UNIT
    q = tl.load(q_ptr + t[:, None] * stride_qt + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    dout = tl.load(dout_ptr + t[:, None] * stride_dt + dv[None, :], mask=inside & (dv < Dv)[None, :], other=0.0)
    first = head_start(row, head, T, tokens, q_begin)
    lse = tl.load(lse_ptr + first + t, mask=t < queries, other=0.0)
    delta = tl.load(delta_ptr + first + t, mask=t < queries, other=0.0)
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

    dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in range(n_full):
        block = tl.load(list_ptr + 2 + i) if bits_ptr is not None else full_start + i
        dq = _add_dq(
            dq, q, dout, lse, delta, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
            T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
            D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, False, BOUNDED, False, RAW, SOFTCAP, OCTETS, PRECISION,
        )  # fmt: skip
    for i in range(n_partial):
        if bits_ptr is not None:
            block = tl.load(list_ptr + 1 + n_inner - i)
        else:
            block = partial_block(i, start, full_start, full_end)
        dq = _add_dq(
            dq, q, dout, lse, delta, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
            T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
            D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, not TWICE, RAW, SOFTCAP, OCTETS, PRECISION,
        )  # fmt: skip
    if TWICE and any_nan(dq):
        dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for i in tl.range(n_full + n_partial, num_stages=1):
            block = listed_block(i, n_full, n_inner, list_ptr, start, full_start, full_end)
            dq = _add_dq(
                dq, q, dout, lse, delta, block, row, t0, k_ptr, v_ptr, bias_ptr, bits_ptr, rng_ptr,
                stride_ks, stride_vs, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t,
                T, S, keys, length, lower, upper, scale, softcap, threshold, keep_scale,
                D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, True, RAW, SOFTCAP, OCTETS, PRECISION,
            )  # fmt: skip
    at = output_tile(dq_ptr, batch, head, t0, T, H, q_begin, D, BLOCK_T) + d[None, :]
    store(at, dq * scale, inside & (d < D)[None, :])


@triton.jit
def _add_dkv(
    dk, dv_total, k, v, number, row, s0, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, bits_ptr, rng_ptr,
    stride_qh, stride_qt, stride_dh, stride_dt, stride_lse, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_bits_h, stride_bits_s,
    T, S, queries, length, lower, upper, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, STRIDE_WORD: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, CAREFUL: tl.constexpr,
    RAW: tl.constexpr, SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query block adds to dK and dV: ``number`` counts the group's heads of a block, then the blocks.

    Queries beyond the last are loaded as 0 and add nothing; ``CAREFUL``, those that do not see a key may be NaN or Inf.
    """
    block, member = number // GROUP, number % GROUP
    if GROUP > 1:
        row += member
        q_ptr += member.to(tl.int64) * stride_qh
        dout_ptr += member.to(tl.int64) * stride_dh
        lse_ptr += member * stride_lse
        delta_ptr += member * stride_lse
        if bias_ptr is not None:
            bias_ptr += member.to(tl.int64) * stride_bias_h
        if bits_ptr is not None:
            bits_ptr += member.to(tl.int64) * stride_bits_h
    t0 = block * BLOCK_T
    t, s = (t0 + tl.arange(0, BLOCK_T))[None, :], (s0 + tl.arange(0, BLOCK_S))[:, None]
    d, dv = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_DV)[None, :]
    inside = t < queries
    q = load_tile(q_ptr + t * stride_qt + d, inside, d < D, True, D == BLOCK_D)  # [D,T]
    rows = tl.trans(t)
    dout = load_tile(dout_ptr + rows * stride_dt + dv, rows < queries, dv < Dv, True, Dv == BLOCK_DV)  # [T,Dv]
    lse = tl.load(lse_ptr + t, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + t, mask=inside, other=0.0)
    p, _, ds = _score_gradient(
        dot(k, q, PRECISION), dot(v, tl.trans(dout), PRECISION), t, s, t0, s0, row, lse, delta,
        bias_ptr, bits_ptr, rng_ptr, stride_bias_t, stride_bias_s, stride_bits_s, STRIDE_WORD,
        T, S, length, lower, upper, scale, softcap, threshold, keep_scale,
        BLOCK_T, BLOCK_S, MASKED, BOUNDED, CAREFUL, RAW, SOFTCAP, OCTETS, True,
    )  # fmt: skip
    if CAREFUL:
        q = finite(q)
    dv_total += dot(rounded(p, dout.dtype), dout, PRECISION)
    return dk + dot(rounded(ds, q.dtype), tl.trans(q), PRECISION), dv_total


@triton.jit(do_not_specialize=LENGTHS)
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, rng_ptr, bits_ptr, list_ptr, cu_q_ptr, cu_k_ptr,
    dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_bits_b, stride_bits_h, stride_bits_s, stride_list_b, stride_list_h, stride_list_s,
    H, T, S, section, n_inner, tokens, at_end, lower, upper, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, STRIDE_WORD: tl.constexpr,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDED: tl.constexpr, TWICE: tl.constexpr, RAW: tl.constexpr,
    SOFTCAP: tl.constexpr, OCTETS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    shared, block_s = place(tl.cdiv(S, BLOCK_S), section)  # batch and key/value head
    batch, group = shared // (H // GROUP), shared % (H // GROUP)
    s0 = block_s * BLOCK_S
    s, d, dv = s0 + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    queries, keys = T, S  # of this sequence
    q_begin, k_begin = None, None
    if cu_q_ptr is not None:
        q_begin, queries, k_begin, keys, lower, upper = sequence(cu_q_ptr, cu_k_ptr, batch, lower, upper, at_end)
        queries = tl.where(s0 < keys, queries, 0)  # a block beyond the end has nothing to do
        q_ptr += q_begin * stride_qt
        dout_ptr += q_begin * stride_dt
        k_ptr += k_begin * stride_ks
        v_ptr += k_begin * stride_vs
    inside = (s < keys)[:, None]
    k_ptr += (batch * stride_kb + group * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + group * stride_vh) * UNIT
    k = tl.load(k_ptr + s[:, None] * stride_ks + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    v = tl.load(v_ptr + s[:, None] * stride_vs + dv[None, :], mask=inside & (dv < Dv)[None, :], other=0.0)
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    start, full_start, full_end, end = query_blocks(s0, queries, keys, length, lower, upper, BLOCK_T, BLOCK_S)
    start, full_start, full_end, end = start * GROUP, full_start * GROUP, full_end * GROUP, end * GROUP
    n_full, n_partial = full_end - full_start, full_start - start + end - full_end
    head = group * GROUP  # the first of those that share the keys
    row = batch * H + head
    first = head_start(row, head, T, tokens, q_begin)
    lse_ptr += first
    delta_ptr += first
    stride_lse = T if q_begin is None else tokens
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    dout_ptr += (batch * stride_db + head * stride_dh) * UNIT
    if bias_ptr is not None:
        bias_ptr += (batch * stride_bias_b + head * stride_bias_h) * BIAS_UNIT
    if bits_ptr is not None:
        bits_ptr += batch * stride_bits_b + head * stride_bits_h
        list_ptr += batch * stride_list_b + group * stride_list_h + block_s * stride_list_s
        n_full, n_partial = tl.load(list_ptr), tl.load(list_ptr + 1)

    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv_total = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for i in range(n_full):
        number = tl.load(list_ptr + 2 + i) if bits_ptr is not None else full_start + i
        dk, dv_total = _add_dkv(
            dk, dv_total, k, v, number, row, s0, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_qh * UNIT, stride_qt, stride_dh * UNIT, stride_dt, stride_lse,
            stride_bias_h * BIAS_UNIT, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_h, stride_bits_s,
            T, S, queries, length, lower, upper, scale, softcap, threshold, keep_scale,
            GROUP, STRIDE_WORD, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, False, BOUNDED, False, RAW, SOFTCAP,
            OCTETS, PRECISION,
        )  # fmt: skip
    for i in range(n_partial):
        if bits_ptr is not None:
            number = tl.load(list_ptr + 1 + n_inner - i)
        else:
            number = partial_block(i, start, full_start, full_end)
        dk, dv_total = _add_dkv(
            dk, dv_total, k, v, number, row, s0, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, bits_ptr, rng_ptr,
            stride_qh * UNIT, stride_qt, stride_dh * UNIT, stride_dt, stride_lse,
            stride_bias_h * BIAS_UNIT, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_h, stride_bits_s,
            T, S, queries, length, lower, upper, scale, softcap, threshold, keep_scale,
            GROUP, STRIDE_WORD, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, not TWICE, RAW, SOFTCAP,
            OCTETS, PRECISION,
        )  # fmt: skip
    if TWICE and any_nan(dk):
        dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        dv_total = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
        for i in tl.range(n_full + n_partial, num_stages=1):
            number = listed_block(i, n_full, n_inner, list_ptr, start, full_start, full_end)
            dk, dv_total = _add_dkv(
                dk, dv_total, k, v, number, row, s0, q_ptr, dout_ptr, lse_ptr, delta_ptr, bias_ptr, bits_ptr, rng_ptr,
                stride_qh * UNIT, stride_qt, stride_dh * UNIT, stride_dt, stride_lse,
                stride_bias_h * BIAS_UNIT, stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_h, stride_bits_s,
                T, S, queries, length, lower, upper, scale, softcap, threshold, keep_scale,
                GROUP, STRIDE_WORD, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_T, BLOCK_S, True, BOUNDED, True, RAW, SOFTCAP,
                OCTETS, PRECISION,
            )  # fmt: skip
    dk_at = output_tile(dk_ptr, batch, group, s0, S, H // GROUP, k_begin, D, BLOCK_S) + d[None, :]
    dv_at = output_tile(dv_ptr, batch, group, s0, S, H // GROUP, k_begin, Dv, BLOCK_S) + dv[None, :]
    store(dk_at, dk * scale, inside & (d < D)[None, :])
    store(dv_at, dv_total, inside & (dv < Dv)[None, :])


@triton.jit(do_not_specialize=[*LENGTHS, "BIAS_H", "loop_b", "loop_h", "loop_t"])
def dbias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, rng_ptr, bits_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    stride_bits_b, stride_bits_h, stride_bits_t,
    H, T, S, BIAS_H, loop_b, loop_h, loop_t, lower, upper, scale, softcap, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDED: tl.constexpr, RAW: tl.constexpr, SOFTCAP: tl.constexpr,
    OCTETS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, SUM_T: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient, summed over ``loop_b`` batches, ``loop_h`` heads and ``loop_t`` query blocks.

    Each loop runs over a dimension that the bias is broadcast in, or once. With ``SUM_T`` the result is one row.
    """
    block_s, block_t = tl.program_id(0), tl.program_id(1)
    bias_b, bias_h = (tl.program_id(2) // BIAS_H).to(tl.int64), (tl.program_id(2) % BIAS_H).to(tl.int64)
    s0 = block_s * BLOCK_S
    s, d, dv = s0 + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_DV)[:, None]
    keys = s[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for index in range(loop_b * loop_h * loop_t):
        batch, head = bias_b + index // (loop_h * loop_t), bias_h + index // loop_t % loop_h
        t0 = (block_t + index % loop_t) * BLOCK_T
        length = S
        if lengths_ptr is not None:
            length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
        row = batch * H + head
        t = t0 + tl.arange(0, BLOCK_T)
        queries = t[:, None]
        q_at = q_ptr + (batch * stride_qb + head * stride_qh) * UNIT + queries * stride_qt + tl.trans(d)
        q = tl.load(q_at, mask=(queries < T) & (tl.trans(d) < D), other=0.0)
        dout_at = dout_ptr + (batch * stride_db + head * stride_dh) * UNIT + queries * stride_dt + tl.trans(dv)
        dout = tl.load(dout_at, mask=(queries < T) & (tl.trans(dv) < Dv), other=0.0)
        k_at = k_ptr + (batch * stride_kb + head // GROUP * stride_kh) * UNIT + keys * stride_ks + d
        k = tl.load(k_at, mask=(keys < S) & (d < D), other=0.0)
        v_at = v_ptr + (batch * stride_vb + head // GROUP * stride_vh) * UNIT + keys * stride_vs + dv
        v = tl.load(v_at, mask=(keys < S) & (dv < Dv), other=0.0)
        lse = tl.load(lse_ptr + row * T + t, mask=t < T, other=0.0)
        delta = tl.load(delta_ptr + row * T + t, mask=t < T, other=0.0)
        bits_head = bits_ptr
        if bits_ptr is not None:
            bits_head = bits_ptr + batch * stride_bits_b + head * stride_bits_h
        _, ds, _ = _score_gradient(
            dot(q, k, PRECISION), dot(dout, v, PRECISION), queries, keys, t0, s0, row, lse[:, None], delta[:, None],
            bias_ptr + (batch * stride_bias_b + head * stride_bias_h) * BIAS_UNIT, bits_head, rng_ptr,
            stride_bias_t * BIAS_UNIT, stride_bias_s, stride_bits_t, 1,
            T, S, length, lower, upper, scale, softcap, threshold, keep_scale,
            BLOCK_T, BLOCK_S, True, BOUNDED, True, RAW, SOFTCAP, OCTETS, False,
        )  # fmt: skip
        total += tl.where(queries < T, ds, 0.0)
    owner = tl.program_id(2).to(tl.int64)
    if SUM_T:
        tl.store(dbias_ptr + owner * S + s, tl.sum(total, 0), mask=s < S)
    else:
        t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
        at = (owner * T + t)[:, None] * S + keys
        tl.store(dbias_ptr + at, total, mask=(t < T)[:, None] & (keys < S))


def attention_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    masks: Masking,
    softmax: Softmax,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, delta)``; the arguments are those of ``attention_fwd``, ``out`` and ``lse`` its results."""
    B, H, T, D = query.shape
    G, S, Dv = value.shape[1:]
    dq, dk, dv = heads_like(query, query, masks), *(heads_like(x, x, masks, of_keys=True) for x in (key, value))
    delta = torch.empty_like(lse)
    shape = shape_of(query, key, value)
    arch, widest = _configs.architecture(query.device), max(D, Dv)
    rows = 64 if Dv <= 128 else 32
    outer, unit = outer_strides(dout)
    delta_kernel[(triton.cdiv(lse.shape[2], rows) * lse.shape[0] * H,)](
        dout, out, delta, *outer, H, lse.shape[2],
        Dv=Dv, BLOCK_DV=shape["BLOCK_DV"], BLOCK_T=rows, UNIT=unit, num_warps=4,
    )  # fmt: skip
    outer, unit = outer_strides(query, key, value, dout)
    of_bias, bias_unit = bias_strides(masks.bias)
    offsets, counts = sequence_arguments(masks)
    for kernel, name, grads in ((dq_kernel, "dq", (dq,)), (dkv_kernel, "dkv", (dk, dv))):
        config = _configs.attention(name, query.dtype, widest, shape_class(masks, softmax), arch)
        block_t, block_s = config.tile
        by_keys = name == "dkv"
        group = shape["GROUP"] if by_keys else None
        most = 255 if masks.sequences is not None else 0
        limit = register_limit(arch, config.registers or most)
        bits = masks.bits_by_keys if by_keys else masks.bits
        pointers, strides, n_inner = mask_arguments(bits, masks.tiles(block_t, block_s, group))
        words = {"STRIDE_WORD": bits.stride_word if bits is not None else 1} if by_keys else {}
        owners, blocks = (B * G, triton.cdiv(S, block_s)) if by_keys else (B * H, triton.cdiv(T, block_t))
        read = T * (D + Dv) * shape["GROUP"] if by_keys else S * (D + Dv) // shape["GROUP"]
        section = rows_together(masks, owners, read * query.element_size(), query.device)
        kernel[(owners * blocks,)](
            query, key, value, masks.bias, masks.lengths, softmax.rng, *pointers, *offsets,
            dout, lse, delta, *grads,
            *outer, *of_bias, *strides,
            H, T, S, section, n_inner, *counts, masks.lower, masks.upper, softmax.scale, softmax.softcap,
            *dropout_threshold(softmax.dropout_p), **shape,
            BLOCK_T=block_t, BLOCK_S=block_s, BOUNDED=masks.bounded, TWICE=walks_twice(name, query, widest),
            UNIT=unit, BIAS_UNIT=bias_unit, **words, **softmax.flags(query, masks.bias, S), **limit, **config.options,
        )  # fmt: skip
    return dq, dk, dv, delta


def attention_dbias(
    bias_shape: torch.Size,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    masks: Masking,
    softmax: Softmax,
) -> Tensor:
    """The gradient of a bias of ``bias_shape`` [B or 1, H or 1, T or 1, S or 1], float32."""
    assert masks.bias is not None
    B, H, T, D = query.shape
    S, Dv = value.shape[2:]
    bias_b, bias_h, bias_t, bias_s = bias_shape
    config = _configs.attention("dq", query.dtype, max(D, Dv), "rich", _configs.architecture(query.device))
    block_t, block_s = config.tile
    n_t = triton.cdiv(T, block_t)
    sum_t = bias_t == 1
    dbias = torch.empty(bias_b, bias_h, 1 if sum_t else T, S, dtype=torch.float32, device=query.device)
    bits, bits_strides = (None, (0, 0, 0)) if masks.bits is None else (masks.bits.words, masks.bits.strides)
    outer, unit = outer_strides(query, key, value, dout)
    of_bias, bias_unit = bias_strides(masks.bias)
    dbias_kernel[(triton.cdiv(S, block_s), 1 if sum_t else n_t, bias_b * bias_h)](
        query, key, value, masks.bias, masks.lengths, softmax.rng, bits, dout, lse, delta, dbias,
        *outer, *of_bias, *bits_strides,
        H, T, S, bias_h, B // bias_b, H // bias_h, n_t if sum_t else 1, masks.lower, masks.upper,
        softmax.scale, softmax.softcap, *dropout_threshold(softmax.dropout_p), **shape_of(query, key, value),
        BLOCK_T=block_t, BLOCK_S=block_s, BOUNDED=masks.bounded, UNIT=unit, BIAS_UNIT=bias_unit, SUM_T=sum_t,
        **softmax.flags(query, masks.bias, S), **config.options,
    )  # fmt: skip
    return dbias.sum(3, keepdim=True) if bias_s == 1 and S > 1 else dbias
