"""``pytransformer tune``, all but the timing: what is measured, what is kept, where it lies and who reads it.

The kernels are launched at tensors without memory and recorded (``kernels/_offline``); a made-up timer judges them.
"""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch

from pytransformer import _info, backends, cli, tune

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton") == "triton is not installed", reason="triton is not installed"
)
ARCH, DEVICE = "sm80", "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, as far as the tables know; yields the modules that make and read them."""
    from pytransformer.kernels import _table, _tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(_table.VARIABLE, raising=False)
    monkeypatch.setattr(_table, "device_name", lambda: DEVICE)
    _table.in_use.cache_clear()
    yield _table, _tune
    _table.in_use.cache_clear()


def test_every_choice_that_kernels_read_is_measured(machine, monkeypatch):
    import triton_table

    from pytransformer.kernels import _configs, _offline, _table, _tune

    read = set()

    def spy(arch, key, built_in):
        read.add(key)
        return _table.chosen(arch, key, built_in)

    with monkeypatch.context() as patch, _offline.recorded(ARCH):
        patch.setattr(_configs, "chosen", spy)
        for _, call in triton_table.cases():
            call()
        for E in (512, 1024, 2048, 4096):
            for dtype in (torch.bfloat16, torch.float32):
                _configs.fuse_activation("fwd", dtype, E, ARCH), _configs.fuse_activation("bwd", dtype, E, ARCH)
    measured = {p.key for p in _tune.problems(ARCH, "meta")}

    def kinds(keys):
        return {re.sub(r" [EV]=\d+", "", key) for key in keys}

    assert kinds(read) == kinds(measured)
    assert {key for key in read if key.startswith(("attention", "matmul", "ffn"))} <= measured


def test_every_problem_launches_the_kernel_with_its_candidate(machine):
    """A candidate that the call does not take would be timed as another."""
    _table, _tune = machine
    from pytransformer.kernels import _offline

    for p in _tune.problems(ARCH, "meta"):
        assert len(p.candidates) == len(set(p.candidates)) > 1, p.key
        for candidate in (p.candidates[0], p.candidates[-1]):
            with _offline.recorded(ARCH) as launches, _table.trying({p.key: candidate}):
                call = p.build()
                launches.clear()
                call()
            if isinstance(candidate, bool):
                fused = any(launch.name in ("hidden_kernel", "hidden_backward_kernel") for launch in launches)
                assert fused == candidate, p.key
                continue
            found = [
                launch
                for launch in launches
                if launch.options.get("num_stages") == candidate.num_stages
                and launch.options["num_warps"] == candidate.num_warps
                and set(candidate.tile) <= {v for k, v in launch.arguments.items() if k.startswith(("BLOCK", "ROWS"))}
            ]
            assert found, f"{p.key}: nothing is launched with {candidate}"


def test_the_fastest_is_kept_where_it_is_faster_by_more_than_noise(machine):
    _table, _tune = machine
    from pytransformer.kernels._table import Config

    first, second, third = (Config((64, n), 4) for n in (16, 32, 64))
    for times, best in (((1.0, 0.98, 0.99), first), ((1.0, 0.99, 0.9), third), ((2.0, 1.0, 0.99), third)):
        judged = dict(zip((first, second, third), times, strict=True))
        p = _tune.Problem("attention", "key", (first, second, third), lambda: lambda: None)
        (found,) = _tune.tune([p], lambda call, judged=judged: judged[_table._tried["key"]])
        assert found.best == best


def test_a_candidate_that_does_not_run_is_left_out(machine):
    _table, _tune = machine
    from triton.runtime.errors import OutOfResources

    def timer(call):
        choice = _table._tried["key"]
        if choice == 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if choice == 2:
            raise RuntimeError("the compiler gave up")
        return 5.0

    p = _tune.Problem("attention", "key", (1, 2, 3), lambda: lambda: None)
    (found,) = _tune.tune([p], timer)
    assert found.best == 3
    assert "shared memory" in found.failed[1]
    assert "gave up" in found.failed[2]
    with pytest.raises(RuntimeError, match="no configuration of 'key' runs here: needs more than"):
        _tune.tune([_tune.Problem("attention", "key", (1, 2), lambda: lambda: None)], timer)


def test_what_was_measured_is_in_use_for_the_problems_behind(machine):
    _table, _tune = machine
    seen = []
    one = _tune.Problem("ffn", "one", (False, True), lambda: lambda: None)
    two = _tune.Problem("ffn", "two", (False, True), lambda: lambda: seen.append(_table.chosen(ARCH, "one", False)))

    def timer(call):
        call()
        return 1.0 if _table._tried.get("one") else 2.0

    _tune.tune([one, two], timer)
    assert seen == [True, True]
    assert _table._tried == {}


def tuned(machine, monkeypatch, *arguments):
    """Runs the command with a GPU and a timer made up; a bigger tile is faster, and one kernel slower than two."""
    _table, _tune = machine
    from pytransformer.kernels import _configs, _offline

    def timer(call):
        choice = list(_table._tried.values())[-1]
        return 1.0 + choice if isinstance(choice, bool) else 1.0 / (choice.tile[0] * choice.num_warps)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "why_not", lambda: None)
        patch.setattr(_tune, "milliseconds", timer)
        patch.setattr(_tune, "problems", partial(_tune.problems, device="meta"))
        patch.setattr(_configs, "architecture", lambda device: ARCH)
        with _offline.recorded(ARCH):
            return cli.main(["tune", *arguments])


