"""What incremental decoding hands to the attention: protocols, no implementation.

A decoder that writes one token at a time needs the keys and values of the tokens before it, and those of the
memory, which never change. A cache keeps both. ``TransformerDecoder`` takes one for all its layers, a layer the
part that is its own, ``MultiheadAttention`` one of the two kinds below. ``pytransformer.generation`` has caches
of these shapes; any object with the same members will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class SelfAttentionCache(Protocol):
    """The keys and values of the tokens so far."""

    @property
    def length(self) -> int:
        """How many tokens are held."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps those of new tokens, [B,H,T,D] each, and returns those of all tokens, [B,H,length + T,D]."""


class CrossAttentionCache(Protocol):
    """The keys and values of the memory."""

    def get(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What ``compute`` returns, [B,H,S,D] each: called the first time, remembered from then on."""


class LayerCache(Protocol):
    """Both kinds, for one layer. A layer without cross-attention never looks at the second."""

    @property
    def self_attention(self) -> SelfAttentionCache: ...

    @property
    def cross_attention(self) -> CrossAttentionCache: ...


class Cache(Protocol):
    """A cache for a stack of layers."""

    def layer(self, index: int) -> LayerCache: ...
