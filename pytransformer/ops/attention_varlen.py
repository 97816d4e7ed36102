"""attention_varlen: attention over sequences packed end to end, as ``torch.nn.attention.varlen`` takes them.

Kernels read the sequences where they lie: one more number says where each begins, and nothing is computed, nor kept
room for, beyond the end of each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pytransformer.backends import select
from pytransformer.ops._autocast import autocast_off, cast_to
from pytransformer.ops._bands import check_window
from pytransformer.ops._checks import (
    check_device,
    check_floating,
    check_head_counts,
    check_like,
    check_shape,
    check_tensor,
    describe,
    random_state,
)
from pytransformer.ops._op import needs_grad, obstacle, plain_eager, recall, remember
from pytransformer.ops.attention import check_options, run

_OP = "attention_varlen"


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    *,
    is_causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    causal_align: str = "top_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """``attention`` of each sequence with itself, sequence i being rows ``cu_seq[i]`` to ``cu_seq[i + 1]``.

    Args:
        query: [Tq,H,D], the queries of all sequences end to end.
        key: [Tk,G,D]; H a multiple of G where ``enable_gqa``, else G = H.
        value: [Tk,G,Dv].
        cu_seq_q: integer [N+1], int32 at best, from 0 to Tq, never falling.
        cu_seq_k: the same for keys, from 0 to Tk; ``cu_seq_q`` where it is None.
        max_q: the longest sequence of queries; where it is None it is found, for which the host waits for a GPU, and
            a trace breaks.
        max_k: the longest sequence of keys.
        is_causal, window, causal_align: as in ``attention``, within each sequence.
        scale, enable_gqa, dropout_p, softcap, seed, backend: as in ``attention``. Dropout draws its bits by the index
            of a score in [N,H,max_q,max_k].
        return_lse: also return the logarithm of the sum of exponentials, float32 [H,Tq].

    Returns:
        ``out`` [Tq,H,Dv], or ``(out, lse)``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong. The values of cu_seq_q and
            cu_seq_k are looked at where they lie in the CPU's memory and the call is not traced.
        BackendError: the named backend cannot serve the call.

    Source: Dao et al., "FlashAttention-2", 2023; the packing of its ``varlen`` functions.
    """
    cu_seq_k, max_k = (cu_seq_q, max_q) if cu_seq_k is None else (cu_seq_k, max_k)
    tensors = (query, key, value, cu_seq_q, cu_seq_k)
    wants = needs_grad(*tensors)
    options = (is_causal, window, causal_align, scale, enable_gqa, dropout_p, softcap, return_lse)
    signature, known = recall(_OP, tensors, backend, wants, *options)
    if known is None:
        _check(query, key, value, cu_seq_q, cu_seq_k, enable_gqa)
        check_options(_OP, dropout_p, scale, softcap, causal_align)
    max_q = _longest("q", cu_seq_q, max_q, query.shape[0])
    max_k = _longest("k", cu_seq_k, max_k, key.shape[0])
    left, right = check_window(_OP, window)
    if known is None and not autocast_off(query.device.type):
        query, key, value = cast_to(torch.get_autocast_dtype(query.device.type), query, key, value)  # type: ignore[assignment]
    if known is None and 0 in (query.numel(), key.numel(), value.numel(), max_q, max_k):
        backend = "reference"  # nothing to compute, and no kernel takes a grid of no blocks
    rng = random_state(_OP, seed, dropout_p, query.device) if dropout_p else None
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    numbers = (None if left is None else -left, 0 if is_causal else right, scale, float(softcap or 0.0))
    packing = (cu_seq_q.to(torch.int32), cu_seq_k.to(torch.int32), max_q, max_k, causal_align == "bottom_right")
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    args = (*heads, None, None, None, rng, *numbers, float(dropout_p), None, *packing)
    name = known
    if name is None:
        name = select("attention", query.device.type, backend, args, _obstacle(args, return_lse))
        remember(signature, name)
    out, lse, _ = run(name, args, plain=known is not None)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _obstacle(args: tuple[Any, ...], return_lse: bool) -> str | None:
    query, key, value = args[:3]
    if return_lse and needs_grad(query, key, value):
        return "lse carries gradients in the reference only"
    return obstacle((query, key, value))


def _longest(which: str, cu_seq: Tensor, longest: int | None, total: int) -> int:
    """The longest sequence, at most all ``total`` tokens: ``longest`` where it is given.

    Raises:
        ValueError: the values of ``cu_seq``, where they can be looked at, are no offsets, or go beyond ``longest``.
    """
    looked_at = cu_seq.is_cpu and plain_eager((cu_seq,))
    if longest is not None and not looked_at:
        return min(longest, total)
    offsets = cu_seq.tolist()
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if (offsets[0], offsets[-1]) != (0, total) or min(lengths, default=0) < 0:
        raise ValueError(f"{_OP}: cu_seq_{which} must rise from 0 to {total}, got {offsets}")
    found = max(lengths, default=0)
    if longest is None:
        return found
    if longest < found:
        raise ValueError(f"{_OP}: max_{which} must be at least the longest sequence, {found}; got {longest}")
    return min(longest, total)


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(_OP, name, x)
        if x.dim() != 3:
            raise ValueError(f"{_OP}: {name} must be [T,H,D], got {describe(x)}")
    for name, x in (("key", key), ("value", value)):
        check_like(_OP, name, x, "query", query)
    check_shape(_OP, "key", key, (*key.shape[:2], query.shape[2]), "[Tk,G,D]")
    check_shape(_OP, "value", value, (*key.shape[:2], value.shape[2]), "[Tk,G,Dv]")
    check_head_counts(_OP, query.shape[1], key.shape[1], enable_gqa)
    for which, x in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        check_tensor(_OP, which, x)
        if x.dtype not in (torch.int32, torch.int64) or x.dim() != 1 or x.numel() < 1:
            raise TypeError(f"{_OP}: {which} must be integer [N+1], got {describe(x)}")
        check_device(_OP, which, x, "query", query)
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"{_OP}: cu_seq_k must be of as many sequences as cu_seq_q, {cu_seq_q.shape[0] - 1}; "
            f"got {cu_seq_k.shape[0] - 1}"
        )
