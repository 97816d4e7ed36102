"""The only tolerance code of the tests; the rule itself is derived in ``pytransformer/_tolerance.py``.

compare(name, actual, expected64, plain)        -> Comparison (max_error, max_allowed, rms_error, ..., ok)
allowed(expected64, plain, dtype), judge(...)   the two halves of compare, for many results with one oracle
assert_close(name, actual, expected64, plain)   raises with all the numbers
assert_parity("attention", dict(query=q, key=k, value=v), dict(is_causal=True), backend="cpu")
                                                forward and backward of one call, all outputs and gradients
plain.attention(q, k, v, ...)                   plain PyTorch in the dtype, with the public op's arguments
"""

from __future__ import annotations

from typing import Any

from pytransformer import _plain as plain
from pytransformer._parity import parity, results
from pytransformer._tolerance import Allowed, Comparison, allowed, assert_close, compare, judge

__all__ = [
    "Allowed",
    "Comparison",
    "allowed",
    "assert_close",
    "assert_parity",
    "compare",
    "judge",
    "parity",
    "plain",
    "results",
]


def assert_parity(op: str, tensors: dict[str, Any], options: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """Raises with every failing output and gradient; the arguments are those of ``parity``."""
    failed = [str(c) for c in parity(op, tensors, options, **kwargs) if not c.ok]
    if failed:
        raise AssertionError("\n".join(failed))
