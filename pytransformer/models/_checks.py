"""What the configs and the forwards of all models check, with the model's name in every message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def check_fields(config: Any) -> None:
    """Sizes are positive integers, rates lie in [0, 1], switches are bools, special tokens are ids.

    The annotation of a field says which it is; a field ``..._token_id`` may also be None.
    """
    owner = type(config).__name__
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if value is None and "None" in str(field.type):
            continue
        if name.endswith("_token_id"):
            _check_token_id(owner, name, value, config.vocab_size)
        elif str(field.type).startswith("int") and (not is_integer or value < 1):
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")
        elif field.type == "float" and (not isinstance(value, (int, float)) or not 0 <= value <= 1):
            raise ValueError(f"{owner}: {name} must be a number in [0, 1], got {value!r}")
        elif field.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{owner}: {name} must be True or False, got {value!r}")


def _check_token_id(owner: str, name: str, value: Any, vocab_size: int) -> None:
    ids = value if isinstance(value, (list, tuple)) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{owner}: {name} must lie in [0, vocab_size = {vocab_size}), got {value!r}")


def check_divides(config: Any, heads: str, size: str) -> None:
    n, width = getattr(config, heads), getattr(config, size)
    if width % n:
        raise ValueError(f"{type(config).__name__}: {heads} must divide {size}, got {n} and {width}")


def check_activation(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{type(config).__name__}: {name} must be one of {known}; got {value!r}")


def check_wanted(owner: str, config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A config.json describes a form of the model that this class has; what it leaves out is as wanted."""
    for name, value in wanted.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{owner}: {name} must be {value!r}, got {config[name]!r}")


def check_tokens(owner: str, name: str, ids: Any, letters: str = "[B,T]") -> None:
    """Token ids: an integer tensor of two dimensions with at least one column."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise TypeError(f"{owner}: {name} must be int32 or int64 {letters}, got {got}")
    if ids.dim() != 2 or ids.shape[1] < 1:
        last = letters.strip("[]").split(",")[-1]
        raise ValueError(f"{owner}: {name} must be {letters} with {last} at least 1, got {list(ids.shape)}")


def check_same_shape(owner: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{owner}: {name} must have {other_name}' shape {list(other.shape)}, got {list(x.shape)}")
