"""What the benchmarks say of samples: intervals, verdicts, two runs side by side; on made-up samples and on recorded
ones, which come from machines whose kernels run at 60% of their best for seconds at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pytransformer.benchmarks import _compare, _figures, _statistics
from pytransformer.benchmarks._case import LIMIT, OURS, PEER
from pytransformer.benchmarks._file import load
from pytransformer.benchmarks._timing import LEAST_ROUNDS

# Two runs of one commit's suite of ops on a shared machine: names, times, and what was busy.
RECORDED = [Path(__file__).parent / "recorded" / f"ops-{run}.json" for run in ("before", "after")]

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
    least = 20 if count == 60 else 12  # eight rounds of a single visit leave some untold
    assert found.count("slower") >= least
    assert "faster" not in found
    assert [verdict(after, before) for before, after in pairs].count("faster") >= least


def test_the_same_code_shows_no_difference():
    found = [verdict(result(1.0, seed), result(1.0, seed + 50)) for seed in range(40)]
    assert found.count("no difference") >= 38


def recorded(slower: float, op: str = "") -> dict[str, str]:
    """Verdicts on two real runs, with ``op``'s rows of the second, or all of them, made so much slower."""
    before, after = map(load, RECORDED)
    for row in after["rows"]:
        if row["op"].startswith(op):
            ours = row["samples"][OURS]
            ours["wall"] = [wall * slower for wall in ours["wall"]]
    return {change.name: change.verdict for change in _compare.compare(before, after)}


def test_recorded_runs_of_the_same_code_show_no_difference():
    found = list(recorded(1.0).values())
    assert len(found) >= 70
    assert found.count("no difference") >= 0.95 * len(found)


def test_a_slowdown_planted_in_recorded_samples_is_found():
    """In most rows that it hits, each of whose times is known to 10% here; and in some row of each op."""
    for slower, verdict in ((1.15, "slower"), (1 / 1.15, "faster")):
        found = list(recorded(slower).values())
        assert found.count(verdict) >= 0.65 * len(found)
        assert {"slower", "faster"} - set(found) == {"slower", "faster"} - {verdict}
    for op in ("attention", "layer_norm", "ffn", "linear_cross_entropy", "embedding"):
        assert "slower" in [verdict for name, verdict in recorded(1.15, op).items() if name.startswith(op)]


def test_a_moment_in_which_everything_is_slow_does_not_count():
    """Half of each run at 60% of the machine's speed, not the same half."""
    draw = random.Random(0)

    def run(slow: range, ours: float) -> dict:
        speed = [1 / 0.6 if i in slow else 1.0 for i in range(40)]
        noisy = {name: [s * m * (1 + draw.gauss(0, 0.03)) for s in speed] for name, m in ((OURS, ours), (PEER, 2.0))}
        return make_row(noisy, visits=[0] * 20 + [1] * 20)

    assert verdict(run(range(20), 1.0), run(range(15, 35), 1.0)) == "no difference"
    assert verdict(run(range(20), 1.0), run(range(15, 35), 1.15)) == "slower"


def test_what_visits_differ_by_widens_every_interval():
    draw = random.Random(0)

    def run(moved: float) -> list[dict]:
        rows = []
        for i in range(60):
            level = [draw.gauss(0, moved) for _ in range(2)]
            walls = {OURS: [1 + level[v] + draw.gauss(0, 0.01) for v in (0, 1) for _ in range(20)], PEER: [1.0] * 40}
            rows.append(make_row(walls, name=str(i), visits=[0] * 20 + [1] * 20))
        return rows

    steady, moving = ({"rows": run(moved)} for moved in (0.0, 0.06))
    assert _compare.drift_of(steady, steady) == _statistics.LEAST_DRIFT
    assert 0.04 < _compare.drift_of(moving, moving) < 0.09
    assert {change.verdict for change in _compare.compare(steady, {"rows": run(0.0)})} == {"no difference"}
    verdicts = [change.verdict for change in _compare.compare(moving, {"rows": run(0.06)})]
    assert verdicts.count("slower") + verdicts.count("faster") <= 3


def test_of_many_rows_chance_calls_none():
    """Three hundred rows of the same code: at their own 95% intervals fifteen would differ."""
    draw = random.Random(1)

    def run(slower: dict[int, float]) -> dict:
        def wall(i: int) -> list[float]:
            return [slower.get(i, 1.0) * (1 + draw.gauss(0, 0.03)) for _ in range(20)]

        return {
            "rows": [
                make_row({OURS: wall(i), PEER: [1.0] * 20}, name=str(i), visits=[0] * 10 + [1] * 10) for i in range(300)
            ]
        }

    before = run({})
    verdicts = [change.verdict for change in _compare.compare(before, run({}), tolerance=0.0)]
    assert verdicts.count("slower") + verdicts.count("faster") <= 1
    planted = dict.fromkeys(range(3), 1.15)
    found = {change.name: change.verdict for change in _compare.compare(before, run(planted))}
    assert [found[str(i)] for i in planted] == ["slower"] * 3
    assert list(found.values()).count("slower") <= 4


def test_rows_that_allow_no_verdict_are_too_noisy():
    draw = random.Random(0)
    wild, steady = ([draw.uniform(low, 2) for _ in range(8)] for low in (0.5, 1.95))
    rows = [make_row({OURS: wall, PEER: [1.0] * 8}, name=name, device="cpu") for name, wall in
            (("wild", wild), ("steady", steady))]  # fmt: skip
    assert _figures.too_noisy({"rows": rows}) == ["wild"]


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


def test_a_limit_timed_in_the_same_rounds_goes_before_that_of_the_run():
    hours = [1.0] * 6 + [2.0] * 6  # good ones and bad ones
    row = make_row({OURS: hours, LIMIT: [0.9 * hour for hour in hours]}, limit_target=0.85)
    found = _figures.figures(row, LIMITS)
    assert found.limit.low == pytest.approx(0.9)
    assert (found.verdict, found.others) == ("met", {})
    assert set(_figures.walls(row)) == {OURS}


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
