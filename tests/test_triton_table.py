"""The committed figures of the compiled Triton kernels: within the chips' limits, and true of a part."""

from __future__ import annotations

import pytest
import triton_table

from pytransformer import backends

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton") == "triton is not installed", reason="triton is not installed"
)
ROWS = [line for line in triton_table.TABLE.read_text().splitlines()[1:] if line]


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(row[: triton_table.WIDTH].split()) for row in ROWS])
def test_nothing_spills_and_everything_fits(row):
    from pytransformer.kernels._offline import SHARED_MEMORY

    arch, registers, stack, shared = row.split()[0], *map(int, row.split()[-3:])
    assert stack == 0
    assert registers <= (512 if arch.startswith("gfx") else 255)
    assert shared <= SHARED_MEMORY[arch]
    roomy = "D=256 plain" in row or "varlen 16 bits D=256" in row  # the same configuration
    if arch == "sm80" and not roomy:  # whose column the GPUs with less memory read
        assert shared <= SHARED_MEMORY["sm86"]


@pytest.mark.parametrize("arch", triton_table.ARCHITECTURES)
def test_every_configuration_has_its_row(arch):
    """What the code would launch for ``arch`` is in the table, and nothing else is."""
    wanted = {row for name, _ in triton_table.cases() for row in triton_table.launched(arch, name)}
    found = {row[: triton_table.WIDTH].rstrip() for row in ROWS if row.startswith(f"{arch} ")}
    assert found == wanted


RECOMPUTED = [
    ("sm80", "embedding 16 bits", ""),
    ("sm90", "layer_norm 16 bits E=768", ""),
    ("sm90", "attention 16 bits D=64 plain", "forward"),
    ("sm100", "linear_cross_entropy 16 bits", "row"),
    ("gfx942", "ffn 16 bits gelu", "activation_kernel"),
]


@pytest.mark.parametrize(("arch", "name", "kernels"), RECOMPUTED, ids=[f"{a}-{n}" for a, n, _ in RECOMPUTED])
def test_the_figures_are_those_of_this_code(monkeypatch, tmp_path, arch, name, kernels):
    import triton

    if not triton.__version__.startswith("3.7."):
        pytest.skip(f"the table was made by triton 3.7, this is {triton.__version__}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = triton_table.rows(arch, name, kernels)
    assert found
    for row in found:
        assert row in ROWS, f"{row}\nis not in {triton_table.TABLE.name}: run `make triton-table` and review the change"
