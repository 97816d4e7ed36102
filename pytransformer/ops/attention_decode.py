"""attention_decode: the newest queries of each sequence against its cache of keys and values.

A cache in pages is read where it lies: the decode kernels of all backends look up the page of each stretch of keys in
the block table, and read nothing else. Gathering the pages beforehand would move every key and value three times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pytransformer.backends import note, select
from pytransformer.backends._arguments import unpaged
from pytransformer.ops._autocast import autocast_off
from pytransformer.ops._bands import check_window, shifted_band
from pytransformer.ops._checks import (
    check_device,
    check_floating,
    check_head_counts,
    check_like,
    check_shape,
    check_tensor,
    describe,
)
from pytransformer.ops._op import needs_grad, obstacle, plain_eager, recall, remember
from pytransformer.ops.attention import UNPACKED, attention, check_options, run
from pytransformer.reference.attention import gather_pages

_OP = "attention_decode"


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Causal ``attention`` with query t of sequence b at key ``cache_lengths[b] - T + t``.

    Args:
        query: [B,H,T,D], the newest T tokens, whose keys and values are in the cache already.
        key_cache: [B,G,S,D]; H a multiple of G. With ``block_table`` [pages,page,G,D], a pool of pages.
        value_cache: [B,G,S,Dv], or [pages,page,G,Dv].
        cache_lengths: integer [B], between T and S: how many tokens of each sequence the cache holds.
        block_table: integer [B,P], int32 at best: where page p of sequence b lies in the pool; S = P * page. Entries
            of keys that no query sees, beyond a length or before a window, may be anything and are not read. A page may
            have any size; multiples of 16 are fast. The pages are read in place, unless a gradient is wanted, autocast
            changes the dtype or more than 64 queries share a key head: then they are gathered, a copy
            (``pytransformer.explain`` says which).
        window: how many keys before its own a query sees; all where it is None.
        scale, softcap, return_lse, backend: as in ``attention``.

    Returns:
        ``out`` [B,H,T,Dv], or ``(out, lse)`` with lse float32 [B,H,T].

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong. The values of lengths and
            page numbers are looked at where they lie in the CPU's memory and the call is not traced. Elsewhere the
            host would have to wait for them: lengths are clipped to S, and page numbers taken as they are.
        BackendError: the named backend cannot serve the call.

    Source: Kwon et al., "PagedAttention", SOSP 2023, sec. 4.1, for the table of pages.
    """
    signature = known = None
    if block_table is not None:
        tensors = (query, key_cache, value_cache, cache_lengths, block_table)
        wants = needs_grad(*tensors)
        signature, known = recall(_OP, tensors, backend, wants, window, scale, softcap)
    if known is None:
        _check(query, key_cache, value_cache, cache_lengths, block_table)
    left, _ = check_window(_OP, window, sides=1)
    lengths = cache_lengths.to(torch.int64)
    if cache_lengths.is_cpu and plain_eager((cache_lengths, block_table)):
        _check_values(query, key_cache, lengths, block_table, left)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "backend": backend}
    if block_table is None:
        return _contiguous(query, key_cache, value_cache, lengths, left, return_lse=return_lse, **options)
    key, value = key_cache.transpose(1, 2), value_cache.transpose(1, 2)  # [pages,G,page,D], as kernels take it
    if known is None and (reason := _why_gathered(query, key, value, block_table)) is not None:
        note(_OP, "gathered", {"in place": reason})
        key, value = gather_pages(key, block_table), gather_pages(value, block_table)
        return _contiguous(query, key, value, lengths, left, return_lse=return_lse, **options)
    out, lse = _in_pages(query, key, value, lengths, block_table, left, signature, known, **options)
    return (out, lse) if return_lse else out


