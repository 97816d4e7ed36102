"""The committed figures of the compiled Triton kernels: within the chips' limits, and true of a part."""

from __future__ import annotations

import pytest
import triton_table

from pytransformer import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton") == "triton is not installed", reason="triton is not installed"
)
ROWS = [line for line in triton_table.TABLE.read_text().splitlines()[1:] if line]


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(row[:69].split()) for row in ROWS])
def test_nothing_spills_and_everything_fits(row):
    from pytransformer.kernels._offline import SHARED_MEMORY

    arch, registers, stack, shared = row.split()[0], *map(int, row.split()[-3:])
    assert stack == 0
    assert registers <= (512 if arch.startswith("gfx") else 255)
    assert shared <= SHARED_MEMORY[arch]


RECOMPUTED = [("sm90", "layer_norm 16 bits E=768", ""), ("sm90", "attention 16 bits D=64 plain", "forward")]


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
