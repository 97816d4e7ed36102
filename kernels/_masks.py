"""Masks as the attention kernels read them: bits, and lists of the tiles that are not empty.

A bool mask is packed to one bit an element, its broadcast dimensions left out: 1/8 of the bytes, and one word
serves 32 keys. A tile of the scores is empty (never visited), full (no mask is looked at) or partial. For each block
of queries a list names its full and its partial key blocks; the backward of keys and values wants the transpose, for
each block of keys the query blocks of all heads that share them. The band (causal, window) and the lengths are folded
into the lists.

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

from pytransformer.kernels import _configs
from pytransformer.kernels._common import register_limit

OPEN = 2**30  # a side of a band that is not bounded
_TOGETHER = 2048  # words of a mask that a program has under way
_LENGTHS = [
    *("H", "T", "S", "WORDS", "lower", "upper", "n_outer", "n_blocks"),
    *(f"stride_{x}_{dim}" for x in ("mask", "bits") for dim in "bht"),
]  # no kernel is compiled anew for these


@triton.jit
def _octet_bits(octet):
    """Eight bools, a byte each, as the low eight bits of an int32, in order.

    Bit 8 i times bit 56 - 7 i of the factor is bit 56 + i, no two pairs of bits meet, and nothing is carried.
    """
    octet |= octet >> 4
    octet |= octet >> 2
    octet |= octet >> 1
    return ((octet & 0x0101010101010101) * 0x0102040810204080 >> 56).to(tl.int32) & 0xFF


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
    OCTETS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """bool [B,H,T,S] of any strides, as bytes, to int32 [B,H,T,WORDS]; bits beyond S are 0.

    ``OCTETS`` are read as int64, [B,H,T,S / 8].
    """
    UNIT: tl.constexpr = 8 if OCTETS else 1  # bits that a load brings
    UNITS: tl.constexpr = 32 // UNIT  # of a word
    batch, head = (tl.program_id(2) // H).to(tl.int64), (tl.program_id(2) % H).to(tl.int64)
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    unit = (tl.program_id(1) * BLOCK_WORDS * UNITS + tl.arange(0, BLOCK_WORDS * UNITS))[None, :]
    mask_ptr += batch * stride_mask_b + head * stride_mask_h
    at = mask_ptr + t.to(tl.int64) * stride_mask_t + unit.to(tl.int64) * stride_mask_s
    found = tl.load(at, mask=(t < T) & (unit * UNIT < S), other=0)
    bits = _octet_bits(found) if OCTETS else (found != 0).to(tl.int32)
    bits = tl.reshape(bits, (BLOCK_T, BLOCK_WORDS, UNITS)) << UNIT * tl.arange(0, UNITS)[None, None, :]
    word = (tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
    row = (tl.program_id(2).to(tl.int64) * T + t) * WORDS
    tl.store(bits_ptr + row + word, tl.sum(bits, 2), mask=(t < T) & (word < WORDS))


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
    n_blocks,
    BY_KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of a list: the key blocks of a query block, or, ``BY_KEYS``, the query blocks of a key block.

    ``CHUNK`` blocks are looked at together. Those by keys are of all ``GROUP`` heads that share the keys: block b of
    the group's head h is number ``b * GROUP + h``.
    """
    WIDTH: tl.constexpr = max(BLOCK_S // 32, 1)  # words of a tile's row
    outer, batch, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + batch), S).to(tl.int32)
    n_inner = n_blocks * GROUP
    bits_ptr += batch.to(tl.int64) * stride_bits_b + head.to(tl.int64) * GROUP * stride_bits_h
    list_ptr += (tl.program_id(1).to(tl.int64) * n_outer + outer) * (n_inner + 2)
    n_full, n_partial = 0, 0
    for start in range(0, n_inner, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        there = inner < n_inner
        block, member = inner // GROUP, inner % GROUP
        row_block, key_block = (
            (block, tl.zeros_like(block) + outer) if BY_KEYS else (tl.zeros_like(block) + outer, block)
        )
        t0, s0 = row_block * BLOCK_T, key_block * BLOCK_S
        t = t0[None, :, None] + tl.arange(0, BLOCK_T)[:, None, None]
        word = (s0 // 32)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
        at = bits_ptr + member.to(tl.int64)[None, :, None] * stride_bits_h
        mask = (t < T) & (word < WORDS) & there[None, :, None]
        words = tl.load(at + t.to(tl.int64) * stride_bits_t + word, mask=mask, other=0)
        if BLOCK_S < 32:  # a part of a word, its bits as if the others were like the highest
            words = words << (32 - BLOCK_S - s0 % 32)[None, :, None] >> (32 - BLOCK_S)
        some = tl.max(tl.max((words != 0).to(tl.int32), 0), 1)
        every = tl.min(tl.min(((words == -1) | (t >= T)).to(tl.int32), 0), 1)
        t_last, s_last = tl.minimum(t0 + BLOCK_T, T) - 1, tl.minimum(s0 + BLOCK_S, S) - 1
        seen = there & (some > 0) & (s0 < length) & (s_last - t0 >= lower) & (s0 - t_last <= upper)
        full = seen & (every > 0) & (s_last < length) & (s0 - t_last >= lower) & (s_last - t0 <= upper)
        partial = seen & (full == 0)
        fulls = n_full + tl.cumsum(full.to(tl.int32), 0)
        partials = n_partial + tl.cumsum(partial.to(tl.int32), 0)
        tl.store(list_ptr + 1 + fulls, inner, mask=full)
        tl.store(list_ptr + 2 + n_inner - partials, inner, mask=partial)
        n_full += tl.sum(full.to(tl.int32), 0)
        n_partial += tl.sum(partial.to(tl.int32), 0)
    tl.store(list_ptr, n_full)
    tl.store(list_ptr + 1, n_partial)


@triton.jit(do_not_specialize=_LENGTHS)
def transpose_kernel(
    bits_ptr, transposed_ptr, T, S, WORDS, BROADCAST: tl.constexpr, BLOCK_WORDS: tl.constexpr
):  # fmt: skip
    """Bits [heads,T,WORDS] to [heads,S,words of T]: a program makes ``BLOCK_WORDS`` words of 32 keys each.

    ``BROADCAST``, T is 1 and stands for all queries: a word is all ones or zeros.
    """
    words = tl.cdiv(T, 32)
    bits_ptr += tl.program_id(2).to(tl.int64) * T * WORDS + tl.program_id(0)
    s = (tl.program_id(0) * 32 + tl.arange(0, 32))[:, None]
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    t = (word[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
    found = tl.load(bits_ptr + t.to(tl.int64) * WORDS, mask=t < T, other=0)
    bit = (found >> tl.arange(0, 32)[:, None, None]) & 1  # [keys,words,queries]
    made = -tl.sum(bit, 2) if BROADCAST else tl.sum(bit << tl.arange(0, 32)[None, None, :], 2)
    row = (tl.program_id(2).to(tl.int64) * S + s) * words
    tl.store(transposed_ptr + row + word[None, :], made, mask=(s < S) & (word < words)[None, :])


@dataclass(frozen=True)
class Bits:
    """A packed mask: int32 [B or 1, H or 1, T or 1, words]; or the transpose, [B or 1, H or 1, S, words].

    A ``stride_word`` of 0 says that a word of the transpose serves all queries.
    """

    words: Tensor
    T: int
    S: int
    stride_word: int = 1

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of batch, head and row; 0 where the mask is broadcast."""
        b, h, row = (
            0 if n == 1 else stride for n, stride in zip(self.words.shape, self.words.stride()[:3], strict=False)
        )
        return b, h, row


@dataclass(frozen=True)
class TileList:
    """Rows of ``list_tiles_kernel``, [B or 1, heads, outer blocks, 2 + inner blocks].

    Heads are those of the queries, those of the keys, or 1.
    """

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
    units = _octets(mask)
    block_t, block_words = (1, 16) if mask.shape[2] == 1 else (16, 2)
    if units.dtype == torch.int64:
        block_words *= 4
    grid = (triton.cdiv(mask.shape[2], block_t), triton.cdiv(words, block_words), mask.shape[0] * mask.shape[1])
    pack_kernel[grid](
        units, bits, *units.stride(), mask.shape[1], mask.shape[2], S, words,
        OCTETS=units.dtype == torch.int64, BLOCK_T=block_t, BLOCK_WORDS=block_words, num_warps=4,
    )  # fmt: skip
    return Bits(bits, T, S)


def _octets(mask: Tensor) -> Tensor:
    """The bytes of ``mask``, in eights where its rows begin and end at multiples of eight."""
    units = mask.view(torch.uint8)
    S, last = units.shape[3], units.stride(3)
    outer = [0 if n == 1 else stride for n, stride in zip(units.shape[:3], units.stride(), strict=False)]
    units = units.as_strided(units.shape, (*outer, 1 if S == 1 else last))
    starts = (*outer, S, units.storage_offset(), units.data_ptr())
    return units.view(torch.int64) if last == 1 and all(n % 8 == 0 for n in starts) else units


def by_keys(bits: Bits) -> Bits:
    """The transpose of what ``pack`` returns."""
    B, H, T, words = bits.words.shape
    transposed = bits.words.new_empty(B, H, bits.S, triton.cdiv(T, 32))
    block_words = 1 if T == 1 else 8
    transpose_kernel[(words, triton.cdiv(triton.cdiv(T, 32), block_words), B * H)](
        bits.words, transposed, T, bits.S, words, BROADCAST=T == 1, BLOCK_WORDS=block_words, num_warps=4
    )
    return Bits(transposed, bits.T, bits.S, stride_word=int(T > 1))


def list_tiles(
    bits: Bits,
    lengths: Tensor | None,
    lower: int,
    upper: int,
    block_t: int,
    block_s: int,
    group: int | None,
) -> TileList:
    """The lists of tiles of ``block_t`` x ``block_s``: by query blocks, or by key blocks of ``group`` heads each."""
    by_keys = group is not None
    B, H, rows, words = bits.words.shape
    B = B if lengths is None else max(B, lengths.shape[0])
    n_t, n_s = triton.cdiv(bits.T, block_t), triton.cdiv(bits.S, block_s)
    n_outer, n_blocks = (n_s, n_t) if by_keys else (n_t, n_s)
    if not by_keys and rows == 1 and lower <= -OPEN and upper >= OPEN:
        n_outer = 1  # all queries see the same keys
    group = group or 1
    H = triton.cdiv(H, group)
    found = torch.empty(B, H, n_outer, 2 + n_blocks * group, dtype=torch.int32, device=bits.words.device)
    chunk = max(_TOGETHER // (block_t * max(block_s // 32, 1)), 1)
    list_tiles_kernel[(n_outer, B * H)](
        bits.words, lengths, found, *bits.strides, H, bits.T, bits.S, words, lower, upper, n_outer, n_blocks,
        BY_KEYS=by_keys, GROUP=group, BLOCK_T=block_t, BLOCK_S=block_s, CHUNK=chunk, num_warps=4,
        **register_limit(_configs.architecture(found.device), 128),
    )  # fmt: skip
    return TileList(found)
