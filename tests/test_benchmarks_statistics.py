"""What the benchmarks say of samples: intervals, verdicts, two runs side by side; on made-up samples."""

from __future__ import annotations

import random

import pytest

from pytransformer.benchmarks import _compare, _figures, _statistics
from pytransformer.benchmarks._case import OURS, PEER
from pytransformer.benchmarks._timing import LEAST_ROUNDS

LIMITS = {"operations": {"float32": 1e9}, "sources": {"float32": "here"}, "copy": {"1048576": 1e9}}


def samples(middle: float, seed: int, count: int = 60) -> list[float]:
    """Times around ``middle`` with 4% of noise and the long tail that real ones have."""
    draw = random.Random(seed)
    return [middle * (1 + abs(draw.gauss(0, 0.04)) + (draw.random() < 0.05) * draw.random()) for _ in range(count)]


def make_row(walls: dict[str, list[float]], **more) -> dict:
    plain = {"name": "row", "op": "ffn", "dtype": "float32", "metric": "seconds", "operations": 1e9, "bytes": 1.0,
             "targets": {}, "limit_target": None, "rate_target": None}  # fmt: skip
    found = {name: {"calls": 1, "wall": wall, "cpu": wall} for name, wall in walls.items()}
    return {**plain, "samples": found, "busy": [], "wrong": {}, "absent": {}, "unfused": [], **more}


def result(ours: float, seed: int, machine: float = 1.0, count: int = 60) -> dict:
    return make_row({OURS: samples(ours * machine, seed, count), PEER: samples(machine, seed + 1000, count)})


def verdict(before: dict, after: dict, tolerance: float = _statistics.TOLERANCE) -> str:
    (change,) = _compare.compare({"rows": [before]}, {"rows": [after]}, tolerance)
    return change.verdict


@pytest.mark.parametrize("count", [8, 60])
def test_a_planted_slowdown_is_found(count):
    pairs = [(result(1.0, seed, count=count), result(1.15, seed + 50, count=count)) for seed in range(20)]
    found = [verdict(before, after) for before, after in pairs]
    assert found.count("slower") >= (20 if count == 60 else 16)
    assert "faster" not in found
    assert [verdict(after, before) for before, after in pairs].count("faster") >= (20 if count == 60 else 16)


def test_the_same_code_shows_no_difference():
    found = [verdict(result(1.0, seed), result(1.0, seed + 50)) for seed in range(40)]
    assert found.count("no difference") >= 38


def test_a_slower_machine_is_no_slower_kernel():
    found = [verdict(result(1.0, seed), result(1.0, seed + 50, machine=1.3)) for seed in range(40)]
    assert found.count("no difference") >= 38


def test_a_difference_within_the_tolerance_is_none():
    assert verdict(result(1.0, 1), result(1.08, 51), tolerance=0.1) == "no difference"
    assert verdict(result(1.0, 1), result(1.08, 51), tolerance=0.05) == "slower"


def test_noise_gives_no_verdict():
    draw = random.Random(0)
    wild = make_row({OURS: [draw.uniform(0.5, 2) for _ in range(8)], PEER: [1.0] * 8})
    assert verdict(wild, wild) == "cannot tell"


def test_instructions_decide_where_time_cannot():
    draw = random.Random(0)
    wild = {OURS: [draw.uniform(0.5, 2) for _ in range(8)], PEER: [1.0] * 8}

    def counted(number, isa="avx2"):
        return make_row(wild, instructions={"isa": isa, "calls": {OURS: number}})

    assert verdict(counted(1e6), counted(1.001e6)) == "no difference"
    assert verdict(counted(1e6), counted(1.15e6)) == "slower"
    assert verdict(counted(1e6), counted(1.15e6, "scalar")) == "cannot tell"


def test_the_interval_holds_the_true_ratio():
    held = 0
    for seed in range(50):
        ratio = _statistics.paired_ratio(samples(2.0, seed), samples(1.0, seed + 500))
        held += ratio.low <= 2.0 <= ratio.high
    assert held >= 43


def test_target_verdicts():
    ratio = _statistics.Ratio(2.0, 1.9, 2.1)
    assert _statistics.target_verdict(ratio, 1.8) == "met"
    assert _statistics.target_verdict(ratio, 2.5) == "missed"
    assert _statistics.target_verdict(ratio, 2.0) == "cannot tell"
    assert _statistics.target_verdict(ratio, None) == "faster"
    assert _statistics.target_verdict(_statistics.Ratio(1.0, 0.9, 1.1), None) == "cannot tell"


@pytest.mark.parametrize(
    ("promised", "expected"),
    [
        ({"targets": {PEER: 1.5}}, "met"),
        ({"targets": {PEER: 2.5}}, "missed"),
        ({"targets": {PEER: 1.5}, "limit_target": 0.9}, "met"),  # the floor is 1 s
        ({"targets": {PEER: 1.5}, "limit_target": 1.1}, "missed"),
        ({"targets": {PEER: 1.5, "engine": 1.0}}, "missed"),
        ({"targets": {"elsewhere": 1.0}}, "peer absent"),
        ({"targets": {}}, "faster"),
    ],
)
def test_a_row_is_as_good_as_its_worst_target(promised, expected):
    walls = {OURS: [1.0] * 8, PEER: [2.0] * 8, "engine": [0.5] * 8}
    assert _figures.figures(make_row(walls, **promised), LIMITS).verdict == expected


def test_a_rate_is_of_each_thread():
    row = make_row({OURS: [1.0] * 8}, bytes=60e9, rate_target=30e9)
    assert _figures.figures(row, LIMITS, threads=2).verdict == "met"
    assert _figures.figures(row, LIMITS, threads=4).verdict == "missed"


def test_busy_rounds_do_not_count_where_others_are_left():
    walls = {OURS: [1.0] * LEAST_ROUNDS + [9.0] * 9, PEER: [2.0] * (LEAST_ROUNDS + 9)}
    row = make_row(walls, busy=[False] * LEAST_ROUNDS + [True] * 9)
    assert _figures.figures(row, LIMITS).ours == 1.0
    row["busy"][0] = True
    assert _figures.figures(row, LIMITS).ours == 9.0
    assert "busy" in _figures.notes({"rows": [row]})[0]


def test_a_row_beyond_the_measured_peak_raises_it():
    row = make_row({OURS: [0.5] * 8, PEER: [1.0] * 8})
    raised = _figures.raised_peaks({"peaks": LIMITS, "rows": [row]})
    assert raised["operations"]["float32"] == 2e9
    assert raised["sources"]["float32"] == "reached by row"
    assert LIMITS["operations"]["float32"] == 1e9


def test_quantities_fit_their_column():
    for value in (3.2e-6, 9.996e-5, 4.2e-4, 0.0523, 0.9996, 1.5, 87.2):
        assert len(_figures.quantity(value, "seconds")) <= 5
    assert _figures.quantity(3.2e-6, "seconds") == "3.2µ"
    assert _figures.quantity(0.0523, "seconds") == "52.3"
    assert _figures.quantity(3 * 2**20, "bytes") == "3M"
