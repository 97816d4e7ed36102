"""Hugging Face checkpoints: reading a directory, and their names of parameters against ours.

A model describes once, in a ``Names``, what a checkpoint calls each of our parameters; reading and writing both
follow from it. Everything is checked before anything is built, and one error names every key that does not fit: a
broken checkpoint never half-loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls our parameters.

    Attributes:
        renamed: pairs (theirs, ours) of parts of a name, tried in order.
        packed: an ending of ours, and the endings of the parts that a checkpoint keeps one by one: the three
            projections of an attention are one parameter here.
        transposed: endings of our parameters that a checkpoint stores transposed.
    """

    renamed: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, tuple[str, ...]], ...] = ()
    transposed: tuple[str, ...] = ()

    def of(self, name: str) -> tuple[str, ...]:
        """The one or several names of the checkpoint that make up our parameter ``name``."""
        for ending, parts in self.packed:
            if name.endswith(ending):
                module = self._rename(name.removesuffix(ending))
                return tuple(module + part for part in parts)
        return (self._rename(name),)

    def is_transposed(self, name: str) -> bool:
        return name.endswith(self.transposed) if self.transposed else False

    def _rename(self, name: str) -> str:
        for theirs, ours in self.renamed:
            name = name.replace(ours, theirs)
        return name


def read_directory(owner: str, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(config, weights)`` of a directory with config.json and model.safetensors, whole or in shards.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or the shards do not hold what their index says.
        ImportError: ``safetensors`` is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{owner}.from_pretrained reads {_WEIGHTS}: pip install safetensors") from error
    directory = Path(path)
    sharded = (directory / _INDEX).is_file()
    wanted = ["config.json", *(_shards(owner, directory) if sharded else [_WEIGHTS])]
    for name in wanted:
        if not (directory / name).is_file():
            found = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no directory"
            raise FileNotFoundError(f"{owner}.from_pretrained: {directory} has no {name}; found: {found or 'nothing'}")
    weights: dict[str, Tensor] = {}
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for name in wanted[1:]:
            weights.update(load_file(directory / name))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{owner}.from_pretrained: {directory} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{owner}.from_pretrained: {directory / 'config.json'} must hold an object, got {config!r}")
    return config, weights


def _shards(owner: str, directory: Path) -> list[str]:
    """The files that the index of a sharded checkpoint names."""
    try:
        return sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{owner}.from_pretrained: {directory / _INDEX} cannot be read: {error!r}") from error


def to_own(
    owner: str, weights: dict[str, Tensor], wanted: dict[str, Tensor], names: Names, source: str
) -> dict[str, Tensor]:
    """A checkpoint's weights as our ``state_dict``.

    Args:
        weights: under the checkpoint's names.
        wanted: our names, with tensors of the shapes that the config gives (on any device, meta included).
        source: what the error calls the checkpoint.

    Raises:
        ValueError: keys are missing, surplus, of a wrong shape or not floating point; all are named.
    """
    shapes = {name: list(x.shape) for name, x in from_own(wanted, names).items()}
    problems = [f"missing {name} {shapes[name]}" for name in shapes if name not in weights]
    problems += [f"surplus {name} {list(weights[name].shape)}" for name in weights if name not in shapes]
    for name in shapes.keys() & weights.keys():
        x = weights[name]
        if list(x.shape) != shapes[name] or not x.is_floating_point():
            problems.append(f"{name} must be floating point {shapes[name]}, got {x.dtype} {list(x.shape)}")
    if problems:
        shown = "\n  ".join(sorted(problems))
        raise ValueError(f"{owner}: the weights in {source} do not fit its config.json:\n  {shown}")
    own: dict[str, Tensor] = {}
    for name in wanted:
        parts = [weights[part] for part in names.of(name)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        own[name] = x.t().contiguous() if names.is_transposed(name) else x
    return own


def from_own(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our ``state_dict`` under a checkpoint's names; copies."""
    theirs: dict[str, Tensor] = {}
    for name, x in state.items():
        parts = names.of(name)
        whole = x.detach().t() if names.is_transposed(name) else x.detach()
        for part, value in zip(parts, whole.chunk(len(parts)), strict=True):
            theirs[part] = value.clone(memory_format=torch.contiguous_format)
    return theirs


def load(
    make: Callable[[], Model],
    weights: dict[str, Tensor],
    names: Names,
    source: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Model:
    """A model in evaluation mode that holds a checkpoint's weights; built without memory until they fit."""
    with torch.device("meta"):
        model = make()
    state = to_own(type(model).__name__, weights, model.state_dict(), names, source)
    model.load_state_dict({name: x.to(device, dtype) for name, x in state.items()}, assign=True)
    return model.to(device, dtype).eval()  # tables that no checkpoint holds


def without_tied(owner: str, weights: dict[str, Tensor], tied: dict[str, str], source: str) -> dict[str, Tensor]:
    """``weights`` without the copies of a shared table, after looking whether they are copies.

    Args:
        tied: from the name of a copy to the name of the table.

    Raises:
        ValueError: a copy differs from its table: the checkpoint's are not tied.
    """
    for copy, table in tied.items():
        if copy in weights and table in weights and not torch.equal(weights[copy], weights[table]):
            raise ValueError(f"{owner}: {copy} in {source} must be {table}, with which it is tied; it differs")
    return {name: x for name, x in weights.items() if name not in tied or tied[name] not in weights}
