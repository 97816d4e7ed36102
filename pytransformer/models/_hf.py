"""Hugging Face's BERT checkpoints: reading the directory, and its names against ours.

Everything is checked before anything is built, and one error names every key that does not fit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where ours differ from theirs. The three projections of the attention become one.
_RENAMED = (
    ("embeddings.LayerNorm.", "embeddings.norm."),
    ("encoder.layer.", "layers."),
    (".attention.output.dense.", ".self_attn.out_proj."),
    (".attention.output.LayerNorm.", ".norm1."),
    (".intermediate.dense.", ".linear1."),
    (".output.dense.", ".linear2."),
    (".output.LayerNorm.", ".norm2."),
    ("pooler.dense.", "pooler."),
)
_PACKED = tuple(
    (f".self_attn.in_proj_{kind}", tuple(f".attention.self.{name}.{kind}" for name in ("query", "key", "value")))
    for kind in ("weight", "bias")
)
# What a checkpoint may hold besides: heads, and a buffer that old versions stored.
_IGNORED_HEADS = ("cls.", "classifier.", "qa_outputs.")
_IGNORED = ("embeddings.position_ids",)


def read_directory(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(config, weights)`` of a directory with config.json and model.safetensors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read.
        ImportError: ``safetensors`` is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("Bert.from_pretrained reads model.safetensors: pip install safetensors") from error
    directory = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            found = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no directory"
            raise FileNotFoundError(f"Bert.from_pretrained: {directory} has no {name}; found: {found or 'nothing'}")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / "model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"Bert.from_pretrained: {directory} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"Bert.from_pretrained: {directory / 'config.json'} must hold an object, got {config!r}")
    return config, weights


def canonical(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``BertModel``'s own names: without the prefix, heads, buffers and old spellings of other checkpoints."""
    found = {}
    for name, x in weights.items():
        bare = name.removeprefix("bert.")
        if bare in _IGNORED or name.startswith(_IGNORED_HEADS):
            continue
        bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        found[bare] = x
    return found


def to_own(weights: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A checkpoint's weights as our ``state_dict``.

    Args:
        weights: under ``BertModel``'s names.
        wanted: our names, with tensors of the shapes that the config gives (on any device, meta included).
        source: what the error calls the checkpoint.

    Raises:
        ValueError: keys are missing, surplus, of a wrong shape or not floating point; all are named.
    """
    shapes = {name: list(x.shape) for name, x in from_own(wanted).items()}
    problems = [f"missing {name} {shapes[name]}" for name in shapes if name not in weights]
    problems += [f"surplus {name} {list(weights[name].shape)}" for name in weights if name not in shapes]
    for name in shapes.keys() & weights.keys():
        x = weights[name]
        if list(x.shape) != shapes[name] or not x.is_floating_point():
            problems.append(f"{name} must be floating point {shapes[name]}, got {x.dtype} {list(x.shape)}")
    if problems:
        shown = "\n  ".join(sorted(problems))
        raise ValueError(f"Bert: the weights in {source} do not fit its config.json:\n  {shown}")
    own: dict[str, Tensor] = {}
    for name in wanted:
        theirs = _their_names(name)
        own[name] = weights[theirs[0]] if len(theirs) == 1 else torch.cat([weights[part] for part in theirs])
    return own


def from_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our ``state_dict`` under ``BertModel``'s names; copies."""
    theirs: dict[str, Tensor] = {}
    for name, x in state.items():
        names = _their_names(name)
        for part, value in zip(names, x.detach().chunk(len(names)), strict=True):
            theirs[part] = value.clone(memory_format=torch.contiguous_format)
    return theirs


def _their_names(name: str) -> tuple[str, ...]:
    """The one or three names of the checkpoint that make up our parameter ``name``."""
    for packed, parts in _PACKED:
        if name.endswith(packed):
            layer = name.removesuffix(packed).replace("layers.", "encoder.layer.")
            return tuple(layer + part for part in parts)
    for theirs, ours in _RENAMED:
        name = name.replace(ours, theirs)
    return (name,)
