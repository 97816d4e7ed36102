"""The benchmark harness: its declarations, its cases at tiny sizes, its gate, its clocks and its file."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickle
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from pytransformer import cli, ops
from pytransformer.benchmarks import (
    SUITES,
    _contention,
    _device,
    _figures,
    _instructions,
    _memory,
    _peaks,
    _timing,
    attention,
    complexity,
    embedding,
    ffn,
    layer_norm,
    linear_cross_entropy,
    peers,
    suite,
)
from pytransformer.benchmarks import _run as runner
from pytransformer.benchmarks._bert import EPS, plain_bert
from pytransformer.benchmarks._case import DIRECTIONS, LIMIT, OURS, PEER, AbsentError, Case, Problem
from pytransformer.benchmarks._file import load, save
from pytransformer.benchmarks._models import Model
from pytransformer.benchmarks._processes import Remote
from pytransformer.benchmarks._run import run, run_case
from pytransformer.benchmarks._suites import Chosen
from pytransformer.benchmarks._table import LiveTable
from pytransformer.benchmarks._training import case as training_case
from pytransformer.benchmarks.markdown import BEGIN, END, markdown, write_into

TINY = Model("tiny", 2, 32, 96, 100)
GROUPED = Model("tiny", 4, 16, 96, 100, 2, True, True, True, "silu")
CASES = {
    "attention": lambda way: attention.case(way, torch.bfloat16, TINY, 2, 48, "padding"),
    "attention causal, grouped": lambda way: attention.case(way, torch.float32, GROUPED, 2, 48),
    "attention dropout": lambda way: attention.case(way, torch.float32, TINY, 2, 16, "dropout"),
    "layer_norm": lambda way: layer_norm.case(way, torch.bfloat16, TINY, 32),
    "rms_norm": lambda way: layer_norm.case(way, torch.float32, GROUPED, 32),
    "ffn": lambda way: ffn.case(way, torch.float32, TINY, 80),
    "ffn gated": lambda way: ffn.case(way, torch.float32, GROUPED, 80),
    "linear_cross_entropy": lambda way: linear_cross_entropy.case(way, torch.float32, TINY, 16),
    "embedding": lambda way: embedding.case(way, torch.float32, TINY, 2, 16),
}
QUICK = runner.Settings(quick=True)


PEAKS = {
    "operations": dict.fromkeys(("float32", "bfloat16", "float16"), 1e11),
    "sources": dict.fromkeys(("float32", "bfloat16", "float16"), "a test"),
    "gemm": {"float32": 9e10},
    "copy": {"1048576": 5e10, "268435456": 1e10},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(runner, "QUICK_SECONDS", 0.02)
    monkeypatch.setattr(runner, "peaks", lambda device, quick: PEAKS)


def tiny_case(N: int = 32) -> Case:
    return layer_norm.case("fwd", torch.float32, TINY, N)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_case_passes_its_gate(name, direction):
    problem = pickle.loads(pickle.dumps(CASES[name](direction))).build()
    assert set(problem.providers) == {OURS, PEER}
    for who, provider in problem.providers.items():
        if who not in problem.random:
            assert all(found.ok for found in problem.check(provider())), [str(f) for f in problem.check(provider())]


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_training_passes_its_gate(padded):
    problem = training_case(torch.float32, TINY, 1, 2, 8, padded=padded).build()
    for provider in problem.providers.values():
        assert all(found.ok for found in problem.check(provider()))


@pytest.mark.parametrize("name", SUITES)
def test_declarations(name):
    cases = suite(name)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.direction in DIRECTIONS
        assert len(case.shape) <= 30  # the table's width hangs on it
        pickle.dumps(case)  # a peer's process is given the case
        if case.op != "models" or case.direction != "fwd":
            assert case.operations > 0
            assert case.bytes > 0


def test_the_project_promises_these_rows():
    default = {case.name: case.targets for case in suite("default") if case.targets}
    assert default["attention fwd bfloat16 BERT-base 8x512"] == {"torch": 1.8}
    assert default["layer_norm fwd bfloat16 BERT-base 4096"] == {"torch": 2.0}
    promised = {case.name: case for case in suite("cpu")}
    row = promised["attention fwd bfloat16 BERT-base 1x2048"]
    assert (row.targets, row.limit_target) == ({"torch": 2.3}, 0.78)
    assert promised["attention fwd bfloat16 BERT-base 8x4096 decode"].rate_target == 30e9
    assert promised["linear_cross_entropy fwd+bwd bfloat16 32k tokens 8192, V=32768 bytes"].targets == {"torch": 10.0}
    assert promised["models fwd float32 BERT-base 8x512 padding"].targets == {"torch": 1.9, "ctranslate2": 1.0}
    assert all(case.targets for case in promised.values())


def test_filters():
    cases = suite("ops")
    found = Chosen(op=["attention"], dtype=["bf16"], direction=["bwd"], shape=["S=512"]).of(cases)
    assert {case.shape for case in found} == {"BERT-base 2x512", "BERT-base 2x512 padding"}
    assert all(case.dtype == "bfloat16" for case in found)
    assert Chosen(text="Llama").of(cases)
    with pytest.raises(ValueError, match="none of the suite's"):
        Chosen(op=["nothing"]).of(cases)
    with pytest.raises(ValueError, match="--direction must be one of"):
        Chosen(direction=["sideways"]).of(cases)


def test_a_wrong_provider_gets_no_time():
    problem = CASES["layer_norm"]("fwd").build()
    right = problem.providers[OURS]
    problem.providers[OURS] = lambda: right() * 1.05
    row = run_case(Case("layer_norm", "fwd", "bfloat16", "tiny", 1, 1, lambda: problem), QUICK)
    assert set(row["samples"]) == {PEER}
    assert "max error" in row["wrong"][OURS]
    limits = {"operations": {"float32": 1e9}, "copy": {"1048576": 1e9}}
    assert _figures.figures(row, limits).verdict == "WRONG"


def test_a_provider_that_raises_is_wrong_and_the_others_go_on():
    problem = CASES["layer_norm"]("fwd").build()

    def broken():
        raise RuntimeError("planted\nand more")

    problem.providers[OURS] = broken
    row = run_case(Case("layer_norm", "fwd", "bfloat16", "tiny", 1, 1, lambda: problem), QUICK)
    assert row["wrong"] == {OURS: "RuntimeError: planted"}
    assert set(row["samples"]) == {PEER}


def test_an_absent_case_says_why():
    def build() -> Problem:
        raise AbsentError("no weights")

    row = run_case(Case("models", "fwd", "float32", "none", 1, 1, build), QUICK)
    assert row["absent"] == {"case": "no weights"}
    assert _figures.notes({"rows": [row]}) == ["absent: models fwd float32 none: no weights"]


def test_a_row_that_no_kernel_serves_says_why(monkeypatch):
    from pytransformer import backends

    monkeypatch.setattr(backends, "why_not", lambda name, *_: None if name == "reference" else "planted")
    row = run_case(tiny_case(), QUICK)
    assert row["unfused"] == ["layer_norm: cpu: planted"]
    assert OURS in row["samples"]


def test_providers_are_interleaved():
    order: list[str] = []
    providers = {name: _timing.Local(lambda name=name: order.append(name)) for name in "ab"}
    found = _timing.measure(providers, 0.0)
    assert all(len(s.wall) == len(found.busy) >= _timing.LEAST_ROUNDS for s in found.samples.values())
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")


class Scripted:
    """A provider whose samples wait as long as the script says; each takes a millisecond of `_timing`'s clock."""

    clock = "wall time"

    def __init__(self, monkeypatch, waits=(), walls=()):
        self.waits, self.walls = iter([0.0, *waits]), iter([1.0, *walls])  # the first finds the number of calls
        self.now = 0.0
        monkeypatch.setattr(_timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def sample(self, calls):
        self.now += 0.001
        return _timing.Sample(next(self.walls, 1.0), 1.0, next(self.waits, 0.0))


@pytest.fixture
def scripted(monkeypatch):
    return partial(Scripted, monkeypatch)


def test_rounds_of_a_busy_machine_are_flagged_and_retaken(scripted):
    found = _timing.measure({"a": scripted([0.0, 0.5, 0.0, 0.0])}, 0.0)
    assert found.busy[:4] == [False, True, False, False]
    assert found.quiet == _timing.LEAST_ROUNDS
    endless = _timing.measure({"a": scripted([0.5] * 1000)}, 0.0)
    assert endless.quiet == 0
    assert len(endless.busy) <= 3 * _timing.LEAST_ROUNDS


def test_rounds_go_on_until_they_agree(scripted):
    """A row of ten samples' time, whatever they say they took."""
    quiet = _timing.measure({"a": scripted()}, 0.01)
    wild = _timing.measure({"a": scripted(walls=[1.0, 3.0] * 100)}, 0.01)
    assert len(quiet.busy) <= 10 < 12 < len(wild.busy) <= 20
    assert quiet.error() == 0
    assert wild.error() > _timing.WANTED_ERROR


def test_the_caches_are_flushed_before_every_sample(scripted):
    flushed = []
    found = _timing.measure({"a": scripted()}, 0.0, flush=lambda: flushed.append(1))
    assert len(flushed) == len(found.busy)
    assert found.samples["a"].calls == 1


def test_waiting_for_a_core_is_seen():
    if not _contention.available():
        pytest.skip("this system does not tell how long a thread waited")
    assert 0 <= _contention.waited_seconds() <= _contention.waited_seconds()


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_sample_waits_until_a_peers_process_is_at_rest():
    if not _contention.available():
        pytest.skip("this system does not tell how long a thread waited")
    _contention.wait_for_rest()
    begin = time.perf_counter()
    _contention.wait_for_rest()
    assert time.perf_counter() - begin < 0.1
    child = multiprocessing.get_context("fork").Process(target=_spin, args=(0.3,))
    child.start()
    begin = time.perf_counter()
    _contention.wait_for_rest()
    assert time.perf_counter() - begin > 0.2
    child.join()


def test_peak_memory_sees_what_a_call_holds_for_a_while():
    def call():
        held = torch.ones(2**23)  # 32 MiB, written
        return held[:4].clone()

    try:
        found = _memory.peak_memory(call, "cpu")
    except AbsentError as reason:
        pytest.skip(str(reason))
    assert all(30 * 2**20 < value < 40 * 2**20 for value in found)


def test_peak_memory_sees_what_the_kernels_keep_from_call_to_call():
    x = torch.ones(2**13, 2**10)
    ops.layer_norm(x, None)
    try:
        found = _memory.peak_memory(lambda: ops.layer_norm(x, None), "cpu")
    except AbsentError as reason:
        pytest.skip(str(reason))
    assert all(30 * 2**20 < value < 40 * 2**20 for value in found)


def test_peaks(monkeypatch):
    monkeypatch.setattr(_peaks, "_copy", lambda size, *_: 1e9)
    monkeypatch.setitem(_peaks.GEMM_SIZE, "cpu", 128)
    found = _peaks.peaks(quick=True)
    assert found["operations"]["float32"] >= found["gemm"]["float32"] > 0
    assert found["operations"]["bfloat16"] >= found["operations"]["float32"]
    assert found["sources"].keys() == found["operations"].keys()


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = FakeEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("capturable", [True, False])
def test_on_a_gpu_a_graph_is_replayed_where_the_call_can_be_captured(monkeypatch, capturable):
    """Against a torch.cuda of paper: a call takes 3 ms, its replay 2 ms."""
    calls = {"run": 0, "replay": 0}

    def took(name, milliseconds):
        calls[name] += 1
        FakeEvent.clock += milliseconds

    class Graph:
        def replay(self):
            took("replay", 2)

    @contextmanager
    def graph(_, stream):
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    fakes = {"Event": FakeEvent, "Stream": FakeStream, "current_stream": FakeStream, "synchronize": lambda: None,
             "stream": lambda _: nullcontext(), "CUDAGraph": Graph, "graph": graph}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    provider = _device.OnGpu(lambda: took("run", 3))
    assert provider.sample(5).wall == pytest.approx(0.010 if capturable else 0.015)
    assert calls["replay"] == (5 if capturable else 0)
    assert provider.clock == "CUDA events" + (", graph replay" if capturable else "")


def test_a_peer_in_a_process_of_its_own():
    remote = Remote(partial(peers.build, "sdpa-math"), threads=1)
    try:
        case = CASES["attention"]("fwd")
        remote.take(case)
        assert all(found.ratio < runner.PEER_SLACK for found in case.build().check(remote()))
        sample = remote.sample(3)
        assert sample.wall > 0
        with pytest.raises(AbsentError, match="it has no layer_norm"):
            remote.take(CASES["layer_norm"]("fwd"))
        remote.take(case)
        remote.child.process.kill()
        with pytest.raises(AbsentError, match="its process ended with code -9"):
            remote()
        assert not remote.alive()
    finally:
        remote.close()


def test_peers_say_why_they_are_absent(monkeypatch):
    assert peers.chosen("auto", suite_uses_peers=False) == ()
    assert "openvino" in peers.chosen("auto", suite_uses_peers=True)
    assert peers.chosen("sdpa-math,liger", False) == ("sdpa-math", "liger")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = peers.versions(["openvino", "flash-attn-2"])
    assert found["openvino"] == {"absent": "openvino is not installed (pip install openvino)"}
    row = run_case(tiny_case(), QUICK, peers.Peers(["openvino"]))
    assert set(row["samples"]) == {OURS, PEER}


def test_a_peer_that_cannot_serve_a_row_says_why():
    case = CASES["attention"]("bwd")
    workload = case.build().workload
    found, absent = peers.Peers(["sdpa-math", "sdpa-flash"]).join(case, workload)
    assert set(found) == {"sdpa-math", "sdpa-flash"}
    assert not absent
    inference = replace(peers.every()["sdpa-math"], inference=True)
    with pytest.raises(AbsentError, match="it has no backward"):
        inference.function(workload)
    joined = peers.Peers(["sdpa-math"])
    joined.peers = [inference]
    assert joined.join(case, workload) == ({}, {"sdpa-math": "it has no backward"})
    assert joined.join(replace(case, alone=True), workload) == ({}, {})


def test_peers_drop_like_plain_pytorch_and_are_not_compared():
    """torch.compile's way to serve a workload, without the compiler."""
    case = layer_norm.case("fwd", torch.float32, TINY, 32, dropout_p=0.5)
    plain = replace(peers.every()["torch.compile"], adapters={"*": lambda workload: workload.peer})
    joined = peers.Peers()
    joined.peers = [plain]
    row = run_case(case, QUICK, joined)
    assert set(row["samples"]) == {OURS, PEER, "torch.compile"}
    assert not row["wrong"]


def test_peers_without_dropout(monkeypatch):
    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_layer_norm = lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    workload = layer_norm.case("fwd", torch.float32, TINY, 32, dropout_p=0.5).build().workload
    found = [peers.every()["liger"].function(workload)(**workload.tensors) for _ in range(2)]
    assert not torch.equal(*found)  # it drops, at random
    dropping = attention.case("fwd", torch.float32, TINY, 1, 16, "dropout").build().workload
    with pytest.raises(AbsentError, match="it is compared without dropout only"):
        peers.every()["xformers"].function(dropping)


def test_peak_memory_is_a_row(tmp_path):
    row = run_case(replace(CASES["ffn"]("fwd+bwd"), metric="bytes"), QUICK)
    if "case" in row["absent"]:
        assert "memory" in row["absent"]["case"]
        pytest.skip(row["absent"]["case"])
    assert set(row["samples"]) == {OURS, PEER}
    assert all(value >= 0 for samples in row["samples"].values() for value in samples["wall"])


FAKE_TOOLS = {
    "valgrind": """#!/bin/sh
for word in "$@"; do case $word in --callgrind-out-file=*) echo "${word#*=}" > "$COUNTED/file";; esac; done
while case $1 in -*) true;; *) false;; esac; do shift; done
exec "$@"
""",
    "callgrind_control": """#!/bin/sh
[ "$1" = -d ] || exit 0
n=$(($(cat "$COUNTED/n" 2>/dev/null || echo 0) + 1)); echo $n > "$COUNTED/n"
echo "totals: $((n * 1000))" > "$(cat "$COUNTED/file").$n"
""",
}


def test_instructions_are_the_difference_of_two_counts(monkeypatch, tmp_path):
    """The protocol, with tools that count dumps: each holds 1000 more than the one before."""
    for name, text in FAKE_TOOLS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("COUNTED", str(tmp_path))
    found = _instructions.count(tiny_case())
    assert found["calls"] == {OURS: 500.0, PEER: 500.0}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AbsentError, match="valgrind and callgrind_control not found"):
        _instructions.count(tiny_case())


