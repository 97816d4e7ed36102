"""Builds the compiled modules. No torch is needed at build time, only a C++17 compiler.

``pytransformer._cpu`` holds the SIMD kernels: each ``csrc/cpu/<op>.cpp`` is compiled once for every
instruction set, and the best one is chosen at run time. ``pytransformer._cuda`` is built where nvcc is
found. Ninja, where present, makes rebuilds incremental.

Environment:
    CXX                          the C++ compiler (default: g++, then clang++, then c++)
    PYTRANSFORMER_CUDA           auto (default): build the CUDA module if nvcc is found; 1: it must; 0: never
    PYTRANSFORMER_CUDA_ARCHS     compute capabilities, default "80;90a;90+PTX"
    CUDA_HOME                    where to look for nvcc before PATH
    PYTRANSFORMER_STRICT         1: a warning of nvcc ends the build
    PYTRANSFORMER_EMULATED_ISA   1: also build the instruction sets emulated for tests
    MAX_JOBS                     parallel compiler processes
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
FOR_ALL_SETS = ("dispatch.cpp", "large_memory.cpp")  # of csrc/cpu, compiled once
# GCC 12's own AVX-512 header trips its uninitialised-variable warnings.
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-DNDEBUG", *WARNINGS]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

# Instruction sets by machine, best last. Feature flags rather than -march names: compilers learn a
# processor's name years after its instructions.
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "scalar": [],
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"scalar": [], "neon": ["-DPYTRANSFORMER_NEON"]},
}
EMULATED_BF16 = [*AVX512, "-DPYTRANSFORMER_EMULATE_BF16"]
EMULATED_SETS = {
    "x86_64": {
        "avx512_bf16_emulated": EMULATED_BF16,
        "amx_bf16_emulated": [*EMULATED_BF16, "-DPYTRANSFORMER_EMULATE_AMX"],
    }
}

# Kernels of Hopper's own instructions are compiled for it alone, in files that say so.
HOPPER, HOPPER_FILES = "90a", "*_sm90.cu"

# Ops whose problem is the same on CPUs and GPUs: their bindings are compiled for both modules.
SHARED_BINDINGS = ("attention", "layer_norm")

NO_COMPILER = """
pytransformer needs a C++17 compiler with OpenMP to build its CPU kernels, and {problem}.
    Debian, Ubuntu:  apt-get install g++
    Fedora, RHEL:    dnf install gcc-c++
    Alpine:          apk add g++
    conda:           conda install -c conda-forge gxx
    macOS:           brew install gcc, then CXX=g++-15 pip install .
Set CXX to use a compiler of another name.
"""


def fail(message: str) -> None:
    """Ends the build with a message that stands alone, without a traceback above it."""
    print(message, file=sys.stderr)
    raise SystemExit(1)


def compiles(compiler: str, flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        command = [compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    found = [name for name in names if shutil.which(name)]
    if not found:
        fail(NO_COMPILER.format(problem=f"found none (looked for {', '.join(names)})"))
    for name in found:
        if compiles(name, ["-std=c++17", "-fopenmp"]):
            return name
    fail(NO_COMPILER.format(problem=f"{' and '.join(found)} did not compile a C++17 program with -fopenmp"))
    raise AssertionError


def instruction_sets(compiler: str) -> dict[str, list[str]]:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    sets = dict(INSTRUCTION_SETS.get(machine, {"scalar": []}))
    if os.environ.get("PYTRANSFORMER_EMULATED_ISA") == "1":
        sets.update(EMULATED_SETS.get(machine, {}))
    usable = {name: flags for name, flags in sets.items() if compiles(compiler, flags)}
    for name in sets.keys() - usable.keys():
        print(f"-- {compiler} does not know {name}: left out")
    return usable


def find_nvcc() -> str | None:
    wanted = os.environ.get("PYTRANSFORMER_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"PYTRANSFORMER_CUDA must be auto, 1 or 0; got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        fail("PYTRANSFORMER_CUDA=1, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def gencode(nvcc: str) -> dict[str, list[str]]:
    """The flags for each compute capability asked for."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listing))
    flags: dict[str, list[str]] = {}
    for arch in os.environ.get("PYTRANSFORMER_CUDA_ARCHS", "80;90a;90+PTX").split(";"):
        name = arch.removesuffix("+PTX")
        if name.rstrip("af") not in known:
            print(f"-- compute capability {name} is not known to {nvcc}: left out")
            continue
        code = f"compute_{name}" if arch.endswith("+PTX") else f"sm_{name}"
        flags[arch] = ["-gencode", f"arch=compute_{name},code={code}"]
    return flags


