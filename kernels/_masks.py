"""Masks as the attention kernels read them: bits, and lists of the tiles that are not empty.

A bool mask is packed to one bit an element, its broadcast dimensions left out: 1/8 of the bytes, and one word
serves 32 keys. A tile of the scores is empty (never visited), full (no mask is looked at) or partial. For each block
of queries a list names its full and its partial key blocks; the backward of keys and values wants the transpose,
for each block of keys the query blocks. The band (causal, window) and the lengths are folded into the lists.

A list is a row of int32: the number of full blocks, the number of partial ones, then the full blocks from the front
and the partial ones from the back. A row is written by one program in a fixed order: the same bits in every run.
Where there is no bool mask, nothing is built: the kernels compute block ranges from the band and the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

OPEN = 2**30  # a side of a band that is not bounded
_LENGTHS = [
    *("H", "T", "S", "WORDS", "lower", "upper", "n_outer", "n_inner"),
    *(f"stride_{x}_{dim}" for x in ("mask", "bits") for dim in "bht"),
]  # no kernel is compiled anew for these


@triton.jit(do_not_specialize=_LENGTHS)
def pack_kernel(
    mask_ptr,
    bits_ptr,
    stride_mask_b,
    stride_mask_h,
    stride_mask_t,
    stride_mask_s,
    H,
    T,
    S,
    WORDS,
    BLOCK_T: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """bool [B,H,T,S] of any strides, as bytes, to int32 [B,H,T,WORDS]; bits beyond S are 0."""
    batch, head = (tl.program_id(2) // H).to(tl.int64), (tl.program_id(2) % H).to(tl.int64)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    s = (tl.program_id(1) * BLOCK_WORDS * 32 + tl.arange(0, BLOCK_WORDS * 32))[None, :]
    mask_ptr += batch * stride_mask_b + head * stride_mask_h
    keep = tl.load(
        mask_ptr + t.to(tl.int64) * stride_mask_t + s.to(tl.int64) * stride_mask_s, mask=(t < T) & (s < S), other=0
    )
    keep = tl.reshape(keep, (BLOCK_T, BLOCK_WORDS, 32)).to(tl.int32)
    words = tl.sum(keep << tl.arange(0, 32)[None, None, :], 2)
    word = (tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
    row = (tl.program_id(2).to(tl.int64) * T + t) * WORDS
    tl.store(bits_ptr + row + word, words, mask=(t < T) & (word < WORDS))


@triton.jit(do_not_specialize=_LENGTHS)
def list_tiles_kernel(
    bits_ptr,
    lengths_ptr,
    list_ptr,
    stride_bits_b,
    stride_bits_h,
    stride_bits_t,
    H,
    T,
    S,
    WORDS,
    lower,
    upper,
    n_outer,
    n_inner,
    BY_KEYS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of a list: the key blocks of a query block, or, ``BY_KEYS``, the query blocks of a key block."""
    outer, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    bits_ptr += batch.to(tl.int64) * stride_bits_b + head.to(tl.int64) * stride_bits_h
    list_ptr += (tl.program_id(1).to(tl.int64) * n_outer + outer) * (n_inner + 2)
    n_full, n_partial = 0, 0
    for inner in range(n_inner):
        t0 = (inner if BY_KEYS else outer) * BLOCK_T
        s0 = (outer if BY_KEYS else inner) * BLOCK_S
        t_last, s_last = tl.minimum(t0 + BLOCK_T, T) - 1, tl.minimum(s0 + BLOCK_S, S) - 1
        t = (t0 + tl.arange(0, BLOCK_T))[:, None]
        word = (s0 // 32 + tl.arange(0, max(BLOCK_S // 32, 1)))[None, :]
        words = tl.load(bits_ptr + t.to(tl.int64) * stride_bits_t + word, mask=(t < T) & (word < WORDS), other=0)
        if BLOCK_S < 32:  # a part of a word, its bits as if the others were like the highest
            words = words << (32 - BLOCK_S - s0 % 32) >> (32 - BLOCK_S)
        some = tl.max(tl.max((words != 0).to(tl.int32), 1), 0)
        every = tl.min(tl.min(((words == -1) | (t >= T)).to(tl.int32), 1), 0)
        empty = (some == 0) | (s0 >= length) | (s_last - t0 < lower) | (s0 - t_last > upper)
        full = (every == 1) & (s_last < length) & (s0 - t_last >= lower) & (s_last - t0 <= upper)
        full = full & (empty == 0)
        partial = (full == 0) & (empty == 0)
        tl.store(list_ptr + 2 + n_full, inner, mask=full)
        tl.store(list_ptr + 1 + n_inner - n_partial, inner, mask=partial)
        n_full += full.to(tl.int32)
        n_partial += partial.to(tl.int32)
    tl.store(list_ptr, n_full)
    tl.store(list_ptr + 1, n_partial)


@dataclass(frozen=True)
class Bits:
    """A packed mask: int32 [B or 1, H or 1, T or 1, words]."""

    words: Tensor
    T: int
    S: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, head and query; 0 where the mask is broadcast."""
        b, h, t = (
            0 if n == 1 else stride for n, stride in zip(self.words.shape, self.words.stride()[:3], strict=False)
        )
        return b, h, t


@dataclass(frozen=True)
class TileList:
    """Rows of ``list_tiles_kernel``, [B or 1, H or 1, outer blocks, 2 + inner blocks]."""

    rows: Tensor

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, head and outer block; 0 where one row serves all."""
        b, h, outer = (0 if n == 1 else x for n, x in zip(self.rows.shape, self.rows.stride()[:3], strict=False))
        return b, h, outer

    @property
    def n_inner(self) -> int:
        return int(self.rows.shape[3]) - 2


def pack(mask: Tensor) -> Bits:
    """bool [B,H,T,S], stride 0 where it is broadcast."""
    T, S = mask.shape[2:]
    for dim in range(3):
        if mask.stride(dim) == 0 or mask.shape[dim] == 1:
            mask = mask.narrow(dim, 0, 1)
    words = triton.cdiv(S, 32)
    bits = torch.empty(*mask.shape[:3], words, dtype=torch.int32, device=mask.device)
    block_t, block_words = (1, 16) if mask.shape[2] == 1 else (16, 2)
    grid = (triton.cdiv(mask.shape[2], block_t), triton.cdiv(words, block_words), mask.shape[0] * mask.shape[1])
    pack_kernel[grid](
        mask.view(torch.uint8), bits, *mask.stride(), mask.shape[1], mask.shape[2], S, words,
        BLOCK_T=block_t, BLOCK_WORDS=block_words, num_warps=4,
    )  # fmt: skip
    return Bits(bits, T, S)


def list_tiles(
    bits: Bits, lengths: Tensor | None, lower: int, upper: int, block_t: int, block_s: int, by_keys: bool
) -> TileList:
    """The lists of tiles of ``block_t`` x ``block_s``, by query blocks or ``by_keys``."""
    B, H, rows, words = bits.words.shape
    B = B if lengths is None else max(B, lengths.shape[0])
    n_t, n_s = triton.cdiv(bits.T, block_t), triton.cdiv(bits.S, block_s)
    n_outer, n_inner = (n_s, n_t) if by_keys else (n_t, n_s)
    if not by_keys and rows == 1 and lower <= -OPEN and upper >= OPEN:
        n_outer = 1  # all queries see the same keys
    found = torch.empty(B, H, n_outer, 2 + n_inner, dtype=torch.int32, device=bits.words.device)
    list_tiles_kernel[(n_outer, B * H)](
        bits.words, lengths, found, *bits.strides, H, bits.T, bits.S, words, lower, upper, n_outer, n_inner,
        BY_KEYS=by_keys, BLOCK_T=block_t, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    return TileList(found)
