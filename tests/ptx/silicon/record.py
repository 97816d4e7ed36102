"""Runs the kernels of vectors.cu on a GPU and writes down what came out: one file of JSON.

python3 tests/ptx/silicon/record.py tests/recorded/silicon-h100.json

Needs nvcc, the driver and a GPU of compute capability 9.0; of Python the standard library. Where there is no nvcc,
``--image`` takes what ``nvcc -std=c++17 -O3 -arch=sm_90a -cubin vectors.cu`` made elsewhere.

An error of a kernel spoils its process's context, so kernels run in a worker, and another worker goes on behind one
that failed.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ptx.silicon import vectors

ARCH = "sm_90a"
PATIENCE = 60  # seconds for a worker


class Driver:
    """The few functions of the driver's API that a launch needs; an error is an exception with its name."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", ctypes.c_uint(0))
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise RuntimeError(f"{name}: {code} {(text.value or b'').decode()}")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self.device)
        return value.value

    def describe(self) -> dict[str, str]:
        name, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self.call("cuDeviceGetName", name, ctypes.c_int(len(name)), self.device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        capability = f"{self.attribute(75)}.{self.attribute(76)}"  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        return {
            "device": name.value.decode(),
            "compute_capability": capability,
            "driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }

    def load(self, image: bytes) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return module

    def allocate(self, size: int) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def map(self, given: vectors.Map, pointer: ctypes.c_uint64, threads: int, slots: int) -> ctypes.Array[Any]:
        """A tensor map, which must begin at a multiple of 64 bytes."""
        memory = ctypes.create_string_buffer(128 + 64)
        to = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
        size, stride = (ctypes.c_uint64 * 2)(given.columns, slots), (ctypes.c_uint64 * 1)(4 * threads)
        box, step = (ctypes.c_uint32 * 2)(*reversed(given.box)), (ctypes.c_uint32 * 2)(1, 1)
        swizzle = {0: 0, 32: 1, 64: 2, 128: 3}[given.swizzle]  # CU_TENSOR_MAP_SWIZZLE_*
        words, rank = ctypes.c_int(1), ctypes.c_uint(2)  # CU_TENSOR_MAP_DATA_TYPE_UINT16
        modes = [ctypes.c_int(n) for n in (0, swizzle, 0, 0)]  # not interleaved, L2 as it is, zeros beyond the matrix
        self.call("cuTensorMapEncodeTiled", to, words, rank, pointer, size, stride, box, step, *modes)
        return to

    def launch(self, module: ctypes.c_void_p, name: str, kernel: vectors.Vectors) -> array[int]:
        """The words that the kernel gives."""
        function, given = ctypes.c_void_p(), kernel.words
        grid, result = kernel.threads // kernel.block, array("I", bytes(4 * kernel.outputs * kernel.threads))
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        sizes = [len(words) * words.itemsize for words in (given, result)]
        pointers = [self.allocate(size) for size in sizes]
        hosts = [ctypes.c_void_p(words.buffer_info()[0]) for words in (given, result)]
        for pointer, host, size in zip(pointers, hosts, sizes, strict=True):
            self.call("cuMemcpyHtoD_v2", pointer, host, ctypes.c_size_t(size))
        maps = [self.map(each, pointers[0], kernel.threads, len(given) // kernel.threads) for each in kernel.maps]
        values = [*pointers, *maps]
        arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        shape = [ctypes.c_uint(n) for n in (grid, 1, 1, kernel.block, 1, 1, 0)]
        self.call("cuLaunchKernel", function, *shape, ctypes.c_void_p(), arguments, ctypes.c_void_p())
        self.call("cuCtxSynchronize")
        self.call("cuMemcpyDtoH_v2", hosts[1], pointers[1], ctypes.c_size_t(sizes[1]))
        for pointer in pointers:
            self.call("cuMemFree_v2", pointer)
        return result


def recorded(name: str, kernel: vectors.Vectors, result: array[int]) -> dict[str, Any]:
    return {
        "inputs": vectors.digest(kernel.words),
        "threads": kernel.threads,
        "instructions": {str(slot): text for slot, text in vectors.instructions(name).items()},
        "outputs": base64.b85encode(lzma.compress(result.tobytes(), preset=9)).decode(),
    }


def work(image: Path, names: Sequence[str], driver: Driver) -> None:
    """A worker: prints a line of JSON for the device, and one for each kernel that has run."""
    print(json.dumps({"environment": driver.describe()}), flush=True)
    module = driver.load(image.read_bytes())
    for name in names:
        first, second = (driver.launch(module, name, vectors.KERNELS[name]) for _ in range(2))
        if first != second:
            raise RuntimeError(f"{name} gives other words the second time")
        print(json.dumps({"kernel": name, **recorded(name, vectors.KERNELS[name], first)}), flush=True)


def record(image: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The environment, each kernel's record, and why others have none."""
    environment: dict[str, Any] = {}
    kernels: dict[str, Any] = {}
    failed: dict[str, str] = {}
    while missing := [name for name in vectors.KERNELS if name not in kernels and name not in failed]:
        command = [sys.executable, __file__, "--worker", str(image), *missing]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            lines, error = done.stdout, done.stderr
        except subprocess.TimeoutExpired as expired:
            lines, error = (expired.stdout or b"").decode(), f"no end within {PATIENCE} s"
        for line in filter(None, lines.splitlines()):
            row = json.loads(line)
            environment.update(row.get("environment", {}))
            if "kernel" in row:
                kernels[row.pop("kernel")] = row
        behind = [name for name in missing if name not in kernels]
        if behind:
            failed[behind[0]] = error.strip()
            print(f"{behind[0]} failed: {error.strip()}", file=sys.stderr)
        if not environment:
            raise SystemExit("no GPU to record on")
    return environment, kernels, failed


def nvcc() -> str:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = shutil.which("nvcc") or next((path for home in homes if (path := shutil.which(f"{home}/bin/nvcc"))), None)
    if found is None:
        raise SystemExit("nvcc is not on PATH, nor below CUDA_HOME or /usr/local/cuda")
    return found


def compiled(folder: Path) -> tuple[Path, str]:
    """The kernels as machine code, and which compiler made it."""
    image, compiler = folder / "vectors.cubin", nvcc()
    command = [compiler, "-std=c++17", "-O3", f"-arch={ARCH}", "-cubin", str(vectors.SOURCE), "-o", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return image, next((line for line in version.splitlines() if "release" in line), version.strip())


def kernel_driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help="a cubin of vectors.cu, where there is no nvcc")
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.output, given.names, Driver())
    with tempfile.TemporaryDirectory() as folder:
        image, compiler = (given.image, "") if given.image else compiled(Path(folder))
        environment, kernels, failed = record(image)
    environment.update(nvcc=compiler, driver=kernel_driver())
    text = json.dumps({"environment": environment, "failed": failed, "kernels": kernels}, indent=1)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(text + "\n")
    print(f"{given.output}: {len(kernels)} kernels, {len(text) >> 10} KiB, {len(failed)} failed; {environment}")
    return None


if __name__ == "__main__":
    main()
