"""explain: which kernel ran, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytransformer.backends import Decision, record_decisions


@dataclass(frozen=True)
class Explanation:
    """What a call ran on.

    Attributes:
        result: what the call returned.
        decisions: one for each op that it called, in order.
    """

    result: Any
    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        if not self.decisions:
            return "no pytransformer op was called"
        counts = Counter((d.op, d.backend, tuple(d.reasons.items())) for d in self.decisions)
        lines = []
        for (op, backend, reasons), count in counts.items():
            times = "" if count == 1 else f"  ({count} calls)"
            lines.append(f"{op}: {backend}{times}")
            lines += [f"    not {name}: {reason}" for name, reason in reasons]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``function(*args, **kwargs)`` and reports the backend of every op that it called.

    ``function`` is anything that calls ops: one of ``pytransformer.ops``, or a whole model.
    ``print(explain(model, batch))`` names each op, the backend that served it and, for each better backend
    that did not, the reason. Inside a compiled function nothing is recorded: selection happened when it was
    traced.
    """
    with record_decisions() as decisions:
        result = function(*args, **kwargs)
    return Explanation(result, tuple(decisions))
