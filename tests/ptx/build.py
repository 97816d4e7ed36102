"""Compiles what the runner needs, and keeps it by a hash of all that went in: ``build/ptx`` in the repository.

Four things are made: the runtime library, the PTX of a .cu file (nvcc), the shared library of one kernel (translated,
then g++), and the module ``_cuda`` over the stand-in runtime. A kernel is translated when it is first launched, so a
run of the tests compiles the instantiations that it uses and no others.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
# How a translated kernel is compiled: one of many thousand lines is run on too little for optimising to pay.
SMALL, LARGE = ("-Og", "-w"), ("-O0", "-w")
LARGE_FROM = 4000  # lines of C++
HEADERS = ("instructions.h", "arithmetic.h", "machine.h", "values.h")
ARCHS = ("80", "90a")
HOPPER = "-DPYTRANSFORMER_HOPPER"  # as setup.py says it where it compiles for 90a


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


def contents_of_headers(*folders: Path) -> str:
    return digest(*(p.read_text() for folder in folders for p in sorted(folder.glob("*.*h"))))


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


def ptx_of_edited(unit: str, edited: Mapping[str, str], change: Callable[[str], str], arch: str) -> str:
    """The PTX of a .cu file of the library, in a copy where ``edited`` gives some files' text, and ``change`` is made
    to all of them."""
    paths = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    texts = {path.name: change(edited.get(path.name, path.read_text())) for path in paths}
    include = ROOT / "csrc" / "include"
    flags = [*NVCC, f"-arch=compute_{arch}", f"-I{include}"]
    path = CACHE / f"{unit}-{digest(*texts.values(), contents(include), flags)}.ptx"
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text)
        return made(path, [*flags, "-ptx", f"{folder}/{unit}", "-o", "{}"]).read_text()


@cache
def headers(flags: tuple[str, ...]) -> Path:
    """A folder with the runtime's headers, the larger one compiled ahead: kernels are small beside it."""
    key = digest(*((RUNTIME / name).read_text() for name in HEADERS), CXX, flags)
    folder = CACHE / f"include-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in HEADERS:
        made(folder / name, ["cp", str(RUNTIME / name), "{}"])
    made(folder / "instructions.h.gch", [*CXX[:-1], *flags, "-x", "c++-header", str(folder / HEADERS[0]), "-o", "{}"])
    return folder


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of the processes that run the tests together: the next finds what this one has made."""
    import fcntl

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def module() -> tuple[Path, dict[str, list[str]]]:
    """The module ``_cuda`` over the stand-in runtime, and the PTX of all its kernels by architecture, a text a file.

    Files of Hopper's own kernels come last.
    """
    with one_at_a_time():
        return _made_module()


def _made_module() -> tuple[Path, dict[str, list[str]]]:
    csrc = ROOT / "csrc"
    common = contents(csrc / "include"), contents_of_headers(csrc / "cuda", csrc / "bindings")
    sources = sorted((csrc / "cuda").glob("*.cu"), key=lambda source: (is_hopper(source), source))
    _pybind()
    with ThreadPoolExecutor(JOBS) as pool:
        halves = list(pool.map(lambda source: _host_and_device(source, common), sources))
        objects = list(pool.map(lambda source: _binding(source, common), _bindings()))
    runtime_object = CACHE / f"cudart-{digest(contents(HERE / 'cudart'), CXX)}.o"
    cuda = ["-I", _cuda_include()]
    made(runtime_object, [*CXX, *cuda, "-O1", "-c", str(HERE / "cudart" / "cudart.cpp"), "-o", "{}"])
    linked = [str(path) for path in (*(host for host, _ in halves), *objects, runtime_object, runtime())]
    path = CACHE / f"_cuda-{digest(*linked)}.so"
    made(path, ["g++", "-shared", "-Wl,-Bsymbolic", "-o", "{}", *linked])
    return path, {arch: [device[arch].read_text() for _, device in halves if arch in device] for arch in ARCHS}


def is_hopper(source: Path) -> bool:
    """Whether a file is compiled for compute capability 9.0 alone, as setup.py has it."""
    return source.stem.endswith("_sm90")


def _host_and_device(source: Path, common: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """One run of nvcc gives the host object and the PTX that it would embed."""
    csrc = ROOT / "csrc"
    flags = [*NVCC, HOPPER, "-Xcompiler", "-fPIC", "-cudart", "none", f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}"]
    archs = ARCHS[1:] if is_hopper(source) else ARCHS
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    folder = CACHE / f"{source.stem}-{digest(source.read_text(), *common, flags)}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            run([*flags, "--keep", "--keep-dir", scratch, "-c", str(source), "-o", f"{scratch}/{source.stem}.o"])
            unfinished = Path(scratch, "kept")
            unfinished.mkdir()
            Path(scratch, f"{source.stem}.o").rename(unfinished / f"{source.stem}.o")
            for arch in archs:  # which nvcc names where there are several
                kept = f"{source.stem}.compute_{arch}.ptx" if len(archs) > 1 else f"{source.stem}.ptx"
                Path(scratch, kept).rename(unfinished / f"{source.stem}.compute_{arch}.ptx")
            unfinished.rename(folder)
    return folder / f"{source.stem}.o", {arch: folder / f"{source.stem}.compute_{arch}.ptx" for arch in archs}


def _binding(source: Path, common: Sequence[str]) -> Path:
    csrc = ROOT / "csrc"
    flags, ahead = _pybind()
    flags = [*flags, f"-include{ahead}", *(f"-I{csrc / folder}" for folder in ("include", "cuda", "bindings"))]
    path = CACHE / f"{source.stem}-{digest(source.read_text(), *common, flags)}.o"
    return made(path, [*flags, "-c", str(source), "-o", "{}"])


@cache
def _pybind() -> tuple[list[str], Path]:
    """The flags for bindings, and pybind11's headers compiled ahead: they are most of the work."""
    import pybind11

    flags = [*CXX[:-1], "-O0", "-w", "-fvisibility=hidden", "-DPYTRANSFORMER_CUDA_MODULE"]
    flags += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    folder = CACHE / f"pybind-{digest(pybind11.__version__, sys.version, flags)}"
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "pybind.h"
    header.write_text("#include <pybind11/pybind11.h>\n#include <pybind11/stl.h>\n")
    made(folder / "pybind.h.gch", [*flags, "-x", "c++-header", str(header), "-o", "{}"])
    return flags, header


