"""The repository's own regression runs: pytest-benchmark over the declarations of ``pytransformer bench``.

Not collected with the tests: ``make bench-regress`` runs it, saves its figures under .benchmarks/ and fails where
the median of a row is worse than in the run before by more than a tenth.
"""

from __future__ import annotations

import pytest

from pytransformer.benchmarks import suite
from pytransformer.benchmarks._case import OURS, AbsentError

ROUNDS = 20


@pytest.mark.parametrize("case", suite("default"), ids=lambda case: case.name)
def test_row(benchmark, case):
    try:
        problem = case.build()
    except AbsentError as reason:
        pytest.skip(str(reason))
    run = problem.providers[OURS]
    wrong = [str(found) for found in problem.check(run()) if not found.ok]
    assert not wrong, wrong
    benchmark.group = f"{case.op} {case.direction} {case.dtype}"
    benchmark.extra_info.update(operations=case.operations, bytes=case.bytes, **dict(case.sizes))
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