class Compilation:
    """Commands that turn sources into objects, run by ninja where there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[tuple[Path, Path, list[str]]] = []

    def add(self, source: Path, command: list[str], suffix: str = "") -> None:
        target = self.folder / f"{source.parent.name}_{source.name}{suffix}.o"
        self.commands.append((source, target, [*command, "-c", str(source), "-o", str(target)]))

    @property
    def objects(self) -> list[str]:
        return [str(target) for _, target, _ in self.commands]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 8))
        ninja = shutil.which("ninja")
        if ninja is None:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(run, [command for _, _, command in self.commands]))
            return
        lines = ["rule compile", "  command = $run -MD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
        lines.append("  description = compiling $out")
        for source, target, command in self.commands:
            escaped = shlex.join(command).replace("$", "$$")
            lines += [f"build {target}: compile {source}", f"  run = {escaped}"]
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")
        run([ninja, "-C", str(self.folder), f"-j{jobs}"])


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        fail(f"pytransformer: this command of the build failed:\n    {shlex.join(command)}")


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Not self.build_temp: that is a fresh temporary folder in an editable install.
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = self.build_cpu if ext.name.endswith("_cpu") else self.build_cuda
        build(Compilation(folder), str(target))

    def run(self) -> None:
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            print("-- nvcc not used: no CUDA module")
            self.extensions = [ext for ext in self.extensions if not ext.name.endswith("_cuda")]
        super().run()

    def build_cpu(self, compilation: Compilation, target: str) -> None:
        compiler = find_compiler()
        sets = instruction_sets(compiler)
        flags = [compiler, "-O3", *CXX_FLAGS, "-fopenmp", f"-I{CSRC}/include", f"-I{CSRC}/cpu"]
        kernels = sorted(path for path in (CSRC / "cpu").glob("*.cpp") if path.name not in FOR_ALL_SETS)
        # The base set comes first. An inline function of the standard library may be emitted by several
        # translation units; the linker keeps the first, which must run on every CPU.
        for name, isa_flags in sets.items():
            for source in kernels:
                compilation.add(source, [*flags, *isa_flags, f"-DPYTRANSFORMER_ISA={name}"], f".{name}")
        listing = "".join(f"X({name})" for name in sets)
        for name in FOR_ALL_SETS:
            compilation.add(CSRC / "cpu" / name, [*flags, f"-DPYTRANSFORMER_ISAS={listing}"])
        bindings = [*flags, f"-I{CSRC}/bindings", *python_includes(compilation.folder)]
        for source in sorted((CSRC / "bindings").glob("*.cpp")):
            if not source.stem.endswith("cuda"):
                compilation.add(source, bindings)
        compilation.run()
        run([compiler, "-shared", "-o", target, *compilation.objects, "-fopenmp", "-Wl,--exclude-libs,ALL"])

    def build_cuda(self, compilation: Compilation, target: str) -> None:
        nvcc = self.nvcc
        host = ",".join(["-fPIC", "-fvisibility=hidden"])
        flags = [nvcc, "-O3", "-std=c++17", "-DNDEBUG", "-Xcompiler", host, "-lineinfo", f"-I{CSRC}/include"]
        flags += [f"-I{CSRC}/cuda"]
        if os.environ.get("PYTRANSFORMER_STRICT") == "1":
            flags += ["-Werror", "all-warnings"]
        architectures = gencode(nvcc)
        if HOPPER in architectures:
            flags.append("-DPYTRANSFORMER_HOPPER")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            if not source.match(HOPPER_FILES):
                compilation.add(source, [*flags, *(flag for each in architectures.values() for flag in each)])
            elif HOPPER in architectures:
                compilation.add(source, [*flags, *architectures[HOPPER]])
        bindings = [find_compiler(), "-O2", *CXX_FLAGS, "-DPYTRANSFORMER_CUDA_MODULE", f"-I{CSRC}/include"]
        bindings += [f"-I{CSRC}/cuda", f"-I{CSRC}/bindings", *python_includes(compilation.folder)]
        own = sorted((CSRC / "bindings").glob("*cuda.cpp"))
        for source in [*own, *(CSRC / "bindings" / f"{op}.cpp" for op in SHARED_BINDINGS)]:
            compilation.add(source, bindings)
        compilation.run()
        # nvcc links: it knows where its libraries are, which the path it was found at need not tell.
        run([nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-o", target,
             *compilation.objects])  # fmt: skip


def python_includes(folder: Path) -> list[str]:
    """Include flags for pybind11 and Python that stay the same from one isolated build to the next."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "pybind11_include"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include())
    return [f"-isystem{link}", f"-isystem{sysconfig.get_path('include')}"]


setup(
    ext_modules=[Extension("pytransformer._cpu", []), Extension("pytransformer._cuda", [])],
    cmdclass={"build_ext": BuildKernels},
)
