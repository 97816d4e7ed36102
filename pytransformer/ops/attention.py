"""attention: masked softmax attention, a drop-in for ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.backends._arguments import empty_heads
from pytransformer.masks import ALIGNMENTS, EVERYTHING, Mask
from pytransformer.ops._autocast import autocast_off, cast_to
from pytransformer.ops._bands import check_window
from pytransformer.ops._checks import (
    check_broadcasts,
    check_choice,
    check_device,
    check_finite,
    check_floating,
    check_head_counts,
    check_like,
    check_probability,
    check_shape,
    check_tensor,
    describe,
    random_state,
)
from pytransformer.ops._op import FusedOp, needs_grad, obstacle, recall, remember
from pytransformer.reference.attention import attention_scores, attention_weights, visible_keys

__all__ = ["attention", "visible_keys"]  # the second for nn, which does not reach below ops

_LETTERS = "[B,H,T,S]"
UNPACKED = (None, None, 0, 0, False)  # the last arguments of a call that is no packed one, nor at the end


class AttentionOp(FusedOp):
    name = "attention"
    masks_at: ClassVar[dict[str, int]] = {"fwd": 3, "bwd": 6}
    forward_schema = (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? key_lengths, Tensor? rng,"
        " SymInt? band_lower, SymInt? band_upper, float scale, float softcap, float dropout_p, Tensor? block_table,"
        " Tensor? cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, bool at_end) -> (Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? mask,"
        " Tensor? bias, Tensor? key_lengths, Tensor? rng, SymInt? band_lower, SymInt? band_upper, float scale,"
        " float softcap, float dropout_p, Tensor? cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k,"
        " bool at_end, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def fake_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
        shape = query.shape[:3]
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        out = empty_heads((*shape, value.shape[-1]), query.new_empty)
        return out, query.new_empty(shape, dtype=lse_dtype)

    @staticmethod
    def fake_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
        bias, needs_bias = args[3], args[-1]
        grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needs_bias else query.new_empty(0)
        return *(empty_heads(x.shape, x.new_empty) for x in (query, key, value)), grad_bias

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        inputs, masks, numbers, block_table = args[:3], args[3:7], args[7:12], args[12]
        if block_table is not None:
            raise ValueError("attention: keys and values in pages have no gradient, nor has their query: gather them")
        cu_seq, lengths = args[13:15], args[15:]
        return (*inputs, *outputs, *masks, *cu_seq), (*numbers, *lengths)

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        *tensors, cu_seq_q, cu_seq_k = saved
        return (*grads, *tensors, *extra[:5], cu_seq_q, cu_seq_k, *extra[5:], needs[4])

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        query, key, value, bias = grads
        found = (query, key, value, None, bias)
        return (*(g if needed else None for g, needed in zip(found, needs, strict=False)), *(None,) * 13)


_op = AttentionOp()


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
    window: int | tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    causal_align: str = "top_left",
    softcap: float | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """``out = softmax(scale * query key^T + bias, over the visible keys) value``.

    A call with the arguments of ``F.scaled_dot_product_attention`` alone gives its result.

    Args:
        query: [B,H,T,D], floating point; more or fewer leading dimensions than two are taken as torch takes them.
        key: [B,G,S,D]; H a multiple of G where ``enable_gqa``, else G = H.
        value: [B,G,S,Dv].
        attn_mask: bool, broadcastable to [B,H,T,S], True = attend; or floating point, added to the scores (with
            a gradient); or a ``pytransformer.masks.Mask``. Combines with everything below.
        dropout_p: probability of dropping an attention weight; applied whenever it is above 0.
        is_causal: a query sees no key after its own position.
        scale: of the scores; 1 / sqrt(D) by default.
        enable_gqa: let H / G query heads share one key/value head.
        bias: floating point, broadcastable to [B,H,T,S], added to the scaled scores; differentiable.
        window: how many keys a query sees to either side: one number or (left, right), None for an open side.
        key_lengths: integer [B]; the keys from there on are masked out.
        causal_align: where causal and window masks put the queries when T != S: ``"top_left"`` (query t at key
            t, as in torch) or ``"bottom_right"`` (the last query at the last key, as in decoding).
        softcap: c > 0 replaces the scaled scores s by c * tanh(s / c) before the bias.
        return_lse: also return the logarithm of the sum of exponentials, float32 [B,H,T].
        return_weights: also return the attention weights (after dropout), [B,H,T,S].
        seed: of the dropout; an integer, an int64 tensor (seed, offset), or None to draw from torch's generator.
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``.

    Returns:
        ``out`` [B,H,T,Dv], or a tuple ``(out, lse, weights)`` with what was asked for. Kernels lay ``out`` as torch's
        do, a token's heads together: ``out.transpose(1, 2).flatten(2)`` [B,T,H*Dv] is a view.

    Numerics:
        Softmax and accumulation in float32 (float64 for float64). A query that sees no key has output 0, lse
        -inf and no gradient; NaN and Inf behind a mask never leak. Deterministic.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        BackendError: the named backend cannot serve the call.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
    """
    lead = query.shape[:-2] if isinstance(query, Tensor) else ()
    options = (dropout_p, is_causal, scale, enable_gqa, window, causal_align, softcap, return_lse, return_weights)
    signature, known = _recall(query, key, value, attn_mask, bias, key_lengths, backend, options)
    if known is None or not query.dim() == key.dim() == value.dim() == 4:
        query, key, value, attn_mask, bias = _as_batches(query, key, value, attn_mask, bias)
    if known is None:
        _check_inputs(query, key, value, enable_gqa)
        check_options("attention", dropout_p, scale, softcap, causal_align)
    full = (*query.shape[:3], key.shape[2])
    mask, added = _combine(attn_mask, bias, is_causal, window, key_lengths, causal_align, query, full)
    if known is None and not autocast_off(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = cast_to(dtype, query, key, value)  # type: ignore[assignment]
    if known is None and 0 in (query.numel(), key.numel(), value.numel()):
        backend = "reference"  # nothing to compute, and no kernel takes a grid of no blocks
    rng = random_state("attention", seed, dropout_p, query.device) if dropout_p else None
    keep = None if mask.keep is None else mask.keep.expand(full)
    added = None if added is None else _four_dimensional(added)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    tensors = (query, key, value, keep, added, mask.key_lengths, rng)
    args = (*tensors, *mask.band(*full[2:]), scale, float(softcap or 0.0), float(dropout_p), None, *UNPACKED)
    name = known
    if name is None:
        name = select("attention", query.device.type, backend, args, _obstacle(args, return_lse, return_weights))
        remember(signature, name)
    out, lse, weights = run(name, args, return_weights, plain=known is not None)
    return _returned(out, lse if return_lse else None, weights, lead)


def _recall(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    bias: Any,
    key_lengths: Any,
    backend: str,
    options: tuple[Any, ...],
) -> tuple[tuple[Any, ...] | None, str | None]:
    """``recall`` of a call."""
    tensors: tuple[Any, ...] = (query, key, value, attn_mask, bias, key_lengths)
    banded: tuple[Any, ...] | None = None
    if isinstance(attn_mask, Mask):
        banded = (attn_mask.causal, attn_mask.left, attn_mask.right, attn_mask.align)
        tensors = (query, key, value, attn_mask.keep, bias, key_lengths, attn_mask.key_lengths)
    wants = needs_grad(*tensors)
    return recall("attention", tensors, backend, banded, wants, *options)


def _obstacle(args: tuple[Any, ...], return_lse: bool, return_weights: bool) -> str | None:
    query, key, value, mask, bias = args[:5]
    if (return_lse or return_weights) and needs_grad(query, key, value, bias):
        return "lse and weights carry gradients in the reference only"
    return obstacle((query, key, value, mask, bias))


def run(
    name: str, args: tuple[Any, ...], return_weights: bool = False, *, plain: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out, lse, weights)`` by backend ``name``, the weights where they are wanted.

    ``plain``: the call is known to be one in plain eager mode.
    """
    if name == "reference":
        out, lse, weights = reference.attention(*args)
        return out, lse, weights.to(out.dtype) if return_weights else None
    out, lse = _op.eager(*args, name) if plain else _op(*args, name)
    return out, lse, _weights(args, lse) if return_weights else None