def test_only_rows_too_noisy_to_time_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(_instructions, "count", lambda case: {"isa": "avx2", "calls": {OURS: 5.0, PEER: 7.0}})
    cases = [tiny_case(16), tiny_case(32)]
    monkeypatch.setattr(runner, "too_noisy", lambda results: [cases[1].name])
    results = run(cases, tmp_path / "r.json", "test", QUICK, instructions=True)
    assert ["instructions" in row for row in results["rows"]] == [False, True]
    assert any("instructions of a call" in line for line in _figures.notes(results))


def test_the_live_table_fits_80_columns(tmp_path):
    terminal = Console(width=80, height=24, force_terminal=True, file=io.StringIO())
    with LiveTable(2, terminal) as live:
        run([tiny_case(16), tiny_case(32)], tmp_path / "r.json", "test", QUICK, starting=live.starting,
            finished=live.finished)  # fmt: skip
    paper = Console(width=200, file=io.StringIO(), record=True)
    paper.print(live.live.get_renderable())
    text = paper.export_text()
    assert "2/2" in text
    assert "tiny 16" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_exponents_are_the_slopes():
    assert complexity.exponent([(n, 3e-6 * n**2 + 0.1 * (n < 100)) for n in (64, 128, 256, 512)]) == pytest.approx(2)
    assert complexity.exponent([(1, 1.0), (2, 2.0)]) is None


