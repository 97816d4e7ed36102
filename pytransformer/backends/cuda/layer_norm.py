"""layer_norm by ``csrc/cuda/layer_norm.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._arguments import contiguous, rows
from pytransformer.backends.cuda._arguments import call


def layer_norm_fwd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    store_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    total = torch.empty(input.shape if store_sum else (0,), dtype=input.dtype, device=input.device)
    count = input.numel() // input.shape[-1]
    mean, rstd = (torch.empty(count, dtype=torch.float32, device=input.device) for _ in range(2))
    _cuda.layer_norm_fwd(
        rows(input),
        contiguous(weight),
        contiguous(bias),
        rows(residual),
        contiguous(input_bias),
        dropout_p,
        eps,
        rms,
        rows(output),
        rows(total) if store_sum else None,
        mean,
        rstd,
        call(input, rng),
    )
    return output, total, mean, rstd
