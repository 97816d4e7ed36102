"""What encoder and decoder layers share: their parts, and calling a block fused or as torch would.

A layer is a chain of blocks (attention, cross-attention, feed-forward), each with a dropout after it. torch calls
the block's method, ``_sa_block`` and so on, which a subclass may override. Where nobody has and the dropout is
plain, the block's inner function is called instead and its dropout left to the norm that follows, which applies
dropout, residual and norm in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pytransformer.nn._plain import DROPOUT, LINEAR, active_dropout, is_plain
from pytransformer.nn.attention import MultiheadAttention, attention_takes_rows
from pytransformer.nn.cache import CrossAttentionCache, SelfAttentionCache
from pytransformer.nn.ffn import ACTIVATIONS, activation_name, feed_forward
from pytransformer.nn.layer_norm import NORMS


def run_block(
    layer: nn.Module, owner: type, name: str, inner: Callable[..., Tensor], dropout: Any, *args: Any, cache: Any = None
) -> tuple[Tensor, float]:
    """The output of block ``name``, and the probability of the dropout that is still to be applied to it."""
    kwargs = {} if cache is None else {"cache": cache}
    if is_own(layer, owner, name) and is_plain(dropout, DROPOUT):
        return inner(*args, **kwargs), active_dropout(dropout)
    return getattr(layer, name)(*args, **kwargs), 0.0


def is_own(layer: nn.Module, owner: type, name: str) -> bool:
    """Is the method ``owner``'s, not a subclass's or an instance's?"""
    return name not in layer.__dict__ and getattr(type(layer), name) is getattr(owner, name)


def attend(
    attention: Any,
    query: Tensor,
    memory: Tensor,
    attn_mask: Any,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    cache: SelfAttentionCache | CrossAttentionCache | None,
) -> Tensor:
    """``attention(query, memory, memory)`` without its weights."""
    kwargs = {} if cache is None else {"cache": cache}  # torch's own module and its likes know no cache
    out: Tensor = attention(
        query,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
        **kwargs,
    )[0]
    return out


def takes_rows(layer: Any) -> bool:
    """Would nobody notice if ``layer``, whose masks nobody else sees, got rows [N,E] in place of a batch [B,L,E]?"""
    return (
        activation_name(layer.activation) is not None
        and "_ff_block" not in layer.__dict__
        and all(_child_takes_rows(child) for child in layer.children())
    )


def _child_takes_rows(module: Any) -> bool:
    if isinstance(module, MultiheadAttention):
        return attention_takes_rows(module)
    return norm_takes_rows(module) or is_plain(module, (*LINEAR, *DROPOUT, *ACTIVATIONS))


def norm_takes_rows(norm: Any) -> bool:
    return is_plain(norm, NORMS) and len(norm.normalized_shape) == 1


def layer_feed_forward(layer: Any, x: Tensor) -> Tensor:
    return feed_forward(x, layer.linear1, layer.activation, layer.dropout, layer.linear2)