def test_the_four_forms_pass_their_gate(capsys):
    rows = []
    for form in complexity.FORMS:
        row = run_case(complexity.case(form.name, 64, 64), QUICK)
        assert not row["wrong"]
        rows.append(row)
    complexity.print_fits({"rows": [{**row, "sizes": {**row["sizes"], "d": complexity.FIXED_WIDTH}} for row in rows]})
    assert "O(logₖ n)" in capsys.readouterr().out


def test_a_killed_run_leaves_what_was_done_and_resumes(tmp_path):
    cases, output = [tiny_case(16), tiny_case(32), tiny_case(48)], tmp_path / "results.json"

    def killed(results, index):
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cases, output, "test", QUICK, finished=killed)
    results = load(output)
    assert [len(results["rows"]), results["finished"]] == [2, False]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    again = run(cases, output, "test", QUICK, resume=True)
    assert again["finished"]
    assert again["rows"][:2] == results["rows"]
    assert [row["name"] for row in again["rows"]] == [case.name for case in cases]


def test_a_case_is_visited_thrice_and_resumed_between(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "SECONDS", 0.01)
    monkeypatch.setattr(runner, "too_noisy", lambda results: [])
    cases, output, seen = [tiny_case(16), tiny_case(32)], tmp_path / "results.json", []

    def killed(results, index):
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cases, output, "test", runner.PLAIN, finished=killed)
    assert seen == [0, 1, 0]
    between = load(output)
    assert [set(row["visits"]) for row in between["rows"]] == [{0, 1}, {0}]
    rows = run(cases, output, "test", runner.PLAIN, resume=True)["rows"]
    for row, before in zip(rows, between["rows"], strict=True):
        kept = len(before["visits"])
        assert set(row["visits"]) == {0, 1, 2}
        assert row["visits"][:kept] == before["visits"]
        assert set(row["visits"][kept:]).isdisjoint(before["visits"])
        assert row["samples"][OURS]["wall"][:kept] == before["samples"][OURS]["wall"]
        assert all(len(s["wall"]) == len(s["cpu"]) == len(row["visits"]) for s in row["samples"].values())
        assert len(row["busy"]) == len(row["visits"])