def _in_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    left: int | None,
    signature: tuple[Any, ...] | None,
    name: str | None,
    scale: float | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` by backend ``name``, where it is known already."""
    plain = name is not None
    if name is None:
        check_options(_OP, 0.0, scale, softcap, "bottom_right")
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    table = block_table.to(torch.int32)
    lower = None if left is None else -left
    tensors, numbers = (query, key, value, None, None, lengths, None), (lower, 0, scale, float(softcap or 0.0), 0.0)
    args = (*tensors, *numbers, table, *UNPACKED[:-1], True)
    if name is None:
        if 0 in (query.numel(), key.numel(), value.numel(), table.numel()):
            backend = "reference"  # nothing to compute, and no kernel takes a grid of no blocks
        name = select("attention", query.device.type, backend, args, obstacle((query, key, value, table)))
        remember(signature, name)
    out, lse, _ = run(name, args, plain=plain)
    return out, lse


def _contiguous(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    left: int | None,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
    backend: str,
) -> Any:
    """``attention`` of a cache [B,G,S,D]; of one query without a window the lengths alone say what it sees."""
    T, S = query.shape[2], key.shape[2]
    mask = None if T == 1 and left is None else shifted_band(lengths - T, T, S, left, 0)
    return attention(
        query,
        key,
        value,
        mask,
        key_lengths=lengths,
        enable_gqa=True,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
        backend=backend,
    )


def _why_gathered(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor) -> str | None:
    """Why pages are not read in place, or None."""
    if needs_grad(query, key, value):
        return "a gradient is wanted"
    if not autocast_off(query.device.type) and torch.get_autocast_dtype(query.device.type) != query.dtype:
        return "autocast changes the dtype"
    return unpaged(query, key, None, None, 0.0, block_table)


def _check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None
) -> None:
    check_floating(_OP, "query", query)
    if query.dim() != 4:
        raise ValueError(f"{_OP}: query must be [B,H,T,D], got {describe(query)}")
    B, H, _, D = query.shape
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_floating(_OP, name, x)
        check_like(_OP, name, x, "query", query)
        if block_table is not None and (x.dim() != 4 or x.shape[1] == 0):
            raise ValueError(f"{_OP}: {name} must be [pages,page,G,D] with a block_table, got {describe(x)}")
        if block_table is None and (x.dim() != 4 or x.shape[0] != B):
            raise ValueError(f"{_OP}: {name} must be [B,G,S,D] with B = {B}, got {describe(x)}")
    key_letters, value_letters = ("[B,G,S,D]", "[B,G,S,Dv]")
    if block_table is not None:
        key_letters, value_letters = ("[pages,page,G,D]", "[pages,page,G,Dv]")
        _check_table(block_table, query)
    check_shape(_OP, "key_cache", key_cache, (*key_cache.shape[:3], D), key_letters)
    check_shape(_OP, "value_cache", value_cache, (*key_cache.shape[:3], value_cache.shape[3]), value_letters)
    G = key_cache.shape[1 if block_table is None else 2]
    check_head_counts(_OP, H, G, True, "key_cache")
    check_tensor(_OP, "cache_lengths", cache_lengths)
    if cache_lengths.dtype not in (torch.int32, torch.int64) or tuple(cache_lengths.shape) != (B,):
        raise TypeError(f"{_OP}: cache_lengths must be integer [{B}], got {describe(cache_lengths)}")
    check_device(_OP, "cache_lengths", cache_lengths, "query", query)


def _check_table(block_table: Tensor, query: Tensor) -> None:
    check_tensor(_OP, "block_table", block_table)
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.dim() != 2:
        raise TypeError(f"{_OP}: block_table must be integer [B,P], got {describe(block_table)}")
    check_shape(_OP, "block_table", block_table, (query.shape[0], block_table.shape[1]), "[B,P]")
    check_device(_OP, "block_table", block_table, "query", query)


def _check_values(
    query: Tensor, key_cache: Tensor, lengths: Tensor, block_table: Tensor | None, left: int | None
) -> None:
    """Lengths, and page numbers as far as they will be read."""
    T, S = query.shape[2], key_cache.shape[2]
    if block_table is not None:
        S = block_table.shape[1] * key_cache.shape[1]
    if bool(((lengths < T) | (lengths > S)).any()):
        raise ValueError(f"{_OP}: cache_lengths must be between T = {T} and S = {S}, got {lengths.tolist()}")
    if block_table is None:
        return
    pages, page = key_cache.shape[:2]
    first = torch.arange(0, S, page)  # key of each page
    outside = (first < lengths[:, None]) & ((block_table < 0) | (block_table >= pages))
    if left is not None:
        outside &= first + page > lengths[:, None] - T - left
    if bool(outside.any()):
        raise ValueError(f"{_OP}: block_table must name pages 0 to {pages - 1}, got {block_table[outside].tolist()}")
