"""Nested tensors, sequences of different lengths in one tensor, at the doors of the modules.

torch's modules take them on their fast path alone, in evaluation and without gradients. Here they are padded on the
way in and cut on the way out, differentiably, in both of torch's layouts; inside, padding is skipped like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def check_alone(owner: str, name: str, batch_first: bool, **others: object) -> None:
    """A nested input goes with ``batch_first`` and without the arguments ``others``, as in torch.

    Raises:
        TypeError: it does not.
    """
    given = [other for other, value in others.items() if value is not None and value is not False]
    if given:
        raise TypeError(
            f"{owner}: {name} is a nested tensor, which cannot go with {', '.join(given)}; pass a padded one"
        )
    if not batch_first:
        raise TypeError(f"{owner}: a nested tensor as {name} needs batch_first=True; pass a padded one")


def to_padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(padded [B,L,E], padding)`` of a nested tensor; ``padding`` is bool [B,L], True where there is nothing."""
    sequences = x.unbind()
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=x.device)
    padded = pad_sequence(list(sequences), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]


def to_nested(out: Tensor, padding: Tensor, like: Tensor) -> Tensor:
    """``out`` [B,L,E] without its padding, in the layout of the nested ``like``."""
    lengths = (~padding).sum(1).tolist()
    sequences = [row[:length] for row, length in zip(out, lengths, strict=True)]
    nested: Tensor = torch.nested.as_nested_tensor(sequences, layout=like.layout)
    return nested