def _weights(args: tuple[Any, ...], lse: Tensor) -> Tensor:
    """The attention weights, recomputed from the lse that the kernel returned."""
    query, key, _, mask, bias, key_lengths, rng, band_lower, band_upper, scale, softcap, dropout_p, *_ = args
    visible = visible_keys(query, key, mask, key_lengths, band_lower, band_upper)
    weights = attention_weights(attention_scores(query, key, visible, bias, scale, softcap), lse)
    if dropout_p > 0:
        weights = weights * reference.dropout_multiplier(weights.shape, rng, dropout_p, weights.dtype)
    return weights.to(query.dtype)


def _as_batches(query: Any, key: Any, value: Any, attn_mask: Any, bias: Any) -> tuple[Any, ...]:
    """Inputs of three dimensions or of five and more as four, the way torch's SDPA takes them."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating("attention", name, x)
        if x.dim() < 2:
            raise ValueError(f"attention: {name} must be [B,H,T,D], got {describe(x)}")
    if query.dim() == 4 and key.dim() == 4 and value.dim() == 4:
        return query, key, value, attn_mask, bias

    def four(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 4:
            return x
        return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)

    def expanded(x: Any) -> Any:  # a mask of a call with many leading dimensions loses its broadcasting
        if not isinstance(x, Tensor) or query.dim() <= 4 or x.dim() <= 3:
            return x
        return x.expand(*query.shape[:-3], *x.shape[-3:]).flatten(0, -4)

    return four(query), four(key), four(value), expanded(attn_mask), expanded(bias)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    B, H, _, D = query.shape
    G, S = key.shape[1:3]
    for name, x in (("key", key), ("value", value)):
        check_like("attention", name, x, "query", query)
    check_shape("attention", "key", key, (B, G, S, D), "[B,G,S,D]")
    check_shape("attention", "value", value, (B, G, S, value.shape[-1]), "[B,G,S,Dv]")
    check_head_counts("attention", H, G, enable_gqa)


def check_options(op: str, dropout_p: float, scale: float | None, softcap: float | None, causal_align: str) -> None:
    check_probability(op, "dropout_p", dropout_p)
    if scale is not None:
        check_finite(op, "scale", scale)
    if softcap is not None:
        check_finite(op, "softcap", softcap)
        if softcap < 0:
            raise ValueError(f"{op}: softcap must not be negative, got {softcap!r}")
    check_choice(op, "causal_align", causal_align, ALIGNMENTS)


def _combine(
    attn_mask: Tensor | Mask | None,
    bias: Tensor | None,
    is_causal: bool,
    window: Any,
    key_lengths: Tensor | None,
    causal_align: str,
    query: Tensor,
    full: tuple[int, ...],
) -> tuple[Mask, Tensor | None]:
    """Everything that masks as one Mask, and everything that is added to the scores as one tensor."""
    mask = attn_mask if isinstance(attn_mask, Mask) else EVERYTHING
    added = bias
    if isinstance(attn_mask, Tensor):
        check_broadcasts("attention", "attn_mask", attn_mask, full, _LETTERS)
        if attn_mask.dtype == torch.bool:
            mask = Mask(keep=attn_mask)
        elif attn_mask.is_floating_point():
            added = attn_mask if bias is None else attn_mask + bias
        else:
            raise TypeError(f"attention: attn_mask must be bool or floating point, got {describe(attn_mask)}")
    elif attn_mask is not None and not isinstance(attn_mask, Mask):
        raise TypeError(f"attention: attn_mask must be a tensor, a Mask or None, got {describe(attn_mask)}")
    if added is not None:
        check_floating("attention", "bias", added)
        check_broadcasts("attention", "bias", added, full, _LETTERS)
        check_device("attention", "bias", added, "query", query)
    if is_causal or window is not None:
        left, right = check_window("attention", window)
        mask = mask & Mask(bool(is_causal), left, right, mask.align or causal_align)
    if key_lengths is not None:
        mask = mask & _lengths(key_lengths)
    for name, x, wanted in (("attn_mask", mask.keep, full), ("key_lengths", mask.key_lengths, full[:1])):
        if x is not None:
            check_device("attention", name, x, "query", query)
            check_broadcasts("attention", name, x, wanted, _LETTERS if len(wanted) == 4 else "[B]")
    open_end = mask.align is None and (mask.causal or mask.left is not None or mask.right is not None)
    return mask.aligned(causal_align) if open_end else mask, added


def _lengths(key_lengths: Tensor) -> Mask:
    check_tensor("attention", "key_lengths", key_lengths)
    if key_lengths.dtype not in (torch.int32, torch.int64) or key_lengths.dim() != 1:
        raise TypeError(f"attention: key_lengths must be integer [B], got {describe(key_lengths)}")
    return Mask(key_lengths=key_lengths.to(torch.int64))


def _four_dimensional(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


def _returned(out: Tensor, lse: Tensor | None, weights: Tensor | None, lead: Any) -> Any:
    """The outputs that were asked for, with the query's own leading dimensions."""

    def shaped(x: Tensor) -> Tensor:
        return x if len(lead) == 2 else x.reshape(*lead, *x.shape[2:])

    found = [shaped(x) for x in (out, lse, weights) if x is not None]
    return found[0] if len(found) == 1 else tuple(found)
