"""SIMD C++ kernels, compiled for several instruction sets and chosen at run time."""

from __future__ import annotations

try:
    import pytransformer._cpu as _cpu
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None


def unavailable() -> str | None:
    """Why the CPU kernels cannot run here, or None."""
    if _import_error is not None:
        return f"its module is not built ({_import_error})"
    return None


def isa() -> str:
    """The instruction set in use: scalar, neon, avx2, avx512, avx512_bf16 or amx_bf16."""
    return _cpu.isa()


def set_isa(name: str) -> None:
    """Uses the named instruction set from now on.

    Raises:
        ValueError: it was not built, or this CPU does not run it.
    """
    _cpu.set_isa(name)


def isa_status() -> dict[str, bool]:
    """Every instruction set that was built, best last: does this CPU run it?"""
    return _cpu.isa_status()


def empty_cache() -> int:
    """Gives the system the memory of earlier results that is kept for the next ones; returns its bytes.

    On Linux results of 2 MB and more lie in memory that earlier ones have left, up to a quarter of the machine's: fresh
    pages take longer to come by than many a result to compute. The system may have what is kept whenever it runs
    short, though until then it counts it as the process's own. ``torch.cuda.empty_cache``, for memory of the host.
    """
    return _cpu.release_large()


def peak_rate(paired: bool, seconds: float) -> float:
    """Operations a second that all threads sustain in a loop of nothing else, measured for ``seconds``.

    ``paired``: products of bfloat16 by AMX or by pairs, 0 where the set has neither; else float32 multiply-adds.
    """
    return _cpu.peak_rate(paired, seconds)
