"""What a traced call must not look into."""

from __future__ import annotations

from typing import TypeVar

_F = TypeVar("_F")


def constant_when_traced(function: _F) -> _F:
    """``torch.compiler.assume_constant_result``, without its import of the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
