"""layer_norm by ``csrc/cpu/layer_norm.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, unsupported_dtype
from pytransformer.backends.cpu._memory import empty


def why_not(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    *rest: object,
) -> str | None:
    if (reason := unsupported_dtype(input)) is not None:
        return reason
    if residual is not None and residual.dtype != input.dtype:
        return f"residual must have the input's dtype {input.dtype}, not {residual.dtype}"
    for name, vector in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if vector is not None and vector.dtype not in (input.dtype, torch.float32):
            return f"{name} must be float32 or {input.dtype}, not {vector.dtype}"
    return None


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
    count = input.numel() // input.shape[-1]
    mean, rstd = empty((count,)), empty((count,))
    args = (input, weight, bias, residual, input_bias, rng, dropout_p, eps, rms, store_sum)
    output, total = _forward(mean, rstd, *args)
    return output, input.new_empty(0) if total is None else total, mean, rstd


def layer_norm_inference(*args: Any) -> tuple[Tensor, Tensor | None, None, None]:
    return *_forward(None, None, *args), None, None


def _forward(
    mean: Tensor | None,
    rstd: Tensor | None,
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
) -> tuple[Tensor, Tensor | None]:
    output = empty(input.shape, input.dtype)
    total = empty(input.shape, input.dtype) if store_sum else None
    _cpu.layer_norm_fwd(
        contiguous(input),
        contiguous(weight),
        contiguous(bias),
        contiguous(residual),
        contiguous(input_bias),
        dropout_p,
        eps,
        rms,
        output,
        total,
        mean,
        rstd,
        rng,
    )
    return output, total


def layer_norm_bwd(
    grad_output: Tensor | None,
    grad_sum: Tensor | None,
    stream: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def vector(needed: bool) -> Tensor:
        return empty(stream.shape[-1:] if needed else (0,))

    grad_stream = empty(stream.shape, stream.dtype)
    grad_input = empty(stream.shape if dropout_p > 0 else (0,), stream.dtype)
    columns = (vector(needs[0]), vector(needs[1]), vector(needs[2]))
    weight_sums, bias_sums, input_bias_sums = (x if needed else None for x, needed in zip(columns, needs, strict=True))
    _cpu.layer_norm_bwd(
        contiguous(torch.zeros_like(stream) if grad_output is None else grad_output),
        contiguous(grad_sum),
        contiguous(stream),
        contiguous(weight),
        mean,
        rstd,
        dropout_p,
        rms,
        grad_stream,
        grad_input if dropout_p > 0 else None,
        weight_sums,
        bias_sums,
        input_bias_sums,
        rng,
    )
    return grad_stream, grad_input, *columns
