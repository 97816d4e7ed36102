"""The compiled CUDA module: csrc/bindings/cuda.cpp."""

from typing import Any

def report_devices() -> dict[str, Any]: ...
