"""attention_decode: the newest queries of each sequence against its cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops._bands import check_window, shifted_band
from pytransformer.ops._checks import check_floating, check_like, check_shape, check_tensor, describe
from pytransformer.ops.attention import attention

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
        block_table: integer [B,P]: where page p of sequence b lies in the pool. Its pages are gathered, a copy.
        window: how many keys before its own a query sees; all where it is None.
        scale, softcap, return_lse, backend: as in ``attention``.

    Returns:
        ``out`` [B,H,T,Dv], or ``(out, lse)`` with lse float32 [B,H,T].

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        BackendError: the named backend cannot serve the call.

    Source: Kwon et al., "PagedAttention", SOSP 2023, sec. 4.1, for the table of pages.
    """
    if block_table is not None:
        key_cache, value_cache = (_gathered(n, x, block_table) for n, x in _named(key_cache, value_cache))
    _check(query, key_cache, value_cache, cache_lengths)
    T, S = query.shape[2], key_cache.shape[2]
    lengths = cache_lengths.to(torch.int64)
    if bool(((lengths < T) | (lengths > S)).any()):
        raise ValueError(f"{_OP}: cache_lengths must be between T = {T} and S = {S}, got {cache_lengths.tolist()}")
    mask = None
    if T > 1 or window is not None:
        left, _ = check_window(_OP, window, sides=1)
        mask = shifted_band(lengths - T, T, S, left, 0)
    return attention(
        query,
        key_cache,
        value_cache,
        mask,
        key_lengths=lengths,
        enable_gqa=True,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
        backend=backend,
    )


def _named(key_cache: Tensor, value_cache: Tensor) -> tuple[tuple[str, Tensor], ...]:
    return ("key_cache", key_cache), ("value_cache", value_cache)


def _gathered(name: str, pool: Tensor, block_table: Tensor) -> Tensor:
    """[pages,page,G,D] as [B,G,P * page,D]."""
    check_floating(_OP, name, pool)
    if pool.dim() != 4:
        raise ValueError(f"{_OP}: {name} must be [pages,page,G,D] with a block_table, got {describe(pool)}")
    check_tensor(_OP, "block_table", block_table)
    if block_table.dtype not in (torch.int32, torch.int64) or block_table.dim() != 2:
        raise TypeError(f"{_OP}: block_table must be integer [B,P], got {describe(block_table)}")
    if block_table.numel() and not 0 <= int(block_table.min()) <= int(block_table.max()) < pool.shape[0]:
        raise ValueError(
            f"{_OP}: block_table must name pages 0 to {pool.shape[0] - 1}, "
            f"got {int(block_table.min())} to {int(block_table.max())}"
        )
    return pool[block_table.to(torch.int64)].flatten(1, 2).transpose(1, 2)


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor) -> None:
    check_floating(_OP, "query", query)
    if query.dim() != 4:
        raise ValueError(f"{_OP}: query must be [B,H,T,D], got {describe(query)}")
    for name, x in _named(key_cache, value_cache):
        check_floating(_OP, name, x)
        check_like(_OP, name, x, "query", query)
        if x.dim() != 4 or x.shape[0] != query.shape[0]:
            raise ValueError(f"{_OP}: {name} must be [B,G,S,D] with B = {query.shape[0]}, got {describe(x)}")
    check_shape(_OP, "key_cache", key_cache, (*key_cache.shape[:3], query.shape[3]), "[B,G,S,D]")
    check_shape(_OP, "value_cache", value_cache, (*key_cache.shape[:3], value_cache.shape[3]), "[B,G,S,Dv]")
    check_tensor(_OP, "cache_lengths", cache_lengths)
    if cache_lengths.dtype not in (torch.int32, torch.int64) or tuple(cache_lengths.shape) != (query.shape[0],):
        raise TypeError(f"{_OP}: cache_lengths must be integer [{query.shape[0]}], got {describe(cache_lengths)}")
