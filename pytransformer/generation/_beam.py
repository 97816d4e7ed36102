"""Beam search: the K most probable continuations of a sequence are carried on together.

A step scores every continuation of every beam, K V of them, by the sum of its log-probabilities, and looks at the
best (1 + E) K, E being the number of end tokens: each beam brings at most E that end, so at least K of them go on.
Of the K best those that end enter the pool of finished sequences, which keeps the K best by
``sum of log p / length^length_penalty``. The search of a sentence closes when its best running beam cannot better the
worst of a full pool; ``early_stopping`` says how that is guessed:

* ``False``: at the running beam's own length, the guess that pairs well with the penalty's default;
* ``"never"``: at the length that would serve it best, which for a positive penalty is the longest;
* ``True``: no guess at all, a full pool closes the search.

Scores, ties and closing follow ``transformers``' own search, so that both give the same tokens.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, alg. 1; Wu et al., "Google's Neural
Machine Translation System", 2016, sec. 7 (length penalty).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytransformer.generation._decoders import Decoder
from pytransformer.generation._settings import Settings
from pytransformer.generation.cache import Ancestry

_WORST = -1e9  # a finite stand-in for "not there yet": sums of it stay comparable


@dataclass
class _Sequences:
    """K sequences for each sentence: tokens int64 [B,K,L], scores float32 [B,K], lengths int64 [B,K]."""

    tokens: Tensor
    scores: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, prompt: Tensor, settings: Settings) -> _Sequences:
        B, P = prompt.shape
        K = settings.num_beams
        tokens = prompt.new_full((B, K, P + settings.max_new_tokens), settings.pad_token_id)
        tokens[:, :, :P] = prompt[:, None]
        scores = torch.full((B, K), _WORST, dtype=torch.float32, device=prompt.device)
        return cls(tokens, scores, prompt.new_full((B, K), P))

    def select(self, rows: Tensor) -> _Sequences:
        """Those at ``rows``, int64 [B,n]."""
        index = rows[..., None].expand(*rows.shape, self.tokens.shape[2])
        return _Sequences(self.tokens.gather(1, index), self.scores.gather(1, rows), self.lengths.gather(1, rows))

    def joined(self, other: _Sequences) -> _Sequences:
        pairs = ((self.tokens, other.tokens), (self.scores, other.scores), (self.lengths, other.lengths))
        return _Sequences(*(torch.cat(pair, 1) for pair in pairs))


class _Search:
    """The state of one search, and what a step does to it."""

    def __init__(self, prompt: Tensor, settings: Settings) -> None:
        self.settings, self.prompt_length = settings, prompt.shape[1]
        self.running = _Sequences.empty(prompt, settings)
        self.running.scores[:, 0] = 0  # all beams are the prompt still: only the first may be continued
        self.pool = _Sequences.empty(prompt, settings)
        self.open = torch.ones_like(prompt[:, :1], dtype=torch.bool)  # [B,1], may the pool still change
        self.step, self.all_ended = 0, False

    @property
    def full(self) -> Tensor:
        """bool [B,1]: are there K finished sequences?"""
        return (self.pool.lengths > self.prompt_length).all(1, keepdim=True)

    def advance(self, logits: Tensor) -> Tensor:
        """Takes the logits [B,K,V] of the running beams one token further; returns their parents, int64 [B,K]."""
        candidates, parents, ends = self._candidates(logits)
        self._collect(candidates, ends)
        candidates.scores = candidates.scores + _WORST * ends  # ended ones fill the beam where no others are left
        kept = candidates.scores.topk(self.settings.num_beams).indices
        self.running = candidates.select(kept)
        self.step += 1
        self.open &= self._improvable()
        self.all_ended = bool(ends.all())
        return parents.gather(1, kept)

    @property
    def done(self) -> bool:
        stopped = self.settings.early_stopping is True and bool(self.full.all())
        return self.all_ended or stopped or not bool(self.open.any())

    def _candidates(self, logits: Tensor) -> tuple[_Sequences, Tensor, Tensor]:
        """The best continuations, their parents, and which of them end."""
        settings, (K, V) = self.settings, logits.shape[1:]
        log_p = settings.constrain(logits.float().log_softmax(-1), self.step)
        total = (log_p + self.running.scores[..., None]).flatten(1)
        count = min(K * max(2, 1 + len(settings.eos_token_ids)), K * V)
        scores, flat = total.topk(count)
        parents, tokens = flat // V, flat % V
        found = self.running.select(parents)
        length = self.prompt_length + self.step + 1
        found.tokens[:, :, length - 1] = tokens
        ends = settings.is_end(tokens) | (self.step + 1 == settings.max_new_tokens)
        return _Sequences(found.tokens, scores, found.lengths + 1), parents, ends

    def _collect(self, candidates: _Sequences, ends: Tensor) -> None:
        """Moves the ended among the K best candidates into the pool, where they are better than what is there."""
        settings = self.settings
        first = torch.arange(ends.shape[1], device=ends.device) < settings.num_beams
        closed = ~self.open | (self.full & (settings.early_stopping is True))
        final = candidates.scores / (self.step + 1) ** settings.length_penalty
        final = torch.where(ends & first & ~closed, final, -torch.inf)
        finished = _Sequences(candidates.tokens, final, candidates.lengths)
        both = self.pool.joined(finished)
        self.pool = both.select(both.scores.topk(settings.num_beams).indices)

    def _improvable(self) -> Tensor:
        """bool [B,1]: might the best running beam still end better than the worst of the pool?"""
        settings = self.settings
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        length = settings.max_new_tokens if longest else self.step
        best = self.running.scores[:, :1] / length**settings.length_penalty
        worst = self.pool.scores.min(1, keepdim=True).values
        improvable: Tensor = ~self.full | (best > worst)
        return improvable


def beam_search(decoder: Decoder, settings: Settings) -> tuple[Tensor, Tensor]:
    """The ``num_return_sequences`` best sequences of each prompt, best first, and their scores.

    Returns:
        int64 [B n,P + new], padded behind an end, and float32 [B n].
    """
    search = _Search(decoder.prompt, settings)
    ancestry = Ancestry(decoder.keep, settings.num_beams, settings.max_new_tokens)
    logits = decoder.read_prompt()[:, None].expand(-1, settings.num_beams, -1)
    while True:
        parents = search.advance(logits)
        if search.done:
            break
        newest = search.running.tokens[:, :, search.prompt_length + search.step - 1]
        logits = decoder.step(newest, ancestry.advance(parents))
    n = settings.num_return_sequences
    best = search.pool.select(torch.arange(n, device=logits.device).expand(logits.shape[0], n))
    return best.tokens.flatten(0, 1)[:, : int(best.lengths.max())], best.scores.flatten()
