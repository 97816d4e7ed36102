"""The ops in plain PyTorch, in the dtype of their inputs: what a person would write without this library.

Each function takes the arguments of the public op of its name and nothing is cast to a wider type on the way,
unlike in ``reference``. Its error against the float64 oracle is the measure of a kernel's (``_tolerance``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.masks import Mask, padding, window
from pytransformer.ops._checks import random_state
from pytransformer.reference.attention import attention_scores, attention_weights, visible_keys
from pytransformer.reference.ffn import ACTIVATIONS


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bias: Tensor | None = None,
    window: Any = None,
    key_lengths: Tensor | None = None,
    causal_align: str = "top_left",
    softcap: float | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Two matrix products and a softmax between them; rows that see no key give 0."""
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        bias = attn_mask if bias is None else attn_mask + bias
        attn_mask = None
    visible = _visible(query, key, attn_mask, is_causal, window, key_lengths, causal_align)
    groups = query.shape[1] // key.shape[1]
    k, v = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ k.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, -1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return _dropout("attention", weights, dropout_p, seed) @ v


class _SavedLse(torch.autograd.Function):
    """Attention whose backward starts from the float32 lse and the output, as every fused backward does.

    Source: Dao et al., "FlashAttention", 2022, algorithm 4. Rounding lse multiplies the weights of a row by one
    common factor, which no other spelling of the backward shows.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        visible, scale = rest
        scores = attention_scores(query, key, visible, bias, scale, 0.0)
        lse = torch.logsumexp(scores, -1)
        weights = attention_weights(scores, lse)
        groups = query.shape[1] // key.shape[1]
        out = (weights @ value.repeat_interleave(groups, dim=1).to(weights.dtype)).to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, visible, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, visible, out, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        weights = attention_weights(attention_scores(query, key, visible, bias, ctx.scale, 0.0), lse)
        wide = weights.dtype
        q, k, v, dout = (
            x.to(wide) for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), grad_out)
        )
        delta = (dout * out.to(wide)).sum(-1, keepdim=True)
        dscores = weights * (dout @ v.mT - delta)
        B, G = key.shape[:2]
        dkey = (dscores.mT @ q * ctx.scale).view(B, G, groups, *key.shape[2:]).sum(2).to(key.dtype)
        dvalue = (weights.mT @ dout).view(B, G, groups, *value.shape[2:]).sum(2).to(value.dtype)
        dbias = None if bias is None else dscores.sum_to_size(bias.shape).to(bias.dtype)
        return (dscores @ k * ctx.scale).to(query.dtype), dkey, dvalue, dbias, None, None


def attention_saving_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bias: Tensor | None = None,
    window: Any = None,
    key_lengths: Tensor | None = None,
    causal_align: str = "top_left",
) -> Tensor:
    """``attention`` with the backward of every fused kernel, in plain PyTorch; see ``_SavedLse``."""
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        bias = attn_mask if bias is None else attn_mask + bias
        attn_mask = None
    visible = _visible(query, key, attn_mask, is_causal, window, key_lengths, causal_align)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
    out: Tensor = _SavedLse.apply(query, key, value, bias, visible, scale)  # type: ignore[no-untyped-call]
    return out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    *,
    is_causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    causal_align: str = "top_left",
    spelling: Callable[..., Any] = attention,
    **options: Any,
) -> Tensor:
    """``spelling`` of the sequences side by side in a batch, with one mask that says all."""
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    left, right = window if isinstance(window, tuple) else (window, window)
    right = 0 if is_causal else right
    seen = torch.zeros(len(queries), 1, max(queries), max(keys), dtype=torch.bool)
    for n, (T, S) in enumerate(zip(queries, keys, strict=True)):
        shift = S - T if causal_align == "bottom_right" else 0
        distance = torch.arange(S) - torch.arange(T)[:, None] - shift
        near = torch.ones_like(distance, dtype=torch.bool) if left is None else distance >= -left
        seen[n, 0, :T, :S] = near if right is None else near & (distance <= right)
    batch = (_side_by_side(x, n) for x, n in ((query, queries), (key, keys), (value, keys)))
    out = spelling(*batch, seen, **options)
    return torch.cat([out[n, :, :T].transpose(0, 1) for n, T in enumerate(queries)])


def _side_by_side(x: Tensor, lengths: list[int]) -> Tensor:
    """[T,H,D] of sequences end to end as [N,H,longest,D]."""
    padded = [F.pad(part, (0, 0, 0, 0, 0, max(lengths) - part.shape[0])) for part in torch.split(x, lengths)]
    return torch.stack(padded).transpose(1, 2)


def spellings(op: str, options: Mapping[str, Any]) -> tuple[Callable[..., Any], ...]:
    """The ways of writing ``op`` in plain PyTorch whose errors are the measure of a kernel's."""
    saved = not options.keys() & {"dropout_p", "softcap", "seed", "return_lse", "return_weights"}
    if op == "attention" and saved:
        return attention, attention_saving_lse
    if op == "attention_varlen" and saved:
        return attention_varlen, partial(attention_varlen, spelling=attention_saving_lse)
    return (globals()[op],)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    seed: int | Tensor | None = None,
) -> Any:
    """``F.layer_norm`` of the sum."""
    total = _sum("layer_norm", input, residual, input_bias, dropout_p, seed)
    output = F.layer_norm(total, total.shape[-1:], _as(weight, total), _as(bias, total), eps)
    return (output, total) if prenorm else output


