"""The suites by name, and the choice among their cases."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pytransformer.benchmarks._case import DIRECTIONS, Case

OPS = ("attention", "layer_norm", "ffn", "linear", "linear_cross_entropy", "embedding")
# By suite: the modules whose cases it has, and what it tells.
SUITES: dict[str, tuple[tuple[str, ...], str]] = {
    "default": ((*OPS, "models"), "the short cases of the ops and a real model"),
    "ops": (OPS, "every op at the sizes of named models, forward and backward"),
    "cpu": (("cpu",), "what the project promises of its CPU kernels; exits 1 where a row falls short"),
    "gpu": (("gpu",), "every op and model on an NVIDIA GPU"),
    "models": (("models",), "whole models: inference and steps of training"),
    "complexity": (("complexity",), "layers over growing n and d, beside the paper's table of complexities"),
    "memory": (("memory",), "peak memory of training, op by op"),
    "overhead": (("overhead",), "what a call costs the host"),
    **{op: ((op,), f"{op} alone") for op in OPS},
}
WITH_PEERS = ("cpu", "gpu", "models")  # where --peers auto means those that are installed
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Chosen:
    """Which cases of a suite run; each field a list of words of which one must fit, or nothing.

    Attributes:
        op, dtype, direction: exactly one of the words.
        shape: a part of the shape, or one of its sizes as ``S=512``.
        text: a part of the case's name.
    """

    op: Sequence[str] = ()
    dtype: Sequence[str] = ()
    shape: Sequence[str] = ()
    direction: Sequence[str] = ()
    text: str = ""

    def of(self, cases: Iterable[Case]) -> list[Case]:
        """The cases that fit.

        Raises:
            ValueError: none does, or a direction is none.
        """
        for direction in self.direction:
            if direction not in DIRECTIONS:
                raise ValueError(f"bench: --direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
        every = list(cases)
        found = [case for case in every if self._fits(case)]
        if not found:
            raise ValueError(f"bench: none of the suite's {len(every)} cases fits the filters; see bench list")
        return found

    def _fits(self, case: Case) -> bool:
        exact = ((self.op, case.op), (self.direction, case.direction))
        dtypes = [DTYPES.get(word, word) for word in self.dtype]
        return (
            all(not words or value in words for words, value in exact)
            and (not dtypes or case.dtype in dtypes)
            and (not self.shape or any(_has_shape(case, word) for word in self.shape))
            and self.text in case.name
        )


def _has_shape(case: Case, word: str) -> bool:
    name, equals, value = word.partition("=")
    return str(case.sizes.get(name)) == value if equals else word in case.shape


def suite(name: str) -> list[Case]:
    """The cases of a suite.

    Raises:
        ValueError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"bench: --suite must be one of {', '.join(SUITES)}; got {name!r}")
    found = [case for stem in SUITES[name][0] for case in _module(stem).cases()]
    return [case for case in found if case.short] if name == "default" else found


def why_not(name: str) -> str | None:
    """Why a suite cannot run on this machine at all, or None."""
    for stem in SUITES[name][0]:
        reason: str | None = getattr(_module(stem), "why_not", lambda: None)()
        if reason is not None:
            return reason
    return None


def _module(stem: str) -> Any:
    return importlib.import_module(f"pytransformer.benchmarks.{stem}")
