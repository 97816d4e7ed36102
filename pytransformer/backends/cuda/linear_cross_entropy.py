"""linear_cross_entropy by torch's matrix products and ``csrc/cuda/linear_cross_entropy.cu``, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._loss_by_chunks import LossByChunks, Options, empty_weight
from pytransformer.backends.cuda._arguments import call, unsupported


def why_not(input: Tensor, linear_weight: Tensor, *rest: object) -> str | None:
    return unsupported(input) or empty_weight(linear_weight)


def _rows(
    logits: Tensor, target: Tensor, options: Options, row_scale: Tensor | None, loss: Tensor, lse: Tensor
) -> None:
    _cuda.cross_entropy_rows(logits, target, *options, row_scale, loss, lse, call(logits))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, float32 of operands in 16 bits or float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


_by_chunks = LossByChunks(_rows, _add_product)
linear_cross_entropy_fwd = _by_chunks.fwd
linear_cross_entropy_bwd = _by_chunks.bwd
