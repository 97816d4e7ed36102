"""MultiheadAttention: torch's module on the fused attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import ops
from pytransformer.masks import Mask, dense
from pytransformer.nn._linear import apply_linear, linear
from pytransformer.nn._masks import combine
from pytransformer.nn._nested import check_alone, to_nested, to_padded
from pytransformer.nn._packing import Packed
from pytransformer.nn._plain import LINEAR, is_plain
from pytransformer.nn.cache import CrossAttentionCache, SelfAttentionCache
from pytransformer.ops.attention import visible_keys


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``out = concat(head_1, ..., head_H) Wo^T + bo``, ``head_h = softmax(q_h k_h^T / sqrt(D)) v_h``.

    Constructor, parameters, initial weights and ``state_dict`` are those of ``torch.nn.MultiheadAttention``.

    Args:
        embed_dim: E, the size of the query and of the output. num_heads: H, a divisor of E.
        dropout: probability of dropping an attention weight, in training mode.
        bias: give the projections biases. add_bias_kv: append a learned key and value to every sequence.
        add_zero_attn: append a key and value of zeros. kdim, vdim: sizes of key and value, E where None.
        batch_first: inputs and outputs are [B,L,E] instead of [L,B,E].
        device, dtype: of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{type(self).__name__}: num_heads must be positive and divide embed_dim, got {num_heads} and"
                f" {embed_dim}"
            )
        extras = (bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, dropout, *extras)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: SelfAttentionCache | CrossAttentionCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from ``query`` to ``key`` and ``value``.

        Args:
            query: [L,B,E], [B,L,E] with ``batch_first``, or [L,E] unbatched; floating point. Or a nested tensor,
                with ``batch_first``, itself the key and value, and no mask.
            key: [S,B,kdim], [B,S,kdim] or [S,kdim]. value: the same with vdim.
            key_padding_mask: [B,S], or [S] unbatched: bool (True = masked out) or floating point (added).
            need_weights: also return the attention weights. They cost memory and keep the call, when it is
                differentiated, off the compiled kernels; pass False unless they are used.
            attn_mask: [L,S] or [B*H,L,S], bool (True = masked out) or floating point (added; differentiable);
                or a ``pytransformer.masks.Mask`` (True = attend), which torch does not know.
            average_attn_weights: average the weights over the heads.
            is_causal: in addition to ``attn_mask``, which must be given (unless there is a cache), no query sees a
                key after its position.
            cache: see ``pytransformer.nn.cache``. One of self-attention holds n keys: query, key and value are the
                new tokens alone, S is n + L in masks and weights, and causal masks and windows put the last query
                at the last key. One of cross-attention is asked for the projected key and value, which are then
                looked at in the first call alone; causal masks and windows have no meaning there.

        Returns:
            ``(out, weights)``: ``out`` in the query's layout; ``weights`` [B,L,S] averaged or [B,H,L,S], after
            dropout, without B when unbatched, None unless asked for. S counts the keys that ``add_bias_kv`` and
            ``add_zero_attn`` append.

        Numerics:
            As ``ops.attention``: a query whose keys are all masked out gets ``bo`` and weights of 0, never NaN.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        if isinstance(attn_mask, Packed):
            return self._forward_rows(query, key, attn_mask), None
        if query.is_nested or key.is_nested or value.is_nested:
            others = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "cache": cache}
            return self._forward_nested(query, key, value, need_weights, average_attn_weights, others)
        batched = self._check(query, key, value, cache)
        if not batched:
            query, key, value = self._with_batch(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v, align = self._project_and_keep(query, key, value, cache)
        mask, added = combine(attn_mask, key_padding_mask, is_causal, (*q.shape[:3], k.shape[2]), align)
        if cache is not None and align is None and mask.band(1, 1) != (None, None):
            raise ValueError(
                f"{type(self).__name__}: a causal mask or window over cached memory, where a query's position is"
                " unknown; pass its rows of attn_mask as a tensor"
            )
        if self.bias_k is not None or self.add_zero_attn:
            k, v, mask, added = self._append_keys(q, k, v, mask, added)
        out, weights = self._attend(q, k, v, mask, added, need_weights)
        out = apply_linear(self.out_proj, self._join_heads(out))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights[0]
        return out, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, cache: Any) -> bool:
        """Shapes as wanted? True if batched."""
        name, axis, dims = type(self).__name__, 0 if self.batch_first else 1, query.dim()
        for what, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != dims or dims not in (2, 3) or x.shape[-1] != size:
                layout = "[B,L,E]" if self.batch_first else "[L,B,E]"
                raise ValueError(
                    f"{name}: {what} must be {layout} or [L,E] with size {size} last, got {list(x.shape)}"
                    f" (query is {list(query.shape)})"
                )
        batched = dims == 3
        if cache is not None and not hasattr(cache, "append"):
            return batched  # key and value may have been projected long ago, for fewer rows
        if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[axis] != query.shape[axis]):
            raise ValueError(
                f"{name}: batch and length must agree, got query {list(query.shape)}, key {list(key.shape)} and"
                f" value {list(value.shape)} with batch_first={self.batch_first}"
            )
        return batched

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool, others: Mapping[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of different lengths; weights are padded, with 0."""
        name = type(self).__name__
        if query is not key or key is not value:
            raise TypeError(f"{name}: nested tensors need query, key and value to be one; pass padded ones")
        check_alone(name, "query", self.batch_first, **others)
        x, padding = to_padded(query)
        out, weights = self.forward(x, x, x, padding, need_weights, None, average)
        if weights is not None:
            weights = weights.masked_fill((padding[:, :, None] if average else padding[:, None, :, None]), 0)
        return to_nested(out, padding, query), weights

    def _with_batch(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unbatched inputs with a batch of one; what was one tensor stays one."""
        axis = 0 if self.batch_first else 1
        batched_query = query.unsqueeze(axis)
        batched_key = batched_query if key is query else key.unsqueeze(axis)
        return batched_query, batched_key, batched_key if value is key else value.unsqueeze(axis)

    def _project_and_keep(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor, Tensor, str | None]:
        """Queries, all keys and all values, each [B,H,length,D], and the alignment of causal masks."""
        if cache is None:
            return *self._project(query, key, value), None
        if hasattr(cache, "append"):
            q, k, v = self._project(query, key, value)
            k, v = cache.append(k, v)
            align = "bottom_right"
        elif hasattr(cache, "get"):
            q = self._project_query(query)
            k, v = cache.get(lambda: self._project_memory(key, value))
            align = None
        else:
            raise TypeError(
                f"{type(self).__name__}: cache must have append (self-attention) or get (cross-attention), got a"
                f" {type(cache).__name__}; a stack takes the whole cache, a layer cache.layer(i)"
            )
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: cache holds a batch of {k.shape[0]}, query has one of {q.shape[0]}"
            )
        return q, k, v, align

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B,H,length,D]: views of the projections, nothing is copied."""
        if query is key and key is value and self.in_proj_weight is not None:
            x = linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = x.view(*x.shape[:-1], 3, self.num_heads, self.head_dim).unbind(2)
            return self._heads_first(q), self._heads_first(k), self._heads_first(v)
        return self._project_query(query), *self._project_memory(key, value)

    def _project_query(self, query: Tensor) -> Tensor:
        E, bias = self.embed_dim, self.in_proj_bias
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight[:E]
        return self._split_heads(linear(query, weight, None if bias is None else bias[:E]))

    def _project_memory(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if key is value and weight is not None:
            k, v = linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, -1)
        else:
            weights = (self.k_proj_weight, self.v_proj_weight) if weight is None else weight[E:].chunk(2)
            biases = (None, None) if bias is None else bias[E:].chunk(2)
            k, v = (linear(*args) for args in zip((key, value), weights, biases, strict=True))
        return self._split_heads(k), self._split_heads(v)

    def _split_heads(self, x: Tensor) -> Tensor:
        return self._heads_first(x.view(*x.shape[:-1], self.num_heads, self.head_dim))

    def _heads_first(self, heads: Tensor) -> Tensor:
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor) -> Tensor:
        heads_last = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return heads_last.reshape(*heads_last.shape[:2], self.embed_dim)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, added: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(out [B,H,L,D], weights [B,H,L,S])``. A subclass with other scores overrides this."""
        return self._fused(q, k, v, mask, added, need_weights)

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        added: Tensor | None,
        need_weights: bool,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        found = ops.attention(q, k, v, mask, dropout_p, scale=scale, bias=added, return_weights=need_weights)
        return found if need_weights else (found, None)

    def _forward_rows(self, query: Tensor, memory: Tensor, packed: Packed) -> Tensor:
        """The output [N,E] of a query [N,E] and a memory [M,E] of rows."""
        E, H, weight, bias = self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias
        for x in (query, memory):
            if x.shape[-1] != E:
                raise ValueError(f"{type(self).__name__}: inputs must have size {E} last, got {x.shape[-1]}")
        if query is memory:
            q, k, v = linear(query, weight, bias).view(-1, 3, H, self.head_dim).unbind(1)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:E], bias[E:])
            q = linear(query, weight[:E], q_bias).view(-1, H, self.head_dim)
            k, v = linear(memory, weight[E:], kv_bias).view(-1, 2, H, self.head_dim).unbind(1)
        attend = self._attend_in_batch if packed.sequences is None else self._attend_end_to_end
        return apply_linear(self.out_proj, attend(q, k, v, packed).flatten(1))

    def _attend_end_to_end(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        """Rows [N,H,D] of queries [N,H,D], keys and values [M,H,D]."""
        where = packed.sequences
        assert where is not None
        out: Tensor = ops.attention_varlen(
            q,
            k,
            v,
            where.cu_seq_q,
            where.cu_seq_k,
            where.max_q,
            where.max_k,
            is_causal=where.is_causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out

    def _attend_in_batch(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        """The same, with the whole batch before the attention, under any mask."""
        queries, keys = packed.queries, packed.keys
        q, k, v = (rows.scatter(x).transpose(1, 2) for rows, x in ((queries, q), (keys, k), (keys, v)))
        attended, _ = self._attend(q, k, v, packed.mask, packed.added, need_weights=False)
        return queries.gather(attended.transpose(1, 2))

    def _append_keys(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, added: Tensor | None
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
        """The learned key and the key of zeros, seen by every query whatever the mask."""
        mask = mask.aligned("top_left")
        visible = visible_keys(q, k, mask.keep, mask.key_lengths, *mask.band(q.shape[2], k.shape[2]))
        before = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            k, v = (
                torch.cat([x, extra.view(shape).to(x.dtype).expand(x.shape[0], -1, -1, -1)], 2)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        count = k.shape[2] - before
        mask = Mask() if visible is None else dense(F.pad(visible, (0, count), value=True))
        return k, v, mask, None if added is None else F.pad(added, (0, count))


def attention_takes_rows(attention: Any) -> bool:
    """Can ``attention`` be given rows and a ``Packed``?"""
    return (
        is_plain(attention, (MultiheadAttention,))
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and is_plain(attention.out_proj, LINEAR)
    )
