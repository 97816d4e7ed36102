"""What the kernels move: tensors once, in whole sectors, and tiles of shared memory without bank conflicts.

Counts know no caches. What many rows share (weights, biases, positions) comes from a cache on a GPU and is asked for
again by every row here, so the floor is over the tensors that stream: each input read once, each output written once.
"""

from __future__ import annotations

from collections import Counter

import pytest
import test_embedding as embedding_cases
import test_layer_norm as layer_norm_cases
import torch
from helpers import EMULATED, run

from ptx import build
from ptx.test_ops import ATTENTION, attention_tensors

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

SECTOR = 32
ROWS, E = 192, 512


@pytest.fixture
def uses():
    """A function that runs an op, forward and backward, and returns what its kernels moved."""
    from ptx import backend

    def of(op, tensors, options):
        with backend.installed("80", counts=True) as name:
            run(op, tensors, options, name)
            return list(backend.module().uses)

    return of


def moved(uses, kernel):
    """Bytes by tensor, of the kernels with this in their name."""
    found = Counter()
    for use in uses:
        if use.space == "global" and kernel in use.kernel:
            found[use.tensor] += use.moved * SECTOR
    return found


def assert_near_floor(found, streams, rows):
    """``streams``: bytes of an element of each tensor that must move once; ``rows``: of those with one value a row."""
    floor = sum(size * ROWS * E for size in streams.values()) + sum(size * ROWS for size in rows.values())
    total = sum(found[name] for name in streams | rows)
    assert floor <= total <= 1.05 * floor, (total / floor, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layer_norm(uses, dtype):
    tensors = layer_norm_cases.make((ROWS, E), dtype)
    size = dtype.itemsize
    found = uses("layer_norm", tensors, {"dropout_p": 0.1, "seed": 1, "prenorm": True})
    forward = dict.fromkeys(("input", "residual", "sum", "output"), size)
    assert_near_floor(moved(found, "layer_norm_fwd"), forward, {"mean": 4, "rstd": 4})
    backward = dict.fromkeys(("grad_output", "grad_sum", "sum", "grad_residual", "grad_input"), size)
    of_backward = moved(found, "layer_norm_bwd")
    assert_near_floor(of_backward, backward, {"mean": 4, "rstd": 4})
    blocks = 8  # of the runner's device; each leaves three rows of sums, which are read twice and written twice at most
    assert of_backward["workspace"] <= 4 * blocks * 3 * E * 4, of_backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_embedding(uses, dtype):
    tensors = embedding_cases.make((ROWS,), E, 50, dtype, positions=None, segments=False)
    tensors["tokens"] = torch.randperm(ROWS)
    tensors["weight"] = torch.randn(ROWS, E).to(dtype)  # every row of the table for one token
    size = dtype.itemsize
    found = uses("embedding", tensors, {"dropout_p": 0.1, "seed": 1})
    assert_near_floor(moved(found, "embedding_fwd"), {"weight": size, "output": size}, {})
    assert_near_floor(moved(found, "embedding_table_bwd"), {"grad_output": size, "grad": size}, {})


WIDTHS = ["32-window", "64-gqa", "96-mqa", "128-causal", "192-bias", "256-everything"]


@pytest.mark.parametrize("name", WIDTHS if EMULATED else WIDTHS[1::2])
def test_attention_reads_tiles_without_conflicts(uses, name):
    found = uses("attention", *attention_tensors(*ATTENTION[name]))
    tiles = [use for use in found if use.instruction.startswith("ldmatrix")]
    kernels = {kernel for use in tiles for kernel in ("fwd", "bwd_query", "bwd_key") if kernel in use.kernel}
    assert kernels == {"fwd", "bwd_query", "bwd_key"}
    worst = max(tiles, key=lambda use: use.moved / use.ideal)
    assert worst.moved == worst.ideal, worst
