"""The benchmarks: one declarative file per op, and the harness that runs them. Installed as
``pytransformer.benchmarks``; the command is ``pytransformer bench``.

    _case.py, _op_problem.py      what a benchmark declares
    _timing.py, _device.py        taking samples; _contention.py: was the machine busy?
    _statistics.py, _figures.py   what may be said of them
    _instructions.py              what to count where time is too noisy
    _peaks.py, _environment.py    the machine and its limits
    _run.py, _file.py             the loop, and the JSON
    _processes.py, peers/         other people's kernels, some in processes of their own
    _suites.py, _command.py       what the command line asks for
    _table.py, markdown.py, _compare.py, _report.py, _plots.py   showing it

The suites stand in the files without an underscore: the five ops, ``models``, ``cpu``, ``gpu``, ``complexity``,
``memory`` and ``overhead``.
"""

from pytransformer.benchmarks._command import command
from pytransformer.benchmarks._suites import OPS, SUITES, suite

__all__ = ["OPS", "SUITES", "command", "suite"]