def test_a_noisy_case_is_visited_again(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "SECONDS", 0.01)
    cases = [tiny_case(16), tiny_case(32)]
    monkeypatch.setattr(runner, "too_noisy", lambda results: [cases[1].name])
    rows = run(cases, tmp_path / "results.json", "test", runner.PLAIN)["rows"]
    assert [max(row["visits"]) + 1 for row in rows] == [runner.VISITS, runner.MOST_VISITS]


def test_another_run_is_not_resumed(tmp_path):
    output = tmp_path / "results.json"
    results = run([tiny_case()], output, "test", QUICK)
    with pytest.raises(ValueError, match="suite 'test', not 'other'"):
        run([tiny_case()], output, "other", QUICK, resume=True)
    with pytest.raises(ValueError, match=r"quick .* is True, and now False"):
        run([tiny_case()], output, "test", resume=True)
    results["environment"]["threads"] = 99
    save(results, output)
    with pytest.raises(ValueError, match=r"threads of .* is 99"):
        run([tiny_case()], output, "test", QUICK, resume=True)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "[]", '{"schema": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            load(path)


def test_markdown_goes_between_the_marks(tmp_path):
    results = run([tiny_case()], tmp_path / "r.json", "test", QUICK)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(readme, markdown(results))
    text = readme.read_text()
    assert "| layer_norm | fwd float32 tiny 32 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    with pytest.raises(ValueError, match="must have the lines"):
        write_into(tmp_path / "r.json", "")


