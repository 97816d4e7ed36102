"""CUDA C++ kernels, compiled ahead of time."""

from __future__ import annotations

from typing import Any

try:
    import pytransformer._cuda as _cuda
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None


def report() -> dict[str, Any] | None:
    """Devices and versions as the CUDA runtime sees them; None where the module is not built."""
    return None if _import_error is not None else _cuda.report_devices()


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here, or None."""
    found = report()
    if found is None:
        return f"its module is not built ({_import_error})"
    return found["error"] or None
