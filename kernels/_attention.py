"""What the attention kernels share: which tiles a program visits, and the scores of one tile.

Positions ``t`` of queries and ``s`` of keys are given with the shape they have in the tile, [T,1] and [1,S] or, where
a kernel holds the tile transposed, [1,T] and [S,1]; everything here is elementwise and serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pytransformer.kernels._common import keep_columns, load

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Exact to some units in the last place, near 0 too: there a quotient of exponentials would cancel."""
    square = x * x
    series = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
    series = (series * square + 1.33314422036e-1) * square - 3.33332819422e-1
    small = series * square * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def rows_of_sequence(cu_seq_ptr, batch):
    """Of sequences that lie end to end, where one begins (int64) and how many rows it has."""
    begin = tl.load(cu_seq_ptr + batch)
    return begin.to(tl.int64), tl.load(cu_seq_ptr + batch + 1) - begin


@triton.jit
def sequence(cu_q_ptr, cu_k_ptr, batch, lower, upper, at_end):
    """Of a sequence where its queries begin, how many they are, the same of its keys, and the band of its own."""
    q_begin, queries = rows_of_sequence(cu_q_ptr, batch)
    k_begin, keys = rows_of_sequence(cu_k_ptr, batch)
    shift = (keys - queries) * at_end
    return q_begin, queries, k_begin, keys, lower + shift, upper + shift