def test_markdown_of_a_suite_of_promises_says_what_was_promised(tmp_path):
    case = replace(tiny_case(), targets={"torch": 1000.0}, limit_target=0.9, rate_target=3e9, speed_target=2e12)
    results = run([case, tiny_case(48)], tmp_path / "r.json", "cpu", QUICK)
    first, second = (line for line in markdown(results).splitlines() if "tiny" in line)
    assert "| 1000x torch, 90% of the limit, 3 GB/s a thread, 2 TFLOP/s |" in first
    assert re.search(r"\| [0-9.]+x torch, \d+%, [0-9.e-]+ GB/s a thread, [0-9.e-]+ TFLOP/s: missed \|", first)
    assert second.endswith("|  |  |")
    results["suite"], results["environment"]["gpu"] = "gpu", "NVIDIA H200"
    assert "Measured on NVIDIA H200; torch" in markdown(results)


@pytest.mark.parametrize(("operations", "moved"), [(1.0, 2.0**22), (1e8, 1.0)], ids=["bytes", "operations"])
def test_the_limit_is_timed_beside_a_row_that_promises_a_part_of_it(tmp_path, operations, moved):
    promising = replace(tiny_case(), operations=operations, bytes=moved, limit_target=0.5)
    results = run([promising, tiny_case(48)], tmp_path / "r.json", "cpu", QUICK)
    first, second = results["rows"]
    assert set(first["samples"]) == {OURS, PEER, LIMIT}
    assert set(second["samples"]) == {OURS, PEER}
    beside = min(first["samples"][LIMIT]["wall"])
    assert 1e8 / 1e13 < beside < 0.1, "what is timed is not the floor"  # a copy of 4 MiB, or 1e8 operations
    found = _figures.figures(first, PEAKS)
    assert set(found.others) == {PEER}


