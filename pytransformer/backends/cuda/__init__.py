"""CUDA C++ kernels, compiled ahead of time."""

from __future__ import annotations

from typing import Any

try:
    import pytransformer._cuda as _cuda
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

OLDEST = (8, 0)  # compute capability: Ampere


def report() -> dict[str, Any] | None:
    """Devices and versions as the CUDA runtime sees them; None where the module is not built."""
    return None if _import_error is not None else _cuda.report_devices()


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here, or None."""
    found = report()
    if found is None:
        return _not_built(_import_error)
    if found["devices"]:
        capabilities = [device["capability"] for device in found["devices"]]
        return None if max(capabilities) >= OLDEST else too_old(max(capabilities))
    if found["driver_version"] == 0:
        return "no NVIDIA driver is installed"
    if found["driver_version"] < found["runtime_version"]:
        driver, runtime = (_version(found[name]) for name in ("driver_version", "runtime_version"))
        return f"the NVIDIA driver supports CUDA {driver}, and the kernels were built with CUDA {runtime}"
    return found["error"] or "no CUDA device"


def too_old(capability: tuple[int, int]) -> str:
    """The reason against a device of ``capability``."""
    return (
        f"its kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, and the GPU has {capability[0]}.{capability[1]}"
    )


def _not_built(error: ImportError | None) -> str:
    if error is None or isinstance(error, ModuleNotFoundError):
        return "its module is not built: there was no nvcc when pytransformer was installed, or PYTRANSFORMER_CUDA=0"
    return f"its module cannot be loaded ({error})"


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