@triton.jit
def place(n_blocks, section):
    """Which row, of all batches and heads, and which of its blocks, in the order that they are served in, is this
    program's: ``section`` rows at a time, of these all first blocks, then all second ones."""
    first = tl.program_id(0) // (n_blocks * section) * section
    inside = tl.program_id(0) - first * n_blocks
    rows = tl.minimum(tl.num_programs(0) // n_blocks - first, section)
    return (first + inside % rows).to(tl.int64), inside // rows


@triton.jit
def output_row(batch, head, t, T, H, begin):
    """Which row of a result [B,T,H] is that of query ``t`` of a head.

    ``begin`` is the first token of sequences that lie end to end, else None.
    """
    first = batch * T if begin is None else begin
    return (first + t) * H + head


@triton.jit
def output_tile(ptr, batch, head, t0, T, H, begin, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Pointers [ROWS,1] to the rows of ``WIDTH`` of a result [B,T,H,WIDTH] that are those of queries from ``t0`` on."""
    ptr += output_row(batch, head, t0, T, H, begin) * WIDTH
    return ptr + tl.arange(0, ROWS)[:, None] * (H * WIDTH)


@triton.jit
def head_start(row, head, T, tokens, begin):
    """Where the values of a head start that are one a query: in [B,H,T], or in [H,tokens]."""
    return row * T if begin is None else head * tokens + begin


@triton.jit
def key_blocks(t0, T, length, lower, upper, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of the key blocks that the queries from ``t0`` on see: the first, the first and the end of the full, the end."""
    t_last = tl.minimum(t0 + BLOCK_T, T) - 1
    start = tl.maximum(t0 + lower, 0) // BLOCK_S
    end = tl.cdiv(tl.maximum(tl.minimum(length, t_last + upper + 1), 0), BLOCK_S)
    end = tl.maximum(end, start)
    full_start = tl.cdiv(tl.maximum(t_last + lower, 0), BLOCK_S)
    full_end = tl.maximum(tl.minimum(length, t0 + upper + 1), 0) // BLOCK_S
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    return start, full_start, tl.minimum(tl.maximum(full_end, full_start), end), end


@triton.jit
def query_blocks(s0, T, S, length, lower, upper, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The same for the query blocks that see keys from ``s0`` on. Queries beyond T do not count: they weigh 0."""
    s_last = tl.minimum(s0 + BLOCK_S, S) - 1
    start = tl.maximum(s0 - upper, 0) // BLOCK_T
    end = tl.cdiv(tl.maximum(tl.minimum(T, s_last - lower + 1), 0), BLOCK_T)
    end = tl.maximum(end, start)
    full_start = tl.cdiv(tl.maximum(s_last - upper, 0), BLOCK_T)
    full_end = tl.maximum(tl.minimum(T, s0 - lower + 1), 0)
    full_end = tl.where(full_end == T, tl.cdiv(T, BLOCK_T), full_end // BLOCK_T)
    full_end = tl.where(s_last < length, full_end, start)
    end = tl.where(s0 < length, end, start)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    return start, full_start, tl.minimum(tl.maximum(full_end, full_start), end), end


@triton.jit
def partial_block(i, start, full_start, full_end):
    """The i-th of the blocks that are not full: those before the full ones, then those behind."""
    before = full_start - start
    return tl.where(i < before, start + i, full_end + i - before)


@triton.jit
def listed_block(i, n_full, n_inner, list_ptr, start, full_start, full_end):
    """The i-th of the blocks that are not empty, the full ones first; of a list, or of ranges where there is none."""
    if list_ptr is not None:
        block = tl.load(list_ptr + tl.where(i < n_full, 2 + i, 1 + n_inner - (i - n_full)))
    else:
        block = tl.where(i < n_full, full_start + i, partial_block(i - n_full, start, full_start, full_end))
    return block


@triton.jit
def visible(
    t, s, first, T, S, length, lower, upper, bits_ptr, stride_bits, stride_word,
    BOUNDED: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """May query t see key s? Unless ``BOUNDED``, the bits say all.

    Bits lie by queries, a word for 32 keys, or ``BY_KEYS`` by keys, a word for 32 queries: a row of the tile
    begins with number ``first``.
    """
    keep = (s >= t + lower) & (s < tl.minimum(length, t + upper + 1))
    if bits_ptr is not None:
        BLOCK: tl.constexpr = t.shape[1] if BY_KEYS else s.shape[1]
        row, rows, columns = (s, S, T) if BY_KEYS else (t, T, S)
        column = tl.reshape(tl.arange(0, BLOCK), t.shape if BY_KEYS else s.shape)
        at = bits_ptr + row.to(tl.int64) * stride_bits + first // 32 * stride_word
        aligned = first // 32 * 32
        word = tl.load(at, mask=row < tl.where(aligned < columns, rows, 0), other=0)
        for w in tl.static_range(1, BLOCK // 32):  # a load for each row and 32 columns, not for each element
            inside = row < tl.where(aligned + 32 * w < columns, rows, 0)
            word = tl.where(column < 32 * w, word, tl.load(at + w * stride_word, mask=inside, other=0))
        # Where the number of a bit is known to the compiler, testing it is one instruction.
        bit = (first + column) % 32 if BLOCK < 32 else column % 32
        seen = (word & (1 << bit)) != 0
        keep = keep & seen if BOUNDED else seen
    return keep


@triton.jit
def any_nan(x):
    """Is any element NaN?"""
    return tl.max((x != x).to(tl.int32)) > 0


@triton.jit
def scores(
    product,
    t,
    s,
    T,
    S,
    scale,
    softcap,
    bias_ptr,
    stride_bias_t,
    stride_bias_s,
    RAW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """``(x, th)``: the scores, and the tanh of the soft cap, which its gradient needs.

    ``RAW`` scores are the product itself, and ``exponential`` applies the scale: one multiply-add for each element.
    """
    th = product
    if RAW:
        x = product
    else:
        x = product * scale
        if SOFTCAP:
            th = tanh(x / softcap)
            x = th * softcap
        if bias_ptr is not None:
            at = t.to(tl.int64) * stride_bias_t + s.to(tl.int64) * stride_bias_s
            x += load(bias_ptr + at, (t < T) & (s < S))
    return x, th


@triton.jit
def exponential(x, pivot, scale, RAW: tl.constexpr):
    """exp(score - pivot); the pivot is that of true scores."""
    return tl.exp2(x * (scale * LOG2E) - pivot * LOG2E) if RAW else tl.exp2((x - pivot) * LOG2E)


@triton.jit
def keep_weights(
    rng_ptr, row, s0, t0, T, S, threshold,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, OCTETS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which attention weights of a tile dropout keeps, [T,S] or transposed; ``row`` is the head's first of all rows."""
    rows = (row * T + t0 + tl.arange(0, BLOCK_T))[:, None]  # int64
    keep = keep_columns(rng_ptr, rows, s0, S, threshold, BLOCK_S, OCTETS)
    return tl.trans(keep) if TRANSPOSED else keep


@triton.jit
def finite(x):
    """``x`` with 0 for NaN and infinities."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def cleaned(v, keep, total):
    """``(v, total)``: values with 0 for what is not finite, and NaN in the rows that are kept some of it."""
    sound = finite(v)
    poison = tl.max((sound.to(tl.float32) != v.to(tl.float32)).to(tl.int32), 1)
    poisoned = tl.max((keep & (poison[None, :] > 0)).to(tl.int32), 1)
    return sound, tl.where(poisoned[:, None] > 0, float("nan"), total)
