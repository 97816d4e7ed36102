"""Key/value caches: what decoding remembers, so that a step computes its new token alone.

**Contiguous, growing.** A layer's keys are one tensor [B,H,C,D] with room for C tokens, of which the first
``length`` are written; the attention gets a view of those. When the room is used up it doubles, so over a whole
decoding every key is copied less than twice, and a step copies nothing but its own new keys.

**Cross-attention once.** The projections of the memory are computed by the first step and kept.

**Beams are queries, and reorder by index.** The K beams of a sentence do not get K caches. They are K queries of one
sequence: the prompt's keys and the memory's exist once and are read once for all beams, every step appends one key
for each beam, and a bool table says which of the appended keys lie on which beam's path. When beams are reordered,
rows of that table move (``Ancestry.advance``); keys and values never do. Per step this reads P + K T keys, for a
prompt of P and T steps, where caches of their own would read K (P + T), and reordering them would copy as much again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST_CAPACITY = 32


class GrowingKeyValue:
    """The keys and values of all tokens so far, of one layer.

    Attributes:
        length: how many tokens are held.
    """

    def __init__(self) -> None:
        self.length = 0
        self._storage: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """How many tokens fit before the storage must grow."""
        return 0 if self._storage is None else self._storage[0].shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys [B,H,T,D] and values [B,H,T,Dv] of new tokens behind the others.

        Returns:
            The keys [B,H,length,D] and values [B,H,length,Dv] of all tokens: views, valid until the next call.

        Raises:
            ValueError: batch, heads or size are not those of the tokens before, or a gradient is wanted.
            TypeError: so is the dtype.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("cache: keeps no gradients; decode under torch.no_grad() or torch.inference_mode()")
        if self._storage is not None:
            for name, x, held in zip(("key", "value"), (key, value), self._storage, strict=True):
                _check_like(name, x, held)
        end = self.length + key.shape[2]
        if end > self.capacity or self._storage is None:
            self._grow(key, value, max(end, 2 * self.capacity, _FIRST_CAPACITY))
        assert self._storage is not None
        found = []
        for x, held in zip((key, value), self._storage, strict=True):
            held[:, :, self.length : end] = x
            found.append(held[:, :, :end])
        self.length = end
        return found[0], found[1]

    def _grow(self, key: Tensor, value: Tensor, capacity: int) -> None:
        old = self._storage
        self._storage = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        assert self._storage is not None
        for i in range(2 if old is not None else 0):
            self._storage[i][:, :, : self.length] = old[i][:, :, : self.length]  # type: ignore[index]


class ComputedOnce:
    """The keys and values of the memory, of one layer."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def get(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What ``compute`` returned the first time."""
        if self._held is None:
            self._held = compute()
        return self._held


class LayerCache:
    """One layer's part of a ``Cache``.

    Attributes:
        self_attention: of the tokens so far.
        cross_attention: of the memory.
    """

    def __init__(self) -> None:
        self.self_attention = GrowingKeyValue()
        self.cross_attention = ComputedOnce()


class Cache:
    """What a stack of decoder layers remembers of the tokens it has read; for one batch.

    ``models.Gpt``, ``models.Transformer`` and ``nn.TransformerDecoder`` take it as ``cache=``, and then want the new
    tokens alone::

        cache = Cache()
        out = decoder(prompt, memory, cache=cache)      # reads the prompt
        out = decoder(next_token, memory, cache=cache)  # one step; causal by itself
    """

    def __init__(self) -> None:
        self._layers: list[LayerCache] = []

    @property
    def length(self) -> int:
        """How many tokens are held."""
        return self.layer(0).self_attention.length

    def layer(self, index: int) -> LayerCache:
        """The part of one layer; made when it is first asked for."""
        while len(self._layers) <= index:
            self._layers.append(LayerCache())
        return self._layers[index]


class Ancestry:
    """Which of the cached keys lie on the path of each beam.

    Args:
        prompt: bool [B,P], the prompt's keys that are no padding; every beam sees them.
        beams: K.
        steps: how many steps there will be at most.

    Attributes:
        keep: bool [B,K,P + K steps]; True where the beam of a row attends to the key.
    """

    def __init__(self, prompt: Tensor, beams: int, steps: int) -> None:
        B, P = prompt.shape
        self._beams, self._length = beams, P
        self.keep = torch.zeros(B, beams, P + beams * steps, dtype=torch.bool, device=prompt.device)
        self.keep[:, :, :P] = prompt[:, None]

    def advance(self, parents: Tensor) -> Tensor:
        """One step: beam j continues the path of beam ``parents[b, j]`` with a key of its own.

        Args:
            parents: int64 [B,K].

        Returns:
            bool [B,1,K,length]: the mask of the step, the new keys included; key j of them is beam j's.
        """
        B, K = parents.shape
        end = self._length + K
        index = parents[..., None].expand(B, K, self._length)
        self.keep[:, :, : self._length] = self.keep[:, :, : self._length].gather(1, index)
        self.keep[:, :, self._length : end] = torch.eye(K, dtype=torch.bool, device=parents.device)
        self._length = end
        return self.keep[:, None, :, :end]


def _check_like(name: str, x: Tensor, held: Tensor) -> None:
    wanted = (held.shape[0], held.shape[1], held.shape[3])
    if (x.shape[0], x.shape[1], x.shape[3]) != wanted:
        B, H, D = wanted
        raise ValueError(f"cache: {name} must be [B,H,T,D] = [{B}, {H}, T, {D}] as before, got {list(x.shape)}")
    if x.dtype != held.dtype:
        raise TypeError(f"cache: {name} must be {held.dtype} as before, got {x.dtype}")
