"""Argument checks shared by the ops. Every message names op, argument, value and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def describe(x: object) -> str:
    """A tensor as dtype, shape and device; anything else as it prints."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(x)}")
    if x.is_nested:
        raise TypeError(
            f"{op}: {name} must not be a nested tensor; pass its values(), the sequences end to end, "
            "which attention_varlen takes with their offsets()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout} of {describe(x)}")


def check_floating(op: str, name: str, x: object) -> None:
    check_tensor(op, name, x)
    assert isinstance(x, Tensor)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {describe(x)}")


def check_like(op: str, name: str, x: object, reference_name: str, reference: Tensor) -> None:
    """``x`` has the dtype and device of ``reference``."""
    check_tensor(op, name, x)
    assert isinstance(x, Tensor)
    if x.dtype != reference.dtype:
        raise TypeError(f"{op}: {name} must have {reference_name}'s dtype {reference.dtype}, got {describe(x)}")
    check_device(op, name, x, reference_name, reference)


def check_device(op: str, name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(f"{op}: {name} must be on {reference_name}'s device {reference.device}, got {describe(x)}")


def check_shape(op: str, name: str, x: Tensor, wanted: Sequence[int], letters: str = "") -> None:
    if tuple(x.shape) != tuple(wanted):
        spelled = f"{letters} = " if letters else ""
        raise ValueError(f"{op}: {name} must be {spelled}{list(wanted)}, got {describe(x)}")


def check_broadcasts(op: str, name: str, x: Tensor, wanted: Sequence[int], letters: str) -> None:
    shape = (1,) * (len(wanted) - x.dim()) + tuple(x.shape)
    if len(shape) != len(wanted) or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True)):
        raise ValueError(f"{op}: {name} must broadcast to {letters} = {list(wanted)}, got {describe(x)}")


def check_probability(op: str, name: str, p: float) -> None:
    if not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be a probability in [0, 1], got {p!r}")


def check_finite(op: str, name: str, x: float) -> None:
    if not isinstance(x, (int, float)) or not math.isfinite(x):
        raise ValueError(f"{op}: {name} must be a finite number, got {x!r}")


def check_positive(op: str, name: str, x: float) -> None:
    check_finite(op, name, x)
    if x <= 0:
        raise ValueError(f"{op}: {name} must be positive, got {x!r}")


def check_choice(op: str, name: str, x: object, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {x!r}")


def check_parameter(op: str, name: str, x: object, size: int, input: Tensor) -> None:
    """A vector that is added to or multiplied with the rows of ``input``."""
    check_floating(op, name, x)
    assert isinstance(x, Tensor)
    check_shape(op, name, x, (size,))
    check_device(op, name, x, "input", input)


def random_state(op: str, seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The Philox (seed, offset) of a call's dropout, int64 [2]; None without dropout.

    Without a seed it is drawn from torch's default generator, so ``torch.manual_seed`` governs it.
    """
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
            raise ValueError(f"{op}: a seed tensor must be int64 [2] (seed, offset), got {describe(seed)}")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an integer, an int64 tensor [2] or None, got {describe(seed)}")
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([signed, 0], dtype=torch.int64, device=device)


def check_head_counts(op: str, H: int, G: int, enable_gqa: bool, key: str = "key") -> None:
    """``H`` query heads over ``G`` of ``key``: as many, or with ``enable_gqa`` a multiple."""
    if G != H and not enable_gqa:
        raise ValueError(f"{op}: {key} must have query's {H} heads, got {G}; pass enable_gqa=True to share heads")
    if (G == 0 and H > 0) or (G > 0 and H % G):
        raise ValueError(f"{op}: query's heads must be a multiple of {key}'s, got {H} and {G}")