def _bindings() -> list[Path]:
    """What setup.py compiles for the module ``_cuda``."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHARED_BINDINGS"
    ]
    shared = ast.literal_eval(names[0].value)
    folder = ROOT / "csrc" / "bindings"
    return [*sorted(folder.glob("*cuda.cpp")), *(folder / f"{op}.cpp" for op in shared)]


def _cuda_include() -> str:
    """The toolkit's headers: where nvcc itself looks for them."""
    lines = subprocess.run(["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="?-I([^"\s]+)', lines)
    if found is None:
        raise RuntimeError(f"nvcc does not tell its include folder:\n{lines}")
    return found[1]


def in_words_of_80(ptx: str) -> str:
    """PTX for a later architecture as the one for 8.0 would say it: what is equal then is translated once.

    Later ones have an instruction that widens bfloat16, where for 8.0 nvcc moves the bits. In all else the library's
    kernels are equal, which ``test_architectures.py`` holds.
    """
    return _WIDENING.sub(r"mov.b32 \1, {0,\2};", _TARGET.sub(".target sm_80", ptx))


_TARGET = re.compile(r"^\.target sm_\w+", re.M)
_WIDENING = re.compile(r"cvt\.f32\.bf16 (%f\d+), (%rs\d+);")
ENTRY = re.compile(r"^(?:\.\w+ )*\.entry ([\w$]+)\(.*?^}$", re.M | re.S)


def alone(ptx: str, name: str) -> str:
    """The PTX with the other kernels blanked, so that lines keep their numbers."""
    return ENTRY.sub(lambda found: found[0] if found[1] == name else "\n" * found[0].count("\n"), ptx)


def kernel(ptx: str, name: str) -> tuple[Path, dict[int, tuple[str, str]]]:
    """The shared library of one kernel, and what its lines are."""
    ptx = alone(ptx, name)
    translator = "".join(path.read_text() for path in sorted((HERE / "translate").glob("*.py")))
    stem = digest(ptx, name, headers(SMALL), headers(LARGE), translator)
    library, table = CACHE / f"{stem}.so", CACHE / f"{stem}.json"
    if not (library.exists() and table.exists()):
        translation = translate(parse(ptx), name)
        source = CACHE / f"{stem}.cpp"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(translation.code)
        table.write_text(json.dumps(translation.lines))
        flags = LARGE if translation.code.count("\n") > LARGE_FROM else SMALL
        made(library, [*CXX[:-1], *flags, f"-I{headers(flags)}", "-shared", str(source), "-o", "{}"])
    return library, {int(line): tuple(what) for line, what in json.loads(table.read_text()).items()}
