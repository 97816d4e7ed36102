"""TransformerEncoderLayer and TransformerEncoder: torch's modules on the fused ops.

A post-norm layer runs as four ops: attention, dropout + residual + norm, feed-forward, dropout + residual + norm.
A submodule that somebody hooked, replaced or wrapped is called as a module instead, so hooks fire and adapters
work; so is an overridden ``_sa_block`` or ``_ff_block``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.masks import Mask
from pytransformer.nn._blocks import attend, layer_feed_forward, norm_takes_rows, run_block, takes_rows
from pytransformer.nn._masks import LayerMasks, Shape, combine, layer_masks, padding_of
from pytransformer.nn._nested import check_alone, to_nested, to_padded
from pytransformer.nn._packing import Rows, pack, worthwhile_rows
from pytransformer.nn._plain import is_plain
from pytransformer.nn.attention import MultiheadAttention
from pytransformer.nn.cache import Cache, LayerCache, SelfAttentionCache
from pytransformer.nn.ffn import Activation, activation_function, activation_name
from pytransformer.nn.layer_norm import LayerNorm, add_norm, add_prenorm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Post-norm: ``y = norm1(x + SA(x))``, ``out = norm2(y + FF(y))``;
    pre-norm: ``y = x + SA(norm1(x))``, ``out = y + FF(norm2(y))``.

    Constructor, parameters, initial weights and ``state_dict`` are those of ``torch.nn.TransformerEncoderLayer``;
    the fused form serves training and inference, every mask and both layouts alike.

    Args:
        d_model: E. nhead: H, a divisor of E. dim_feedforward: F.
        dropout: probability for attention weights, hidden and both branches, in training mode.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, or a callable; torch's own relu, gelu and
            silu are fused, another callable runs between two products.
        layer_norm_eps: added to the variance. batch_first: [B,L,E] instead of [L,B,E].
        norm_first: pre-norm. bias: give projections and norms biases. device, dtype: of the parameters.

    Raises:
        ValueError: the activation's name is unknown.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.1; pre-norm: Xiong et al., 2020, fig. 1.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        kwargs: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        # In torch's order, so that one seed gives the same initial weights.
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **kwargs)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **kwargs)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation_function(activation)
        # What torch's class keeps for its fast path; other code reads it.
        self.activation_relu_or_gelu = {"relu": 1, "gelu": 2}.get(activation_name(self.activation) or "", 0)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Args:
            src: [L,B,E], [B,L,E] with ``batch_first``, or [L,E] unbatched; floating point. Or a nested tensor, with
                ``batch_first`` and nothing else.
            src_mask: [L,L] or [B*H,L,L], bool (True = masked out) or floating point (added); or a
                ``pytransformer.masks.Mask`` (True = attend).
            src_key_padding_mask: [B,L], or [L] unbatched: bool (True = padding) or floating point (added).
            is_causal: in addition to ``src_mask``, which must be given (unless there is a cache), no query sees a key
                after its position.
            cache: of this layer, see ``pytransformer.nn.cache``; ``src`` then holds the new tokens alone, and the
                masks cover all of n cached and L new keys.

        Returns:
            The shape and layout of ``src``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: ``is_causal`` without ``src_mask``.
        """
        if src.is_nested:
            others = {"src_mask": src_mask, "src_key_padding_mask": src_key_padding_mask, "cache": cache}
            check_alone(type(self).__name__, "src", self.self_attn.batch_first, is_causal=is_causal, **others)
            x, padding = to_padded(src)
            return to_nested(self.forward(x, None, padding), padding, src)
        attention = (self, TransformerEncoderLayer, "_sa_block", self._attend, self.dropout1)
        feed_forward = (self, TransformerEncoderLayer, "_ff_block", self._feed_forward, self.dropout2)
        masks = (src_mask, src_key_padding_mask)
        given: dict[str, Any] = {"is_causal": is_causal, "cache": None if cache is None else cache.self_attention}
        x = src
        if self.norm_first:
            branch, dropout_p = run_block(*attention, self.norm1(x), *masks, **given)
            normed, x = add_prenorm(self.norm2, branch, x, dropout_p)
            branch, dropout_p = run_block(*feed_forward, normed)
            return x + F.dropout(branch, dropout_p)
        branch, dropout_p = run_block(*attention, x, *masks, **given)
        x = add_norm(self.norm1, branch, x, dropout_p)
        branch, dropout_p = run_block(*feed_forward, x)
        return add_norm(self.norm2, branch, x, dropout_p)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Any,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        out: Tensor = self.dropout1(self._attend(x, attn_mask, key_padding_mask, is_causal, cache))
        return out

    def _ff_block(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout2(self._feed_forward(x))
        return out

    def _attend(self, x: Tensor, attn_mask: Any, padding: Any, is_causal: bool, cache: Any = None) -> Tensor:
        return attend(self.self_attn, x, x, attn_mask, padding, is_causal, cache)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return layer_feed_forward(self, x)


class TransformerEncoder(nn.TransformerEncoder):
    """``out = norm(layer_N(... layer_1(src)))``.

    Constructor, parameters and ``state_dict`` are those of ``torch.nn.TransformerEncoder``. Masks are prepared once
    and handed to every layer, and padding is not computed at all: with a ``src_key_padding_mask``, or a ``Mask`` with
    ``masks.padding`` in it, only the real tokens go through the layers, forward and backward, in training and
    inference, wherever they stand. See ``pytransformer.nn._packing`` for when; the results are the same in any case.

    Args:
        encoder_layer: the layer to copy ``num_layers`` times; all copies start with its weights, as in torch.
        num_layers: N. norm: applied at the end, or None.
        enable_nested_tensor: skip padding; the output is then 0 at padded positions, always. With False they are
            computed like any other.
        mask_check: no effect; padding may stand anywhere.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.1.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # False: torch's class would go through its fast path's conditions and warn about them.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: Cache | None = None,
        skip_padding: bool | None = None,
    ) -> Tensor:
        """Args:
            src: [L,B,E], [B,L,E] where the layers are ``batch_first``, or [L,E] unbatched; floating point. Or a nested
                tensor, with ``batch_first`` and nothing else.
            mask: [L,L] or [B*H,L,L], bool (True = masked out) or floating point (added); or a
                ``pytransformer.masks.Mask`` (True = attend).
            src_key_padding_mask: [B,L], or [L] unbatched: bool (True = padding) or floating point (added).
            is_causal: in addition to ``mask``, which must be given (unless there is a cache), no query sees a key
                after its position. With None a causal ``mask`` is recognised and not read any further (in eager
                mode), and with a cache None means True.
            cache: of all layers, see ``pytransformer.nn.cache``; ``src`` then holds the new tokens alone, the masks
                cover all of n cached and L new keys, and padding is computed. This is how a decoder-only model
                writes.
            skip_padding: ``enable_nested_tensor``, for this call.

        Returns:
            The shape and layout of ``src``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: ``is_causal`` without ``mask``.
        """
        if src.is_nested:
            others = {
                "mask": mask,
                "src_key_padding_mask": src_key_padding_mask,
                "is_causal": is_causal,
                "cache": cache,
            }
            check_alone(type(self).__name__, "src", self._first_attention.batch_first, **others)
            x, padding = to_padded(src)
            return to_nested(self.forward(x, None, padding), padding, src)
        causal = cache is not None if is_causal is None else is_causal
        given, shape = self._prepare(src, LayerMasks(mask, src_key_padding_mask, causal), cache)
        skip = self.enable_nested_tensor if skip_padding is None else skip_padding
        hidden = padding_of(src_key_padding_mask, mask, shape, src.dim() == 3) if skip and cache is None else None
        if hidden is None:
            return self._run(src, given, cache)
        batch_second = src.dim() == 3 and not self._first_attention.batch_first
        packable = src.dim() == 3 and (self.norm is None or norm_takes_rows(self.norm))
        rows = skippable_rows(self.layers, ~hidden, src) if packable else None
        if rows is None:
            return self._run(src, given).masked_fill((hidden.mT if batch_second else hidden)[..., None], 0)
        packed: Any = pack(rows, rows, *combine(*given, shape))
        x = rows.gather(src.transpose(0, 1) if batch_second else src)
        out = rows.scatter(self._run(x, LayerMasks(packed, None, False)))
        return out.transpose(0, 1) if batch_second else out

    def _run(self, x: Tensor, given: LayerMasks, cache: Cache | None = None) -> Tensor:
        """All layers and the norm."""
        for index, layer in enumerate(self.layers):
            kwargs = {} if cache is None else {"cache": cache.layer(index)}
            x = layer(
                x,
                src_mask=given.attn_mask,
                is_causal=given.is_causal,
                src_key_padding_mask=given.key_padding_mask,
                **kwargs,
            )
        return x if self.norm is None else self.norm(x)

    def _prepare(self, src: Tensor, given: LayerMasks, cache: Cache | None = None) -> tuple[LayerMasks, Shape]:
        """The masks as every layer takes them, and the shape of the scores."""
        batched = src.dim() == 3
        axis = 1 if batched and self._first_attention.batch_first else 0
        B, L = src.shape[1 - axis] if batched else 1, src.shape[axis]
        held = 0 if cache is None else cache.layer(0).self_attention.length
        shape = (B, self._first_attention.num_heads, L, held + L)
        mergeable = all(_takes_masks(layer) for layer in self.layers)
        align = None if cache is None else "bottom_right"
        return layer_masks(given, shape, mergeable, batched, recognise=True, align=align), shape

    @property
    def _first_attention(self) -> Any:
        return self.layers[0].self_attn


def _takes_masks(layer: Any) -> bool:
    """May ``layer`` be handed a ``Mask`` in place of a tensor, with nobody else seeing it?"""
    return (
        is_plain(layer, (TransformerEncoderLayer,))
        and is_plain(layer.self_attn, (MultiheadAttention,))
        and "_sa_block" not in layer.__dict__
    )


def skippable_rows(layers: Iterable[nn.Module], real: Tensor, x: Tensor) -> Rows | None:
    """The rows of bool ``real`` [B,L] if running ``layers`` on these rows of ``x`` [B,L,E] alone is worth while and
    noticed by nobody; they are then given a ``Packed`` for a mask."""
    if not all(_takes_masks(layer) and takes_rows(layer) for layer in layers):
        return None
    return worthwhile_rows(real, x)
