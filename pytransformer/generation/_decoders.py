"""The two kinds of models under one roof: read a prompt, then take steps of one token or of one token per beam."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pytransformer.generation.cache import Cache
from pytransformer.masks import Mask, dense


class Decoder(Protocol):
    """What the searches know of a model.

    Attributes:
        prompt: int64 [B,P], what every sequence starts with.
        keep: bool [B,P], which of these are no padding.
    """

    prompt: Tensor
    keep: Tensor

    def read_prompt(self) -> Tensor:
        """The logits [B,V] after the prompt."""

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """The logits [B,Q,V] after the next token of each of Q beams.

        Args:
            tokens: int64 [B,Q].
            keep: bool [B,1,Q,S], which keys each beam sees, its own new one included; None for all.
        """


class DecoderOnly:
    """A language model such as ``models.Gpt``; a prompt's first real token has position 0."""

    def __init__(self, model: Any, prompt: Tensor, keep: Tensor) -> None:
        self.prompt, self.keep = prompt, keep
        self._model, self._cache = model, Cache()
        self._positions = keep.sum(1, keepdim=True)  # [B,1], of the next token

    def read_prompt(self) -> Tensor:
        found = self._model(
            self.prompt, self.keep, positions_of(self.keep), cache=self._cache, logits_to_keep=1
        )  # fmt: skip
        logits: Tensor = found.logits[:, -1]
        return logits

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        positions = self._positions.expand_as(tokens)
        mask = Mask() if keep is None else dense(keep)
        logits: Tensor = self._model(tokens, mask, positions, cache=self._cache).logits
        self._positions = self._positions + 1
        return logits


class EncoderDecoder:
    """A sequence-to-sequence model such as ``models.Transformer``; its prompt is the start token."""

    def __init__(self, model: Any, source: Tensor, source_keep: Tensor | None, start: int) -> None:
        self.prompt = source.new_full((source.shape[0], 1), start)
        self.keep = torch.ones_like(self.prompt, dtype=torch.bool)
        self._model, self._cache = model, Cache()
        self._source_mask = source_keep
        self._memory = model.encode(source, self._source_mask)
        self._steps = 0

    def read_prompt(self) -> Tensor:
        return self.step(self.prompt, None)[:, -1]

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        positions = torch.full_like(tokens, self._steps)
        mask = Mask() if keep is None else dense(keep)
        hidden = self._model.decode(tokens, self._memory, mask, self._source_mask, positions, cache=self._cache)
        self._steps += 1
        logits: Tensor = self._model.logits(hidden)
        return logits


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions int64 [B,T] of tokens among padding: the real tokens of a row counted from 0; 0 where padded.

    Args:
        attention_mask: [B,T], true or nonzero for a real token.
    """
    real = attention_mask.bool()
    return (real.long().cumsum(1) - 1).masked_fill(~real, 0)
