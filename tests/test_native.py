"""The CPU kernels on AArch64, where `make neon` has cross-compiled them (minutes, so not from here)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BINARY = Path(__file__).parent.parent / "build" / "native" / "neon" / "cpu_kernels"


def test_neon_equals_scalar():
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user)")
    if not BINARY.exists():
        pytest.skip("tests/native is not built for AArch64: make neon")
    done = subprocess.run([emulator, BINARY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all cases ok" in done.stdout