def arguments(*words: str) -> argparse.Namespace:
    return cli._parser().parse_args(["bench", *words])


def test_bench_runs_saves_and_shows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer_norm, "cases", lambda: iter([tiny_case()]))
    output = str(tmp_path / "deep" / "results.json")
    assert cli.main(["bench", "run", "--suite", "layer_norm", "--quick", "--output", output]) == 0
    results = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert results["finished"]
    (row,) = results["rows"]
    assert set(row["samples"]) == {OURS, PEER}
    assert all(len(s["wall"]) == len(s["cpu"]) == len(row["busy"]) >= 4 for s in row["samples"].values())
    assert results["environment"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "tiny 32" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80

    assert cli.main(["bench", "markdown", output]) == 0
    assert "| layer_norm | fwd float32 tiny 32 |" in capsys.readouterr().out
    assert cli.main(["bench", "compare", output, output, "--fail-if-slower", "5%"]) == 0
    assert "tiny 32" in capsys.readouterr().out


def test_compare_fails_where_asked(tmp_path, capsys):
    before = run([tiny_case()], tmp_path / "a.json", "test", QUICK)
    for samples in before["rows"][0]["samples"].values():
        samples["wall"] = [1.0] * len(samples["wall"])
    before["rows"][0]["busy"] = []
    save(before, tmp_path / "a.json")
    before["rows"][0]["samples"][OURS]["wall"] = [1.15] * len(before["rows"][0]["samples"][OURS]["wall"])
    save(before, tmp_path / "b.json")
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["bench", "compare", *paths]) == 0
    assert "+15.0%" in capsys.readouterr().out
    assert cli.main(["bench", "compare", *paths, "--fail-if-slower", "5%"]) == 1
    assert cli.main(["bench", "compare", *paths, "--fail-if-slower", "0.2"]) == 0
    save({**before, "rows": []}, tmp_path / "b.json")
    assert cli.main(["bench", "compare", *paths]) == 2


