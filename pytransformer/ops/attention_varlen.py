"""attention_varlen: attention over sequences packed end to end, as ``torch.nn.attention.varlen`` takes them.

The sequences are laid side by side in a padded batch, whose padded keys the kernels skip; padded queries cost
their share. Packing and padding move every token once each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops._bands import check_window, shifted_band
from pytransformer.ops._checks import check_choice, check_floating, check_like, check_shape, check_tensor, describe
from pytransformer.ops.attention import attention

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
        cu_seq_q: integer [N+1], from 0 to Tq, never falling.
        cu_seq_k: the same for keys, from 0 to Tk; ``cu_seq_q`` where it is None.
        max_q: the longest sequence of queries; found where it is None.
        max_k: the longest sequence of keys.
        is_causal, window, causal_align: as in ``attention``, within each sequence.
        scale, enable_gqa, dropout_p, softcap, seed, backend: as in ``attention``.
        return_lse: also return the logarithm of the sum of exponentials, float32 [H,Tq].

    Returns:
        ``out`` [Tq,H,Dv], or ``(out, lse)``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        BackendError: the named backend cannot serve the call.

    Source: Dao et al., "FlashAttention-2", 2023; the packing of its ``varlen`` functions.
    """
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    _check(query, key, value)
    check_choice(_OP, "causal_align", causal_align, ("top_left", "bottom_right"))
    queries = _Packing("q", cu_seq_q, max_q, query.shape[0])
    keys = _Packing("k", cu_seq_k, max_k, key.shape[0])
    if queries.lengths.shape != keys.lengths.shape:
        raise ValueError(
            f"{_OP}: cu_seq_k must be of as many sequences as cu_seq_q, {queries.lengths.shape[0]}; "
            f"got {keys.lengths.shape[0]}"
        )
    options: dict[str, Any] = {"is_causal": is_causal, "window": window, "key_lengths": keys.lengths}
    if causal_align == "bottom_right" and (is_causal or window is not None):
        options |= {"is_causal": False, "window": None}
        left, right = check_window(_OP, window)
        right = 0 if is_causal else right
        shift = keys.lengths - queries.lengths
        options["attn_mask"] = shifted_band(shift, queries.longest, keys.longest, left, right)
    found = attention(
        queries.pad(query),
        keys.pad(key),
        keys.pad(value),
        **options,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        softcap=softcap,
        return_lse=return_lse,
        seed=seed,
        backend=backend,
    )
    if not return_lse:
        return queries.pack(found)
    out, lse = found
    return queries.pack(out), queries.pack(lse[..., None])[..., 0].mT


class _Packing:
    """Where the rows of a packed tensor lie in the padded batch [N,longest]."""

    def __init__(self, which: str, cu_seq: Tensor, longest: int | None, total: int) -> None:
        check_tensor(_OP, f"cu_seq_{which}", cu_seq)
        if cu_seq.dtype not in (torch.int32, torch.int64) or cu_seq.dim() != 1 or cu_seq.numel() < 1:
            raise TypeError(f"{_OP}: cu_seq_{which} must be integer [N+1], got {describe(cu_seq)}")
        cu_seq = cu_seq.to(torch.int64)
        self.lengths = cu_seq.diff()
        ends = (int(cu_seq[0]), int(cu_seq[-1]))
        if ends != (0, total) or bool((self.lengths < 0).any()):
            raise ValueError(f"{_OP}: cu_seq_{which} must rise from 0 to {total}, got {cu_seq.tolist()}")
        found = int(self.lengths.max()) if self.lengths.numel() else 0
        self.longest = found if longest is None else longest
        if self.longest < found:
            raise ValueError(f"{_OP}: max_{which} must be at least the longest sequence, {found}; got {longest}")
        sequence = torch.repeat_interleave(self.lengths)
        within = torch.arange(total, device=cu_seq.device) - cu_seq[sequence]
        self.rows = sequence * self.longest + within

    def pad(self, packed: Tensor) -> Tensor:
        """[T,H,D] to [N,H,longest,D], zeros where there is no token."""
        N = self.lengths.shape[0]
        room = packed.new_zeros(N * self.longest, *packed.shape[1:])
        return room.index_copy(0, self.rows, packed).view(N, self.longest, *packed.shape[1:]).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """[N,H,longest,D] to [T,H,D]."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(_OP, name, x)
        if x.dim() != 3:
            raise ValueError(f"{_OP}: {name} must be [T,H,D], got {describe(x)}")
    for name, x in (("key", key), ("value", value)):
        check_like(_OP, name, x, "query", query)
    check_shape(_OP, "key", key, (*key.shape[:2], query.shape[2]), "[Tk,G,D]")
    check_shape(_OP, "value", value, (*key.shape[:2], value.shape[2]), "[Tk,G,Dv]")
