"""Greedy decoding and sampling: one token a step, until every row has ended or the room is used up."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.generation._decoders import Decoder
from pytransformer.generation._settings import Settings, probabilities


def search(decoder: Decoder, settings: Settings, generator: torch.Generator | None) -> Tensor:
    """The prompts with their continuations, int64 [B,P + new]; padded behind a row's end."""
    B, P = decoder.prompt.shape
    steps, padded = settings.max_new_tokens, not bool(decoder.keep.all())
    keep = torch.ones(B, 1, 1, P + steps, dtype=torch.bool, device=decoder.prompt.device)
    keep[:, 0, 0, :P] = decoder.keep
    sequences = decoder.prompt.new_full((B, P + steps), settings.pad_token_id)
    sequences[:, :P] = decoder.prompt
    running = torch.ones(B, dtype=torch.bool, device=decoder.prompt.device)
    logits = decoder.read_prompt()
    for step in range(steps):
        tokens = _choose(settings.constrain(logits.float(), step), settings, generator)
        tokens = torch.where(running, tokens, settings.pad_token_id)
        end = P + step + 1
        sequences[:, end - 1] = tokens
        running = running & ~settings.is_end(tokens)
        if step == steps - 1 or not running.any():
            break
        logits = decoder.step(tokens[:, None], keep[..., :end] if padded else None)[:, 0]
    return sequences[:, :end]


def _choose(logits: Tensor, settings: Settings, generator: torch.Generator | None) -> Tensor:
    if not settings.do_sample:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, settings), 1, generator=generator)[:, 0]
