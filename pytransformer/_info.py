"""``pytransformer info``: what this machine has, and what of this library runs on it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pytransformer.backends import OPS, PACKAGES, has_op, unavailable
from pytransformer.backends import cpu as cpu_backend
from pytransformer.backends import cuda as cuda_backend

# The CPU features that a kernel's speed may hang on, as Linux spells them.
FEATURES = ("avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16",
            "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "bf16", "sve")  # fmt: skip


def print_info() -> None:
    """Prints every section, aligned."""
    sections = {
        "Versions": versions(),
        "CPU": cpu(),
        "GPU": gpus(),
        "Backends": {name: unavailable(name) or "available" for name in PACKAGES},
        "Kernels": {op: ", ".join(serving(op)) for op in OPS},
        "Triton's tiles": triton_tables(),
    }
    width = max(len(key) for lines in sections.values() for key in lines)
    for title, lines in sections.items():
        print(title)
        for key, value in lines.items():
            print(f"  {key.ljust(width)}  {value}")


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    return {
        "pytransformer": _installed("pytransformer"),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def cpu() -> dict[str, str]:
    """The processor, the instruction sets built and which of them it runs, and the threads."""
    found = {
        "model": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "features": " ".join(cpu_features()) or "unknown",
        "threads": f"{torch.get_num_threads()} (torch)",
    }
    if (reason := unavailable("cpu")) is not None:
        return {**found, "kernels": f"none: {reason}"}
    status = cpu_backend.isa_status()
    built = [name if runs else f"{name} (this CPU does not run it)" for name, runs in status.items()]
    return {**found, "kernels built for": ", ".join(built), "kernels in use": cpu_backend.isa()}


def cpu_model() -> str:
    """The processor's name."""
    fields = _cpuinfo()
    return fields.get("model name") or platform.processor() or platform.machine()


def cpu_megahertz() -> float | None:
    """The first processor's clock at this moment, where the system tells it."""
    text = _cpuinfo().get("cpu MHz")
    return None if text is None else float(text)


def cpu_features() -> list[str]:
    """Those of ``FEATURES`` that the processor reports."""
    fields = _cpuinfo()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return [name for name in FEATURES if name in flags]


def gpus() -> dict[str, str]:
    """Each GPU, or why none is seen."""
    if torch.cuda.is_available():
        found = {}
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            found[f"cuda:{index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
        return found
    why = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
    return {"none": f"{why}; the CUDA module: {cuda_backend.unavailable() or 'sees a device'}"}


def triton_tables() -> dict[str, str]:
    """By architecture of the GPUs here, where the configurations of the Triton kernels come from."""
    from pytransformer.kernels import _configs, _table

    if not torch.cuda.is_available():
        return {"table": "none read: torch sees no GPU"}
    archs = {_configs.architecture(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    found = {}
    for arch in sorted(archs):
        try:
            found[arch] = _table.in_use(arch)[1]
        except ValueError as error:
            found[arch] = f"cannot be read: {error}"
    return found


def serving(op: str) -> list[str]:
    """The backends that have kernels for ``op``, those that cannot run here in brackets."""
    with_kernels = [name for name in PACKAGES if has_op(name, op)]
    return [name if unavailable(name) is None else f"({name})" for name in with_kernels]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "importable, version unknown" if importlib.util.find_spec(package) else "not installed"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
