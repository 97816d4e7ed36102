"""The committed figures of the compiled CUDA kernels: within the chips' limits, and true of the module at hand."""

from __future__ import annotations

import cuda_table
import pytest

MADE_BY, _, *ROWS = cuda_table.TABLE.read_text().splitlines()
reason = cuda_table.missing()
needs_module = pytest.mark.skipif(reason is not None, reason=str(reason))

# What the fast members of each family of kernels must do.
EXPECTED = {
    "attention_fwd_kernel<bf16, 128, false>": ("HMMA", "LDSM", "LDGSTS"),
    "attention_bwd_query_kernel<bf16, 128>": ("HMMA", "LDSM", "LDGSTS"),
    "attention_bwd_key_kernel<bf16, 128>": ("HMMA", "LDSM", "LDGSTS"),
    "layer_norm_fwd_kernel<bf16, 8, 4>": ("LDG.E.128", "STG.E.128"),
    "layer_norm_bwd_kernel<bf16, 8, 4, 256>": ("LDG.E.128", "STG.E.128"),
    "ffn_activation_fwd_kernel<bf16, 8>": ("LDG.E.128", "STG.E.128"),
    "ffn_activation_bwd_kernel<bf16, 8>": ("LDG.E.128", "STG.E.128"),
    "embedding_fwd_kernel<bf16, 8>": ("LDG.E.128", "STG.E.128"),
    "embedding_table_bwd_kernel<bf16, bf16, 8>": ("LDG.E.128", "STG.E.128"),
    "cross_entropy_rows_kernel<bf16>": ("LDG.E.128", "STG.E.128", "MUFU.EX2"),
}


# Bytes of shared memory that one block may have.
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_90a": 227 * 1024}


def test_nothing_spills_and_everything_fits():
    assert ROWS
    for row in ROWS:
        registers, stack, static, dynamic = map(int, row.split()[-4:])
        assert stack == 0, row
        assert registers <= 255, row
        assert static <= 48 * 1024, row
        assert static + dynamic <= MOST_SHARED[row.split()[0]], row


@needs_module
def test_the_figures_are_those_of_this_code():
    if cuda_table.compiler() != MADE_BY:
        pytest.skip(f"the table was made by {MADE_BY}, this is {cuda_table.compiler()}")
    found = list(cuda_table.rows())
    built = {row.split()[0] for row in found}
    wanted = [row.rsplit(maxsplit=1)[0] for row in ROWS if row.split()[0] in built]
    assert wanted, f"the module was built for {sorted(built)} alone"
    changed = sorted(set(wanted) ^ set(found))
    assert not changed, "run `make cuda-table` and review the change:\n" + "\n".join(changed)


# Those that Hopper alone has.
EXPECTED_OF_HOPPER = {
    "attention_fwd_sm90_kernel<bf16, 128>": ("HGMMA", "LDGSTS", "UTMALDG", "USETMAXREG", "SYNCS.PHASECHK"),
}


@needs_module
@pytest.mark.parametrize(
    ("arch", "kernel"),
    [*((arch, kernel) for arch in ("sm_80", "sm_90a") for kernel in EXPECTED), ("sm_90a", *EXPECTED_OF_HOPPER)],
)
def test_the_instructions_meant_are_there(kernel, arch):
    expected = EXPECTED if arch == "sm_80" else EXPECTED | EXPECTED_OF_HOPPER
    found = cuda_table.instructions(arch, tuple(expected))
    assert kernel in found, f"no kernel {kernel} for {arch}; there are:\n" + "\n".join(found)
    for wanted in expected[kernel]:
        held = sorted(found[kernel])
        assert any(i == wanted or i.startswith(f"{wanted}.") for i in held), f"{kernel}: no {wanted} in {held}"
