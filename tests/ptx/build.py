"""Compiles what the runner needs, and keeps it by a hash of all that went in: ``build/ptx`` in the repository.

Four things are made: the runtime library, the PTX of a .cu file (nvcc), the shared library of one kernel (translated,
then g++), and the module ``_cuda`` over the stand-in runtime. A kernel is translated when it is first launched, so a
run of the tests compiles the instantiations that it uses and no others.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ptx.translate import parse, translate

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "ptx"
RUNTIME = HERE / "runtime"
JOBS = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 4))
# Only fma fuses: -ffp-contract=off. Translated kernels jump past declarations and are one long function.
CXX = ["g++", "-std=c++17", "-fPIC", "-march=native", "-ffp-contract=off", f"-I{RUNTIME}"]
NVCC = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-DNDEBUG"]
ARCHS = ("80", "90a")


@cache
def unavailable() -> str | None:
    """Why kernels cannot be run here, or None."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the PTX runner's fibers are written for x86-64 Linux"
    for tool, what in (("nvcc", "the CUDA toolkit"), ("g++", "a C++ compiler")):
        if shutil.which(tool) is None:
            return f"{tool} is not on PATH (the PTX runner needs {what})"
    return None


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def contents(*folders: Path) -> str:
    """All that stands in C++ files below the folders."""
    paths = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp"))
    return digest(*(f"{p.name} {p.read_text()}" for p in paths))


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def made(path: Path, command: Sequence[str]) -> Path:
    """The file ``path``, made by ``command`` with ``{}`` for where to write it, unless it is there already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            run([part.replace("{}", str(unfinished)) for part in command])
            unfinished.replace(path)
    return path


@cache
def runtime() -> Path:
    """The runtime as a shared library."""
    key = digest(contents(RUNTIME), CXX)
    objects = [
        (CACHE / f"{source.stem}-{key}.o", [*CXX, "-O2", "-c", str(source), "-o", "{}"])
        for source in sorted(RUNTIME.glob("*.cpp"))
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        paths = list(pool.map(lambda one: made(*one), objects))
    return made(CACHE / f"libptx-{key}.so", ["g++", "-shared", "-o", "{}", *map(str, paths)])


def ptx_of(source: Path, arch: str, defines: Sequence[str] = (), text: str | None = None) -> str:
    """The PTX of a .cu file, or of ``text`` in its place."""
    code = source.read_text() if text is None else text
    flags = [*NVCC, f"-arch=compute_{arch}", f"-I{source.parent}", f"-I{ROOT / 'csrc' / 'include'}", *defines]
    path = CACHE / f"{source.stem}-{digest(code, contents(source.parent), flags)}.ptx"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, source.name)
            given.write_text(code)
            made(path, [*flags, "-ptx", str(given), "-o", "{}"])
    return path.read_text()


def kernel(ptx: str, name: str) -> tuple[Path, dict[int, tuple[str, str]]]:
    """The shared library of one kernel, and what its lines are."""
    headers = "".join((RUNTIME / header).read_text() for header in ("machine.h", "instructions.h"))
    translator = "".join(path.read_text() for path in sorted((HERE / "translate").glob("*.py")))
    stem = digest(ptx, name, headers, translator, CXX)
    library, table = CACHE / f"{stem}.so", CACHE / f"{stem}.json"
    if not (library.exists() and table.exists()):
        translation = translate(parse(ptx), name)
        source = CACHE / f"{stem}.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(translation.code)
        table.write_text(json.dumps(translation.lines))
        made(library, [*CXX, "-O1", "-w", "-shared", str(source), "-o", "{}"])
    return library, {int(line): tuple(what) for line, what in json.loads(table.read_text()).items()}