def test_the_command_writes_a_table_that_kernels_then_read(machine, monkeypatch, capsys):
    _table, _tune = machine
    from pytransformer.kernels import _configs

    before = _configs.attention("dkv", torch.bfloat16, 64, "plain", ARCH)
    assert _configs.fuse_activation("fwd", torch.bfloat16, 512, ARCH) is True
    assert tuned(machine, monkeypatch) == 0
    printed = capsys.readouterr().out
    path = _table.default_path(ARCH)
    assert str(path) in printed
    assert "attention dkv 16 bits D=64 plain: 128x" in printed
    after = _configs.attention("dkv", torch.bfloat16, 64, "plain", ARCH)
    assert after != before
    assert after.tile[0] * after.num_warps == 1024
    assert _configs.fuse_activation("fwd", torch.bfloat16, 512, ARCH) is False
    assert "choices measured on this machine" in _table.in_use(ARCH)[1]
    rows = json.loads(path.read_text())["choices"]
    assert rows["ffn fused fwd 16 bits E=512"] == {"fused": False, "milliseconds": 1.0}
    with _table.built_in_only():
        assert rows.keys() == {p.key for p in _tune.problems(ARCH, "meta")}
    assert _table.load(path).choices["attention dkv 16 bits D=64 plain"] == after


def test_one_op_is_added_to_what_is_known(machine, monkeypatch, tmp_path, capsys):
    _table, _ = machine
    path = tmp_path / "elsewhere.json"
    assert tuned(machine, monkeypatch, "--op", "embedding", "--output", str(path)) == 0
    assert f"{_table.VARIABLE}={path}" in capsys.readouterr().out
    assert {key.split()[0] for key in _table.load(path).choices} == {"embedding"}
    assert tuned(machine, monkeypatch, "--op", "linear_cross_entropy", "--output", str(path)) == 0
    assert {key.split()[0] for key in _table.load(path).choices} == {"embedding", "matmul", "cross_entropy"}
    assert _table.in_use(ARCH)[0] is None  # nobody named it
    path.write_text("not a table")
    assert tuned(machine, monkeypatch, "--op", "embedding", "--output", str(path)) == 0
    assert {key.split()[0] for key in _table.load(path).choices} == {"embedding"}


def written(_table, path, **changes):
    from importlib.metadata import version

    known = {"arch": ARCH, "device": DEVICE, "triton": version("triton"), "choices": {}} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))
    _table.in_use.cache_clear()


@pytest.mark.parametrize("field", ["arch", "device", "triton"])
def test_a_table_of_another_machine_is_not_used_and_raises_where_it_was_named(machine, monkeypatch, field):
    _table, _ = machine
    from pytransformer.kernels import _configs

    path = _table.default_path(ARCH)
    choices = {"elementwise": {"tile": [8, 8], "num_warps": 1, "num_stages": 1}}
    written(_table, path, choices=choices)
    assert _configs.elementwise(ARCH).tile == (8, 8)
    written(_table, path, choices=choices, **{field: "another"})
    assert _configs.elementwise(ARCH).tile == (16, 128)
    assert f"is not used: it was measured with {field} another" in _table.in_use(ARCH)[1]
    monkeypatch.setenv(_table.VARIABLE, str(path))
    _table.in_use.cache_clear()
    with pytest.raises(ValueError, match=f"does not hold here: it was measured with {field} another"):
        _configs.elementwise(ARCH)


@pytest.mark.parametrize(
    "row",
    [
        {"tile": [8, 8.5], "num_warps": 1, "num_stages": 1},
        {"tile": [8, 8], "num_warps": -1, "num_stages": 1},
        {"tile": [8, 8], "num_warps": 4},
        {"fused": "yes"},
        "8x8",
    ],
)
def test_a_file_that_is_no_table_is_named(machine, row):
    _table, _ = machine
    from pytransformer.kernels import _configs

    path = _table.default_path(ARCH)
    written(_table, path, choices={"elementwise": row})
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no table of Triton configurations"):
        _configs.elementwise(ARCH)


@pytest.mark.parametrize("row", [{"fused": True}, {"tile": [8], "num_warps": 1, "num_stages": 1}])
def test_a_choice_of_another_kind_is_refused(machine, row):
    _table, _ = machine
    from pytransformer.kernels import _configs

    written(_table, _table.default_path(ARCH), choices={"elementwise": row})
    with pytest.raises(ValueError, match="for 'elementwise', unlike"):
        _configs.elementwise(ARCH)


def test_the_table_is_read_at_the_first_launch_and_not_before(machine, monkeypatch, tmp_path):
    _table, _ = machine
    from pytransformer.kernels import _configs

    monkeypatch.setenv(_table.VARIABLE, str(tmp_path / "missing.json"))
    _table.in_use.cache_clear()
    assert _table.in_use.cache_info().currsize == 0
    with pytest.raises(ValueError, match="is no table of Triton configurations"):
        _configs.elementwise(ARCH)
    with _table.built_in_only():
        assert _configs.elementwise(ARCH).tile == (16, 128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tune_says_so_and_exits_with_1(capsys):
    assert cli.main(["tune"]) == 1
    assert "pytransformer tune: needs a GPU that Triton reaches: torch sees no GPU" in capsys.readouterr().err


def test_info_says_which_table_is_in_use(machine, monkeypatch):
    _table, _ = machine
    from pytransformer.kernels import _configs

    if not torch.cuda.is_available():
        assert _info.triton_tables() == {"table": "none read: torch sees no GPU"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_configs, "architecture", lambda device: ARCH)
    assert _info.triton_tables()[ARCH].startswith("built in, not measured on this machine")
    written(_table, _table.default_path(ARCH))
    assert _info.triton_tables()[ARCH].endswith("0 choices measured on this machine")
    _table.default_path(ARCH).write_text("{")
    _table.in_use.cache_clear()
    assert _info.triton_tables()[ARCH].startswith("cannot be read: ")
