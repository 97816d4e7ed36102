"""Instructions a call, counted by valgrind's callgrind: the same on a busy machine as on a quiet one.

For rows whose noise allows no verdict. The case is built once, on one thread, in a process under callgrind, which
starts uninstrumented and is switched on from outside around 1 call and around ``MORE`` calls; the difference is
what a call costs, without the cost of switching. valgrind knows no AVX-512, so the processor it shows has AVX2
at most, and the kernels are those of that set: the counts of two commits compare, the counts of one machine with
its times do not.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from pytransformer.backends import cpu as cpu_backend
from pytransformer.backends import unavailable
from pytransformer.benchmarks._case import AbsentError, Case

MORE = 3  # calls in the second count
PATIENCE = 900.0  # seconds; under valgrind torch alone takes a minute to import
TOOLS = ("valgrind", "callgrind_control")

Counts = dict[str, Any]


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found (apt-get install valgrind)" if missing else None


def count(case: Case) -> Counts:
    """``{"isa": ..., "calls": {provider: instructions of a call}}``.

    Raises:
        AbsentError: valgrind is missing, or did not do it.
    """
    reason = why_not()
    if reason is not None:
        raise AbsentError(reason)
    with tempfile.TemporaryDirectory() as folder:
        pickled, dumps = Path(folder, "case"), Path(folder, "dump")
        pickled.write_bytes(pickle.dumps(case))
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={dumps}",
                   sys.executable, "-m", __name__, str(pickled)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=environment) as child:  # fmt: skip
            timer = Timer(PATIENCE, child.kill)
            timer.start()
            try:
                return _count_all(child, dumps)
            finally:
                timer.cancel()
                child.kill()


def _count_all(child: subprocess.Popen[str], dumps: Path) -> Counts:
    described = json.loads(_line(child))
    found, number = {}, 0
    for name in described["providers"]:
        totals = []
        for calls in (1, MORE):
            number += 1
            _control(child, "-i", "on")
            assert child.stdin is not None
            child.stdin.write(f"{name} {calls}\n")
            child.stdin.flush()
            _line(child)
            _control(child, "-i", "off")
            _control(child, "-d")
            totals.append(_total(Path(f"{dumps}.{number}")))
        found[name] = (totals[1] - totals[0]) / (MORE - 1)
    return {"isa": described["isa"], "calls": found}


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise AbsentError(f"the process under callgrind ended with code {child.wait()}")
    return line


def _control(child: subprocess.Popen[str], *arguments: str) -> None:
    command = ["callgrind_control", *arguments, str(child.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode != 0 or "Error" in done.stdout:
        raise AbsentError(f"callgrind_control failed: {(done.stderr or done.stdout).strip()[:200]}")


def _total(dump: Path) -> int:
    try:
        found = re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)
    except OSError as error:
        raise AbsentError(f"callgrind wrote no {dump.name}: {error}") from error
    if found is None:
        raise AbsentError(f"callgrind's {dump.name} has no totals")
    return int(found.group(1))


def main(pickled: str) -> None:
    """The process under callgrind: calls what its parent names, as often as it says."""
    torch.set_num_threads(1)
    case: Case = pickle.loads(Path(pickled).read_bytes())
    providers = case.build().providers
    for run in providers.values():
        run()  # what only a first call does, is done
    isa = cpu_backend.isa() if unavailable("cpu") is None else None
    print(json.dumps({"providers": list(providers), "isa": isa}), flush=True)
    for line in sys.stdin:
        name, calls = line.split()
        for _ in range(int(calls)):
            providers[name]()
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
