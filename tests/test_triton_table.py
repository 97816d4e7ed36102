"""The committed figures of the compiled Triton kernels: complete, within the chips' limits, and true of a part."""

from __future__ import annotations

import pytest
import triton_table

from pytransformer import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton") == "triton is not installed", reason="triton is not installed"
)
ROWS = [line for line in triton_table.TABLE.read_text().splitlines()[1:] if line]


def test_every_case_is_there():
    wanted = {(arch, name) for arch in triton_table.ARCHITECTURES for name, _ in triton_table.cases()}
    assert {(row[:7].strip(), row[8:42].strip()) for row in ROWS} == wanted


@pytest.mark.parametrize("arch", triton_table.ARCHITECTURES)
def test_nothing_spills_and_everything_fits(arch):
    from pytransformer.kernels._offline import SHARED_MEMORY

    for row in (row for row in ROWS if row.startswith(arch)):
        registers, stack, shared = map(int, row.split()[-3:])
        assert stack == 0, row
        assert registers <= (512 if arch.startswith("gfx") else 255), row
        assert shared <= SHARED_MEMORY[arch], row


RECOMPUTED = [
    ("sm90", "layer_norm 16 bits E=768", ""),
    ("sm80", "attention 16 bits D=64 plain", "forward"),
    ("sm100", "embedding 16 bits", "table"),
]


@pytest.mark.parametrize(("arch", "name", "kernels"), RECOMPUTED, ids=[f"{a}-{n}" for a, n, _ in RECOMPUTED])
def test_the_figures_are_those_of_this_code(monkeypatch, tmp_path, arch, name, kernels):
    import triton

    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"the table was made by triton 3.7, this is {triton.__version__}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = list(triton_table.rows(arch, name, dict(triton_table.cases())[name], kernels))
    assert found
    for row in found:
        assert row in ROWS, f"{row}\nis not in {triton_table.TABLE.name}: run `make triton-table` and review the change"
