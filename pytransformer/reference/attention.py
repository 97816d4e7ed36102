"""Masked softmax attention in plain PyTorch: the definition of the op.

    out = softmax(scale * query key^T + bias, over the visible keys) value

Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; grouped query heads: Ainslie et al., 2023;
soft capping: Gemma 2, 2024, sec. 2. A query that sees no key has output 0, lse -inf and no gradient, and
what lies behind a mask is never used, NaN and Inf included.

With a block table keys and values are pools of pages, which are gathered into a copy first; Kwon et al.,
"PagedAttention", 2023, sec. 4.1. Sequences that lie end to end are laid side by side in a padded batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp
from pytransformer.reference._philox import dropout_multiplier


def visible_keys(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    shift: Tensor | None = None,
) -> Tensor | None:
    """bool, broadcastable to [B,H,T,S]: may query t attend to key s? None where nothing is masked.

    The band is that of s - t, or with ``shift``, integer [B], that of s - (t + shift[b]).
    """
    T, S = query.shape[-2], key.shape[-2]
    visible = mask
    if band_lower is not None or band_upper is not None:
        at = torch.arange(T, device=query.device)[:, None]
        if shift is not None:
            at = at + shift[:, None, None, None]
        distance = torch.arange(S, device=query.device) - at
        if band_upper is not None:
            visible = _and(visible, distance <= band_upper)
        if band_lower is not None:
            visible = _and(visible, distance >= band_lower)
    if key_lengths is not None:
        in_length = torch.arange(S, device=query.device) < key_lengths[:, None]
        visible = _and(visible, in_length[:, None, None, :])
    return visible


def attention_scores(
    query: Tensor, key: Tensor, visible: Tensor | None, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """``scale * query key^T + bias`` [B,H,T,S], -inf where masked; float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(wide), _repeat_heads(key, query).to(wide)
    bad_key = None
    if visible is not None:
        q = torch.where(visible.any(-1, keepdim=True), q, 0)
        finite = k.isfinite()
        bad_key = ~finite.all(-1)[:, :, None, :]
        k = torch.where(finite, k, 0)
    scores = (q @ k.mT) * scale
    if bad_key is not None:
        scores = torch.where(bad_key, torch.nan, scores)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return scores if visible is None else torch.where(visible, scores, -torch.inf)


def attention_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``: the softmax, with rows of zeros where lse is -inf."""
    return torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])


def gather_pages(pool: Tensor, block_table: Tensor) -> Tensor:
    """[pages,G,page,D] as [B,G,P * page,D]. A number that is no page's stands for any page: nobody may see its keys."""
    if pool.shape[0] == 0:
        return pool.new_zeros(block_table.shape[0], pool.shape[1], block_table.shape[1] * pool.shape[2], pool.shape[3])
    pages = block_table.to(torch.int64).clamp(0, pool.shape[0] - 1)
    return pool.transpose(1, 2)[pages].flatten(1, 2).transpose(1, 2)


