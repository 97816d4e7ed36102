"""What a generation is asked for, checked once; and what becomes of a step's scores before a token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_OWNER = "generate"


@dataclass(frozen=True)
class Settings:
    """The arguments of ``generate``, with the model's special tokens filled in.

    Raises:
        TypeError, ValueError: a value is out of its range, or two do not go together.
    """

    vocab_size: int
    max_new_tokens: int
    num_beams: int
    num_return_sequences: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    length_penalty: float
    early_stopping: bool | str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            _check_integer(name, getattr(self, name))
        if self.top_k is not None:
            _check_integer("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{_OWNER}: top_p must lie in (0, 1], got {self.top_p!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"{_OWNER}: temperature must be positive, got {self.temperature!r}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"{_OWNER}: length_penalty must be finite, got {self.length_penalty!r}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"{_OWNER}: early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        self._check_tokens()
        self._check_method()

    def _check_tokens(self) -> None:
        given = {
            "eos_token_id": self.eos_token_ids,
            "pad_token_id": (self.pad_token_id,),
            "forced_bos_token_id": () if self.forced_bos_token_id is None else (self.forced_bos_token_id,),
            "forced_eos_token_id": () if self.forced_eos_token_id is None else (self.forced_eos_token_id,),
            "suppress_tokens": self.suppress_tokens,
        }
        for name, ids in given.items():
            for i in ids:
                if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                    raise ValueError(f"{_OWNER}: {name} must lie in [0, vocab_size = {self.vocab_size}), got {i!r}")

    def _check_method(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"{_OWNER}: do_sample wants num_beams=1, got {self.num_beams}")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"{_OWNER}: num_return_sequences must be at most num_beams where nothing is sampled, got"
                f" {self.num_return_sequences} and {self.num_beams}"
            )
        if not self.do_sample and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError(f"{_OWNER}: temperature, top_k and top_p want do_sample=True")

    def constrain(self, scores: Tensor, step: int) -> Tensor:
        """Scores [..., V] of step ``step`` without the tokens that may not come; a forced one is all that is left."""
        if self.suppress_tokens:
            scores = scores.index_fill(-1, torch.tensor(self.suppress_tokens, device=scores.device), -torch.inf)
        forced = self.forced_bos_token_id if step == 0 else None
        if step == self.max_new_tokens - 1 and self.forced_eos_token_id is not None:
            forced = self.forced_eos_token_id
        if forced is None:
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[..., forced] = 0
        return only

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which tokens end a sequence."""
        return torch.isin(tokens, torch.tensor(self.eos_token_ids, dtype=tokens.dtype, device=tokens.device))


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """The distribution to sample from, float32 [N,V]: temperature, then the k best, then the nucleus of mass p.

    Source: Fan et al., "Hierarchical Neural Story Generation", 2018, sec. 5.4 (top-k); Holtzman et al., "The Curious
    Case of Neural Text Degeneration", 2020, sec. 3.1 (top-p).
    """
    logits = logits / settings.temperature
    if settings.top_k is not None:
        least = logits.topk(min(settings.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ascending, order = logits.sort()
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        tail[:, -1] = False  # the best token stays, however small p is
        logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    return logits.softmax(-1)


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{_OWNER}: {name} must be a positive integer, got {value!r}")