def test_the_cpu_suite_fails_where_a_promise_is_missed(tmp_path):
    from pytransformer.benchmarks._command import fell_short

    results = run([tiny_case()], tmp_path / "a.json", "cpu", QUICK)
    results["rows"][0]["targets"] = {PEER: 1e-6}
    assert not fell_short(results)
    results["rows"][0]["targets"] = {PEER: 1e6}
    assert fell_short(results)
    assert not fell_short({**results, "suite": "ops"})


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--suite", "nothing"],
        ["run", "--op", "nothing"],
        ["run", "--peers", "nothing"],
        ["compare", "a.json", "b.json"],
        ["markdown", "a.json"],
    ],
)
def test_bench_refuses_in_one_line(words, capsys):
    assert cli.main(["bench", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_says_why_it_cannot_run(capsys):
    assert cli.main(["bench", "run", "--suite", "gpu"]) == 2
    assert "needs an NVIDIA GPU, and" in capsys.readouterr().err


def test_bench_list(capsys):
    assert cli.main(["bench", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SUITES)
    assert "openvino" in printed
    assert cli.main(["bench", "list", "--suite", "cpu"]) == 0
    assert "attention fwd bfloat16 BERT-base 8x512  (target 2.3x torch, 78% of the limit)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["-1%", "100%", "much"])
def test_a_share_is_from_0_to_1(text):
    with pytest.raises(SystemExit):
        arguments("compare", "a", "b", "--fail-if-slower", text)


def test_the_plain_bert_peer_is_transformers_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, layer_norm_eps=EPS, **sizes)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(60, (3, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()
    tokens = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = theirs(**tokens).last_hidden_state
        actual = plain_bert(theirs.state_dict(), tokens, 12)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_the_gpu_suite_declares_every_promise_and_says_why_it_cannot_run(capsys):
    from pytransformer import cli
    from pytransformer.benchmarks import gpu
    from pytransformer.benchmarks._figures import promises

    cases = list(gpu.cases())
    told = [f"{case.op} {case.direction} {promises(vars(case))}" for case in cases if promises(vars(case))]
    for wanted, rows in {
        "attention fwd 450 TFLOP/s": 3,
        "attention fwd 420 TFLOP/s": 3,
        "attention fwd 3x torch, 3x sdpa-efficient, 3x sdpa-cudnn": 1,
        "attention fwd+bwd 1x flex-attention": 3,
        "attention bwd 380 TFLOP/s": 1,
        "layer_norm fwd 92% of the limit": 5,
        "layer_norm bwd 88% of the limit": 5,
        "ffn fwd+bwd 1.1x torch.compile": 3,
        "linear_cross_entropy fwd+bwd 1x torch": 1,
        "linear_cross_entropy fwd+bwd 10x torch": 1,
        "attention fwd 330 TFLOP/s": 2,
        "attention bwd 290 TFLOP/s": 1,
        "attention fwd 85% of the limit": 1,
        "layer_norm fwd 95% of the limit": 5,
        "layer_norm bwd 90% of the limit": 5,
    }.items():
        assert told.count(wanted) == rows, wanted
    assert len(told) == 40
    # Of at most 8 minutes: a case takes 0.8 s to time, and about as long again to build, check and capture.
    assert len(cases) <= 100
    assert all(case.device == "cuda" for case in cases)
    if gpu.why_not() is not None:
        assert cli.main(["bench", "run", "--suite", "gpu"]) == 2
        assert "the suite gpu needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["bool mask", "window", "documents"])
def test_masks_of_the_gpu_suite_are_right_against_plain_torch(variant):
    """The same case on the CPU: what the op sees and what torch sees is one mask."""
    from pytransformer.benchmarks import attention
    from pytransformer.benchmarks._models import Model

    model = Model("small", 2, 16, 64, 100)
    found = attention.case("fwd", torch.float32, model, 1, 1200, variant)
    problem = found.build()
    for name, call in problem.providers.items():
        assert all(c.ok for c in problem.check(call())), name
    visible = attention.MASKS[variant](1200, "cpu")
    assert found.operations == 2 * 2 * 16 * 2 * visible.sum()
