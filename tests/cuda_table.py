"""What the compiled CUDA kernels take, read from the module as it was built: ``make cuda-table``.

A row names an architecture, a kernel with its template arguments, and what the compiler made of it: registers of a
thread, bytes of stack (a spill; must be 0) and of static shared memory. The last column is the most dynamic shared
memory that a launch asks for: that is up to the host's code, which is made to launch over the stand-in for the CUDA
runtime (``ptx/shared_memory.py``). The table is committed, so that a change of a kernel shows in review;
``test_cuda_table.py`` compares it with the module at hand, ``ptx/test_shared_memory.py`` the last column.

cuobjdump and nvdisasm come with the CUDA toolkit, and in triton's wheel; c++filt with binutils.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent.parent / "docs" / "cuda-kernels.txt"
ROW = "{:6} {:66} {:>4} {:>5} {:>6}"
HEADER = ROW.format("arch", "kernel", "regs", "stack", "static") + " dynamic"
ARCH_AND_FIGURES = r"^sm_\w+ +| +\d+ +\d+ +\d+$"
SHORT = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}


def compiler() -> str:
    """The line of the table that says which compiler made it."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", text)
    assert found is not None, text
    return f"nvcc {found[1]}"


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, or of triton's copy; None where there is neither."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which(name) or (shutil.which(name, path=str(folder)) if folder else None)


def module() -> Path | None:
    """The compiled module, or None where it is not built."""
    found = importlib.util.find_spec("pytransformer._cuda")
    return Path(found.origin) if found and found.origin else None


def missing() -> str | None:
    """Why the table cannot be made here, or None."""
    for name in ("nvcc", "c++filt"):
        if shutil.which(name) is None:
            return f"{name} is not on PATH"
    if tool("cuobjdump") is None:
        return "there is no cuobjdump: neither a CUDA toolkit nor triton's wheel has it here"
    return "the CUDA module is not built" if module() is None else None


def rows() -> Iterator[str]:
    """A row for each kernel and architecture, sorted."""
    names = readable({kernel for _, kernel, *_ in _usage()})
    yield from sorted(ROW.format(arch, names[kernel], *figures) for arch, kernel, *figures in _usage())


@cache
def instructions(arch: str, kernels: tuple[str, ...]) -> dict[str, set[str]]:
    """The instructions that occur in each of ``kernels``, by its readable name; of those that the module has."""
    names = readable({kernel for _, kernel, *_ in _usage()})
    asked = [mangled for mangled, name in names.items() if name in kernels]
    found: dict[str, set[str]] = {}
    for line in dump("-sass", "-arch", arch, "-fun", ",".join(asked)).splitlines():
        if match := re.search(r"^\s*Function : (\S+)", line):
            inside = found.setdefault(names[match[1]], set())
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            inside.add(match[1])
    return found


def names_of(arch: str) -> dict[str, str]:
    """Readable names of the kernels, by the mangled ones."""
    return readable({kernel for found, kernel, *_ in _usage() if found == arch})


@cache
def _usage() -> set[tuple[str, str, int, int, int]]:
    """Of each kernel: architecture, mangled name, registers, bytes of stack and of static shared memory."""
    found = set()
    arch = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"^\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.search(r"^\s*Function (\S+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.add((arch, kernel, registers, stack + local, shared))
    return found


def readable(mangled: set[str]) -> dict[str, str]:
    """Names without namespaces and arguments: ``layer_norm_fwd_kernel<bf16, 8>``."""
    order = sorted(mangled)
    text = subprocess.run(["c++filt"], input="\n".join(order), capture_output=True, text=True, check=True).stdout
    return dict(zip(order, map(_short, text.splitlines()), strict=True))


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\((int|bool|unsigned int)\)", "", re.sub(r"\w+::", "", name))
    depth = 0
    for end, character in enumerate(name):  # the first bracket outside <...> starts the arguments
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:end]
            break
    for long, short in SHORT.items():
        name = re.sub(rf"\b{long}\b", short, name)
    return name


def dump(*options: str) -> str:
    """What cuobjdump says of the module."""
    program, path = tool("cuobjdump"), module()
    assert program is not None
    assert path is not None
    done = subprocess.run([program, *options, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    if (reason := missing()) is not None:
        raise SystemExit(f"no table: {reason}")
    sys.path.insert(0, str(Path(__file__).parent))
    from ptx import build, shared_memory

    if (reason := build.unavailable()) is not None:
        raise SystemExit(f"no table: {reason}")
    asked = shared_memory.largest()
    lines = [f"{row} {asked[re.sub(ARCH_AND_FIGURES, '', row)]:>7}" for row in rows()]
    TABLE.write_text("\n".join([compiler(), HEADER, *lines]) + "\n")
