"""linear_cross_entropy by torch's matrix products and ``kernels/linear_cross_entropy.py``, some rows at a time."""

from __future__ import annotations

from torch import Tensor

from pytransformer.backends._arguments import unsupported_dtype
from pytransformer.backends._loss_by_chunks import LossByChunks, empty_weight
from pytransformer.kernels._matmul import accumulate
from pytransformer.kernels.linear_cross_entropy import cross_entropy_rows


def why_not(input: Tensor, linear_weight: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(input) or empty_weight(linear_weight)


_by_chunks = LossByChunks(cross_entropy_rows, accumulate)
linear_cross_entropy_fwd = _by_chunks.fwd
linear_cross_entropy_bwd = _by_chunks.bwd