def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-6,
    prenorm: bool = False,
    seed: int | Tensor | None = None,
) -> Any:
    """``F.rms_norm`` of the sum."""
    total = _sum("rms_norm", input, residual, input_bias, dropout_p, seed)
    output = F.rms_norm(total, total.shape[-1:], _as(weight, total), eps)
    return (output, total) if prenorm else output


def ffn(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "relu",
    *,
    dropout_p: float = 0.0,
    weight_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``F.linear``, the activation, ``F.linear``."""
    hidden = ACTIVATIONS[activation](F.linear(input, weight1, bias1))
    if weight_gate is not None:
        hidden = hidden * F.linear(input, weight_gate, bias_gate)
    return F.linear(_dropout("ffn", hidden, dropout_p, seed), weight2, bias2)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``."""
    return F.linear(input, weight, bias)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``F.linear`` and ``F.cross_entropy``."""
    logits = F.linear(input, linear_weight, linear_bias).flatten(0, -2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    labels = target.flatten()
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss > 0:
        counted = labels != ignore_index
        squares = torch.where(counted, torch.logsumexp(logits, -1).square(), 0) * z_loss
        loss = loss + (squares if reduction == "none" else squares.sum())
        if reduction == "mean":
            loss = loss - squares.sum() + squares.sum() / counted.sum()
    return loss.reshape(target.shape) if reduction == "none" else loss


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``F.embedding`` and sums."""
    total = F.embedding(tokens, weight)
    if scale != 1:
        total = total * scale
    if positions is not None:
        total = total + positions
    if segments is not None and segment_weight is not None:
        total = total + F.embedding(segments, segment_weight)
    return _dropout("embedding", total, dropout_p, seed)


def _visible(
    query: Tensor, key: Tensor, attn_mask: Any, is_causal: bool, sides: Any, key_lengths: Tensor | None, align: str
) -> Tensor | None:
    mask = attn_mask if isinstance(attn_mask, Mask) else Mask(keep=attn_mask)
    mask = mask & Mask(causal=is_causal)
    if sides is not None:
        mask = mask & (window(*sides) if isinstance(sides, tuple) else window(sides))
    if key_lengths is not None:
        mask = mask & padding(key_lengths)
    mask = mask.aligned(align)
    return visible_keys(query, key, mask.keep, mask.key_lengths, *mask.band(query.shape[-2], key.shape[-2]))


def _sum(
    op: str, x: Tensor, residual: Tensor | None, bias: Tensor | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    total = _dropout(op, x if bias is None else x + bias.to(x.dtype), dropout_p, seed)
    return total if residual is None else total + residual


def _dropout(op: str, x: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    """Dropout by the library's own random bits, so that both sides drop the same elements."""
    rng = random_state(op, seed, dropout_p, x.device)
    return x if rng is None else x * reference.dropout_multiplier(x.shape, rng, dropout_p, x.dtype)


def _as(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.dtype)
