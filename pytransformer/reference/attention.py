"""Masked softmax attention in plain PyTorch: the definition of the op.

    out = softmax(scale * query key^T + bias, over the visible keys) value

Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; grouped query heads: Ainslie et al., 2023;
soft capping: Gemma 2, 2024, sec. 2. A query that sees no key has output 0, lse -inf and no gradient, and
what lies behind a mask is never used, NaN and Inf included.

With a block table keys and values are pools of pages, which are gathered into a copy first; Kwon et al.,
"PagedAttention", 2023, sec. 4.1. Each query then stands where it is the end of its sequence.
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
    at_end: bool = False,
) -> Tensor | None:
    """bool, broadcastable to [B,H,T,S]: may query t attend to key s? None where nothing is masked.

    The band is that of s - t, or with ``at_end`` that of s - (length - T + t), the length being the sequence's own.
    """
    T, S = query.shape[-2], key.shape[-2]
    visible = mask
    if band_lower is not None or band_upper is not None:
        at = torch.arange(T, device=query.device)[:, None]
        if at_end:
            at = at + (S if key_lengths is None else key_lengths.clamp(0, S)[:, None, None, None]) - T
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, weights)``, differentiable; the weights are those after dropout.

    With a ``block_table``, integer [B,P], key and value are [pages,G,page,D], and the band counts from each sequence's
    end (``visible_keys``).
    """
    paged = block_table is not None
    if block_table is not None:
        key, value = gather_pages(key, block_table), gather_pages(value, block_table)
    visible = visible_keys(query, key, mask, key_lengths, band_lower, band_upper, at_end=paged)
    scores = attention_scores(query, key, visible, bias, scale, softcap)
    if visible is None:
        lse = torch.logsumexp(scores, -1)
    else:  # logsumexp of a row of -inf has a NaN gradient: such rows are kept out of it
        seen = visible.any(-1, keepdim=True)
        lse = torch.where(seen[..., 0], torch.logsumexp(torch.where(seen, scores, 0), -1), -torch.inf)
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
    return out, lse


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
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is empty unless ``needs_bias``."""

    def forward(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        rest = (key_lengths, rng, band_lower, band_upper, scale, softcap, dropout_p)
        return attention(q, k, v, mask, b, *rest)[:1]

    grads = vjp(forward, (query, key, value, bias), (grad_out,))
    grad_query, grad_key, grad_value, grad_bias = (or_empty(g, query) for g in grads)
    return grad_query, grad_key, grad_value, grad_bias if needs_bias else query.new_empty(0)


def _and(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // x.shape[1] if x.shape[1] else 1
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
