"""TransformerDecoderLayer and TransformerDecoder: torch's modules on the fused ops, with an optional cache.

A post-norm layer runs as six ops: self-attention, cross-attention and feed-forward, each followed by dropout +
residual + norm. As in the encoder, a submodule that somebody hooked, replaced or wrapped is called as a module,
and so is an overridden ``_sa_block``, ``_mha_block`` or ``_ff_block``.

With a cache the decoder is given the new tokens alone. Their keys and values join those kept from the calls
before, the memory is projected once, and masks count positions from the end: the last query sits at the last key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.masks import Mask
from pytransformer.nn._blocks import attend, layer_feed_forward, norm_takes_rows, run_block, takes_rows
from pytransformer.nn._masks import LayerMasks, Shape, combine, layer_masks, padding_of
from pytransformer.nn._packing import Rows, pack, worthwhile_rows
from pytransformer.nn._plain import is_plain
from pytransformer.nn.attention import MultiheadAttention
from pytransformer.nn.cache import Cache, CrossAttentionCache, LayerCache, SelfAttentionCache
from pytransformer.nn.ffn import Activation, activation_function
from pytransformer.nn.layer_norm import LayerNorm, add_norm, add_prenorm


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Post-norm: ``y = norm1(x + SA(x))``, ``z = norm2(y + CA(y, memory))``, ``out = norm3(z + FF(z))``;
    pre-norm: ``y = x + SA(norm1(x))``, ``z = y + CA(norm2(y), memory)``, ``out = z + FF(norm3(z))``.

    Constructor, parameters, initial weights and ``state_dict`` are those of ``torch.nn.TransformerDecoderLayer``.

    Args:
        d_model: E. nhead: H, a divisor of E. dim_feedforward: F.
        dropout: probability for attention weights, hidden and all branches, in training mode.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, or a callable; torch's own relu, gelu and
            silu are fused, another callable runs between two products. One that is a module stays in copies of the
            layer, as in a ``TransformerDecoder``, where torch's own layer goes over to relu.
        layer_norm_eps: added to the variance. batch_first: [B,T,E] instead of [T,B,E].
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
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **kwargs)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **kwargs)
        self.norm3 = LayerNorm(d_model, layer_norm_eps, **kwargs)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = activation_function(activation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's decoder layer takes an activation that is a module for missing, and every copy of it for a relu.
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Args:
            tgt: [T,B,E], [B,T,E] with ``batch_first``, or [T,E] unbatched; floating point.
            memory: the encoder's output, the same with length S.
            tgt_mask: [T,T] or [B*H,T,T], bool (True = masked out) or floating point (added); or a
                ``pytransformer.masks.Mask`` (True = attend). With a cache of n tokens, n + T in place of the last T.
            memory_mask: [T,S] or [B*H,T,S], likewise.
            tgt_key_padding_mask: [B,T], or [T] unbatched: bool (True = padding) or floating point (added). With a
                cache of n tokens it covers all n + T.
            memory_key_padding_mask: [B,S] or [S], likewise.
            tgt_is_causal: in addition to ``tgt_mask``, which must be given (unless there is a cache), no query
                sees a key after its position.
            memory_is_causal: the same for the memory and ``memory_mask``; not with a cache.
            cache: of this layer, see ``pytransformer.nn.cache``; ``tgt`` then holds the new tokens alone.

        Returns:
            The shape and layout of ``tgt``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: a causal hint without its mask.
        """
        if tgt.is_nested or memory.is_nested:
            raise TypeError(f"{type(self).__name__}: tgt and memory must not be nested tensors; pass padded ones")
        own = TransformerDecoderLayer
        attention = (self, own, "_sa_block", self._self_attend, self.dropout1)
        target = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (self, own, "_mha_block", self._cross_attend, self.dropout2)
        source = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        feed_forward = (self, own, "_ff_block", self._feed_forward, self.dropout3)
        kept, kept_memory = (None, None) if cache is None else (cache.self_attention, cache.cross_attention)
        x = tgt
        if self.norm_first:
            branch, dropout_p = run_block(*attention, self.norm1(x), *target, cache=kept)
            normed, x = add_prenorm(self.norm2, branch, x, dropout_p)
            branch, dropout_p = run_block(*cross, normed, *source, cache=kept_memory)
            normed, x = add_prenorm(self.norm3, branch, x, dropout_p)
            branch, dropout_p = run_block(*feed_forward, normed)
            return x + F.dropout(branch, dropout_p)
        branch, dropout_p = run_block(*attention, x, *target, cache=kept)
        x = add_norm(self.norm1, branch, x, dropout_p)
        branch, dropout_p = run_block(*cross, x, *source, cache=kept_memory)
        x = add_norm(self.norm2, branch, x, dropout_p)
        branch, dropout_p = run_block(*feed_forward, x)
        return add_norm(self.norm3, branch, x, dropout_p)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Any,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        out: Tensor = self.dropout1(self._self_attend(x, attn_mask, key_padding_mask, is_causal, cache))
        return out

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Any,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        cache: CrossAttentionCache | None = None,
    ) -> Tensor:
        out: Tensor = self.dropout2(self._cross_attend(x, mem, attn_mask, key_padding_mask, is_causal, cache))
        return out

    def _ff_block(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout3(self._feed_forward(x))
        return out

    def _self_attend(self, x: Tensor, attn_mask: Any, padding: Any, is_causal: bool, cache: Any = None) -> Tensor:
        return attend(self.self_attn, x, x, attn_mask, padding, is_causal, cache)

    def _cross_attend(
        self, x: Tensor, memory: Tensor, attn_mask: Any, padding: Any, is_causal: bool, cache: Any = None
    ) -> Tensor:
        return attend(self.multihead_attn, x, memory, attn_mask, padding, is_causal, cache)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return layer_feed_forward(self, x)


class TransformerDecoder(nn.TransformerDecoder):
    """``out = norm(layer_N(... layer_1(tgt, memory), memory))``.

    Constructor, parameters and ``state_dict`` are those of ``torch.nn.TransformerDecoder``. Masks are prepared once
    and handed to every layer. Padding of the memory, named by ``memory_key_padding_mask`` or a ``Mask`` with
    ``masks.padding`` in it, is not projected, and padding in the target not computed if that is wanted; see
    ``pytransformer.nn._packing`` for when.

    Args:
        decoder_layer: the layer to copy ``num_layers`` times; all copies start with its weights, as in torch.
        num_layers: N. norm: applied at the end, or None.
        enable_nested_tensor: an extra: skip padding in the target, where the output is then 0, always. By default it
            is computed like anything else.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.1.
    """

    enable_nested_tensor = False  # of a torch decoder whose class was changed

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        enable_nested_tensor: bool = False,
    ) -> None:
        super().__init__(decoder_layer, num_layers, norm)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: Cache | None = None,
        skip_padding: bool | None = None,
    ) -> Tensor:
        """Args:
            tgt: [T,B,E], [B,T,E] where the layers are ``batch_first``, or [T,E] unbatched; floating point.
            memory: the encoder's output, the same with length S.
            tgt_mask: [T,T] or [B*H,T,T], bool (True = masked out) or floating point (added); or a
                ``pytransformer.masks.Mask`` (True = attend). With a cache of n tokens, n + T in place of the last T.
            memory_mask: [T,S] or [B*H,T,S], likewise.
            tgt_key_padding_mask: [B,T], or [T] unbatched: bool (True = padding) or floating point (added). With a
                cache of n tokens it covers all n + T.
            memory_key_padding_mask: [B,S] or [S], likewise.
            tgt_is_causal: in addition to ``tgt_mask``, which must be given (unless there is a cache), no query
                sees a key after its position. With None a causal ``tgt_mask`` is recognised and not read any
                further (in eager mode), and with a cache None means True.
            memory_is_causal: the same for the memory and ``memory_mask``; not with a cache.
            cache: of all layers, see ``pytransformer.nn.cache``; ``tgt`` then holds the new tokens alone, and padding
                is computed.
            skip_padding: ``enable_nested_tensor``, for this call.

        Returns:
            The shape and layout of ``tgt``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: a causal hint without its mask.
        """
        if tgt.is_nested or memory.is_nested:
            raise TypeError(f"{type(self).__name__}: tgt and memory must not be nested tensors; pass padded ones")
        is_causal = cache is not None if tgt_is_causal is None else tgt_is_causal
        target = LayerMasks(tgt_mask, tgt_key_padding_mask, is_causal)
        source = LayerMasks(memory_mask, memory_key_padding_mask, memory_is_causal)
        (target, shape), (source, memory_shape) = self._prepare(tgt, memory, target, source, cache)
        skip = self.enable_nested_tensor if skip_padding is None else skip_padding
        batched = tgt.dim() == 3
        hidden = padding_of(tgt_key_padding_mask, tgt_mask, shape, batched) if skip and cache is None else None
        hidden_memory = padding_of(memory_key_padding_mask, memory_mask, memory_shape, batched)
        batch_second = batched and not self._first_attention.batch_first
        found = None if cache is not None else self._rows(tgt, memory, hidden, hidden_memory, memory_shape)
        if found is None:
            out = self._run(tgt, memory, target, source, cache)
            return out if hidden is None else out.masked_fill((hidden.mT if batch_second else hidden)[..., None], 0)
        rows, memory_rows = found
        own: Any = pack(rows, rows, *combine(*target, shape))
        cross: Any = pack(rows, memory_rows, *combine(*source, memory_shape))
        x, m = (x.transpose(0, 1) if batch_second else x for x in (tgt, memory))
        packed = LayerMasks(own, None, False), LayerMasks(cross, None, False)
        out = rows.scatter(self._run(rows.gather(x), memory_rows.gather(m), *packed))
        return out.transpose(0, 1) if batch_second else out

    def _run(
        self, x: Tensor, memory: Tensor, target: LayerMasks, source: LayerMasks, cache: Cache | None = None
    ) -> Tensor:
        """All layers and the norm."""
        for index, layer in enumerate(self.layers):
            kwargs = {} if cache is None else {"cache": cache.layer(index)}
            x = layer(
                x,
                memory,
                tgt_mask=target.attn_mask,
                memory_mask=source.attn_mask,
                tgt_key_padding_mask=target.key_padding_mask,
                memory_key_padding_mask=source.key_padding_mask,
                tgt_is_causal=target.is_causal,
                memory_is_causal=source.is_causal,
                **kwargs,
            )
        return x if self.norm is None else self.norm(x)

    def _prepare(
        self, tgt: Tensor, memory: Tensor, target: LayerMasks, source: LayerMasks, cache: Cache | None
    ) -> tuple[tuple[LayerMasks, Shape], tuple[LayerMasks, Shape]]:
        """Both kinds of masks as every layer takes them, each with the shape of its scores."""
        batched = tgt.dim() == 3
        axis = 1 if batched and self._first_attention.batch_first else 0
        B, T, S = tgt.shape[1 - axis] if batched else 1, tgt.shape[axis], memory.shape[axis]
        held = 0 if cache is None else cache.layer(0).self_attention.length
        mergeable = all(_takes_masks(layer) for layer in self.layers)
        align = None if cache is None else "bottom_right"
        H = self._first_attention.num_heads
        shape, memory_shape = (B, H, T, held + T), (B, H, T, S)
        target = layer_masks(target, shape, mergeable, batched, recognise=True, align=align)
        return (target, shape), (layer_masks(source, memory_shape, mergeable, batched), memory_shape)

    def _rows(
        self, tgt: Tensor, memory: Tensor, hidden: Tensor | None, hidden_memory: Tensor | None, shape: Shape
    ) -> tuple[Rows, Rows] | None:
        """The rows to compute of target and memory, or None where that had better be all of them."""
        batch_axis = 0 if self._first_attention.batch_first else 1
        if tgt.dim() != 3 or memory.dim() != 3 or memory.shape[batch_axis] != tgt.shape[batch_axis]:
            return None  # without a batch, or with two; the attention says so
        if hidden is None and hidden_memory is None:
            return None
        if not all(_takes_masks(layer) and takes_rows(layer) for layer in self.layers):
            return None
        if self.norm is not None and not norm_takes_rows(self.norm):
            return None
        rows, memory_rows = (
            None if padded is None else worthwhile_rows(~padded, tgt, memory) for padded in (hidden, hidden_memory)
        )
        if rows is None and memory_rows is None:
            return None
        B, _, T, S = shape
        return rows or Rows(None, B, T), memory_rows or Rows(None, B, S)

    @property
    def _first_attention(self) -> Any:
        return self.layers[0].self_attn


def _takes_masks(layer: Any) -> bool:
    """May ``layer`` be handed a ``Mask`` in place of a tensor, with nobody else seeing it?"""
    return (
        is_plain(layer, (TransformerDecoderLayer,))
        and all(is_plain(attention, (MultiheadAttention,)) for attention in (layer.self_attn, layer.multihead_attn))
        and "_sa_block" not in layer.__dict__
        and "_mha_block" not in layer.__dict__
    )
