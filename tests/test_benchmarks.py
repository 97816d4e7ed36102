"""The benchmark harness: its statistics on made-up samples, its cases at tiny sizes, its gate."""

from __future__ import annotations

import random

import pytest
import torch

from pytransformer.benchmarks import (
    OPS,
    _compare,
    _figures,
    _timing,
    attention,
    embedding,
    ffn,
    layer_norm,
    linear_cross_entropy,
    models,
    suite,
)
from pytransformer.benchmarks._case import OURS, PEER, AbsentError, Case, Problem
from pytransformer.benchmarks._run import run_case

TINY = {
    "attention": lambda way: attention.case(way, torch.bfloat16, 2, 2, 48, 32, "padding"),
    "attention causal": lambda way: attention.case(way, torch.float32, 2, 2, 48, 32, "causal"),
    "layer_norm": lambda way: layer_norm.case(way, torch.bfloat16, 32, 64),
    "ffn": lambda way: ffn.case(way, torch.float32, 80, 32, 64),
    "linear_cross_entropy": lambda way: linear_cross_entropy.case(way, torch.float32, 16, 32, 100),
    "embedding": lambda way: embedding.case(way, torch.float32, 2, 16, 32, 100),
}


def samples(middle: float, seed: int, count: int = 60) -> list[float]:
    """Times around ``middle`` with 4% of noise and the long tail that real ones have."""
    draw = random.Random(seed)
    return [middle * (1 + abs(draw.gauss(0, 0.04)) + (draw.random() < 0.05) * draw.random()) for _ in range(count)]


def result(ours: float, seed: int, machine: float = 1.0) -> dict:
    walls = {OURS: samples(ours * machine, seed), PEER: samples(machine, seed + 1000)}
    row = {"name": "row", "op": "ffn", "dtype": "float32", "operations": 1.0, "bytes": 1.0, "target": None}
    found = {name: {"calls": 1, "wall": wall, "cpu": wall} for name, wall in walls.items()}
    return {**row, "samples": found, "wrong": {}, "absent": {}}


def verdict(before: dict, after: dict) -> str:
    ((_, _, _, found),) = _compare.compare({"rows": [before]}, {"rows": [after]})
    return found


def test_a_planted_slowdown_is_found():
    assert all(verdict(result(1.0, seed), result(1.15, seed + 50)) == "slower" for seed in range(8))
    assert all(verdict(result(1.15, seed), result(1.0, seed + 50)) == "faster" for seed in range(8))


def test_the_same_code_shows_no_difference():
    found = [verdict(result(1.0, seed), result(1.0, seed + 50)) for seed in range(20)]
    assert sum(v in ("no difference", "cannot tell") for v in found) >= 19


def test_a_slower_machine_is_no_slower_kernel():
    found = [verdict(result(1.0, seed), result(1.0, seed + 50, machine=1.3)) for seed in range(20)]
    assert sum(v in ("no difference", "cannot tell") for v in found) >= 19


def test_the_interval_holds_the_true_ratio():
    held = 0
    for seed in range(50):
        ratio = _timing.paired_ratio(samples(2.0, seed), samples(1.0, seed + 500))
        held += ratio.low <= 2.0 <= ratio.high
    assert held >= 43


def test_target_verdicts():
    ratio = _timing.Ratio(2.0, 1.9, 2.1)
    assert _timing.target_verdict(ratio, 1.8) == "met"
    assert _timing.target_verdict(ratio, 2.5) == "missed"
    assert _timing.target_verdict(ratio, 2.0) == "cannot tell"
    assert _timing.target_verdict(ratio, None) == "faster"
    assert _timing.target_verdict(_timing.Ratio(1.0, 0.9, 1.1), None) == "cannot tell"


def test_providers_are_interleaved():
    order: list[str] = []
    providers = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = _timing.measure(providers, 0.0)
    assert all(len(s.wall) == _timing.LEAST_ROUNDS for s in found.values())
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_case_passes_its_gate(name, direction):
    case = TINY[name](direction)
    problem = case.build()
    assert set(problem.providers) == {OURS, PEER}
    for provider in problem.providers.values():
        assert all(found.ok for found in problem.check(provider())), [str(f) for f in problem.check(provider())]


@pytest.mark.parametrize("name", [*OPS, "models", "default", "ops"])
def test_declarations(name):
    cases = suite(name)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.direction in ("fwd", "bwd")
        assert len(case.shape) <= 26  # the table's width hangs on it
        if case.op != "models":
            assert case.operations > 0
            assert case.bytes > 0


def test_the_issue_asks_for_these_rows():
    targets = {case.name: case.target for case in suite("default") if case.target}
    assert targets["attention fwd bfloat16 8x12x512x64"] == 1.8
    assert targets["attention fwd bfloat16 8x12x512x64 causal"] == 2.5
    assert targets["layer_norm fwd bfloat16 4096x768 residual"] == 2.0
    assert targets["ffn fwd float32 1024x768x3072 gelu"] == 1.0


def test_a_wrong_provider_gets_no_time():
    good = TINY["layer_norm"]("fwd")
    problem = good.build()
    right = problem.providers[OURS]
    problem.providers[OURS] = lambda: right() * 1.05
    row = run_case(Case("layer_norm", "fwd", "bfloat16", "tiny", 1, 1, lambda: problem), 0.01)
    assert set(row["samples"]) == {PEER}
    assert "max error" in row["wrong"][OURS]
    limits = {"operations": {"float32": 1e9}, "copy": {"1048576": 1e9}, "operations_source": "here"}
    assert _figures.figures(row, limits).verdict == "WRONG"


def test_an_absent_case_says_why():
    def build() -> Problem:
        raise AbsentError("no weights")

    row = run_case(Case("models", "fwd", "float32", "none", 1, 1, build), 0.01)
    assert row["absent"] == {"case": "no weights"}
    assert _figures.notes({"rows": [row]}) == ["absent: models fwd float32 none: no weights"]


def test_the_plain_bert_peer_is_transformers_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": models.HEADS, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, layer_norm_eps=models.EPS, **sizes)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(60, (3, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()
    tokens = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = theirs(**tokens).last_hidden_state
        actual = models.plain_bert(theirs.state_dict(), tokens)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