class _Packing:
    """Where the rows of a tensor [1,H,T,D] of sequences that lie end to end stand in a batch [N,H,longest,D]."""

    def __init__(self, cu_seq: Tensor, longest: int, total: int) -> None:
        self.lengths = cu_seq.to(torch.int64).diff()
        sequence = torch.repeat_interleave(self.lengths, output_size=total)
        within = torch.arange(total, device=cu_seq.device) - cu_seq[sequence]
        self.longest, self.rows = longest, sequence * longest + within

    def pad(self, packed: Tensor) -> Tensor:
        """The batch, zeros where there is no token."""
        N, tokens = self.lengths.shape[0], packed[0].transpose(0, 1)
        room = packed.new_zeros(N * self.longest, *tokens.shape[1:])
        return room.index_copy(0, self.rows, tokens).view(N, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.rows).transpose(0, 1)[None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    block_table: Tensor | None = None,
    cu_seq_q: Tensor | None = None,
    cu_seq_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    at_end: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, weights)``, differentiable; the weights are those after dropout.

    With a ``block_table``, integer [B,P], key and value are [pages,G,page,D]. With ``cu_seq_q`` and ``cu_seq_k``,
    integer [N+1], query, key and value are [1,H,Tq,D], [1,G,Tk,D] and [1,G,Tk,Dv], sequence n being rows ``cu_seq[n]``
    to ``cu_seq[n + 1]``, at most ``max_q`` and ``max_k``: no mask, no bias and no key_lengths then, and weights are
    [N,H,max_q,max_k], by whose index dropout draws its bits. ``at_end`` puts the last query of each sequence at its
    last key: the band is then that of s - (key length - query length + t).
    """
    if cu_seq_q is not None and cu_seq_k is not None:
        queries, keys = _Packing(cu_seq_q, max_q, query.shape[2]), _Packing(cu_seq_k, max_k, key.shape[2])
        batch = queries.pad(query), keys.pad(key), keys.pad(value)
        shift = keys.lengths - queries.lengths if at_end else None
        visible = visible_keys(*batch[:2], None, keys.lengths, band_lower, band_upper, shift)
        out, lse, weights = _attention(*batch, visible, None, rng, scale, softcap, dropout_p)
        return queries.pack(out), queries.pack(lse[..., None])[..., 0].contiguous(), weights
    if block_table is not None:
        key, value = gather_pages(key, block_table), gather_pages(value, block_table)
    shift = None
    if at_end:
        T, S = query.shape[2], key.shape[2]
        full = torch.full(query.shape[:1], S, device=query.device) if key_lengths is None else key_lengths
        shift = full.clamp(0, S) - T
    visible = visible_keys(query, key, mask, key_lengths, band_lower, band_upper, shift)
    return _attention(query, key, value, visible, bias, rng, scale, softcap, dropout_p)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = attention_scores(query, key, visible, bias, scale, softcap)
    if visible is None and bias is None:
        lse = torch.logsumexp(scores, -1)
    else:  # logsumexp of a row of -inf has a NaN gradient: such rows are kept out of it
        hidden = (scores == -torch.inf).all(-1)
        lse = torch.where(hidden, -torch.inf, torch.logsumexp(torch.where(hidden[..., None], 0, scores), -1))
    weights = attention_weights(scores, lse)
    if dropout_p > 0:
        assert rng is not None
        weights = weights * dropout_multiplier(scores.shape, rng, dropout_p, weights.dtype)
    v = _repeat_heads(value, query).to(weights.dtype)
    if visible is None:
        return (weights @ v).to(query.dtype), lse, weights
    finite = v.isfinite()
    poisoned = (visible & ~finite.all(-1)[:, :, None, :]).any(-1, keepdim=True)
    out = torch.where(poisoned, torch.nan, weights @ torch.where(finite, v, 0))
    return out.to(query.dtype), lse, weights


def why_not(*args: object) -> str | None:
    return None


def attention_fwd(*args: object) -> tuple[Tensor, Tensor]:
    """The arguments of ``attention``; returns ``(out, lse)``."""
    out, lse, _ = attention(*args)  # type: ignore[arg-type]
    return _heads_together(out), lse


def attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    at_end: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless ``needs_bias``."""

    def forward(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        rest = (key_lengths, rng, band_lower, band_upper, scale, softcap, dropout_p)
        return attention(q, k, v, mask, b, *rest, None, cu_seq_q, cu_seq_k, max_q, max_k, at_end)[:1]

    grads = vjp(forward, (query, key, value, bias), (grad_out,))
    *of_heads, grad_bias = (or_empty(g, query) for g in grads)
    grad_query, grad_key, grad_value = (_heads_together(g) for g in of_heads)
    return grad_query, grad_key, grad_value, grad_bias if needs_bias else query.new_empty(0)


def _heads_together(x: Tensor) -> Tensor:
    """[B,H,T,D] in the memory of [B,T,H,D], as every backend lays it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _and(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // x.shape[1] if x.shape[1] else 1
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
