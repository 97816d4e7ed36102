"""layer_norm by ``csrc/cuda/layer_norm.cu`` and ``layer_norm_bwd.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends.cuda._arguments import COUNTERS, aligned, call, multiprocessors, outpaced, rows, unsupported

LARGE = 2**24  # elements: from there on Triton's kernels take less time on an H200, host and all
_BLOCKS = 2  # of the backward on a multiprocessor, at most
_MOST = 16384  # elements of a row that the kernels hold; half as many where rows do not start at 16 bytes


def why_not(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    *rest: object,
) -> str | None:
    if (reason := unsupported(input)) is not None:
        return reason
    if residual is not None and residual.dtype != input.dtype:
        return f"residual must have the input's dtype {input.dtype}, not {residual.dtype}"
    for name, vector in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if vector is not None and vector.dtype not in (input.dtype, torch.float32):
            return f"{name} must be float32 or {input.dtype}, not {vector.dtype}"
    columns = input.shape[-1]
    most = _MOST if columns * input.element_size() % 16 == 0 else _MOST // 2
    return None if columns <= most else f"it takes rows of at most {most} elements, not {columns}"


def yields_to(input: Tensor, *rest: object) -> tuple[str, str] | None:
    return outpaced(input, input.numel(), LARGE)


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
    mean, rstd = (input.new_empty(count, dtype=torch.float32) for _ in range(2))
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
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    total = torch.empty_like(output) if store_sum else None
    _cuda.layer_norm_fwd(
        rows(input),
        aligned(weight),
        aligned(bias),
        rows(residual),
        aligned(input_bias),
        dropout_p,
        eps,
        rms,
        rows(output),
        rows(total),
        mean,
        rstd,
        call(input, rng),
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
    columns = stream.shape[-1]

    def vector(needed: bool) -> Tensor:
        return stream.new_empty(columns if needed else 0, dtype=torch.float32)

    grad_stream = torch.empty_like(stream, memory_format=torch.contiguous_format)
    grad_input = torch.empty_like(grad_stream) if dropout_p > 0 else stream.new_empty(0)
    sums = (vector(needs[0]), vector(needs[1]), vector(needs[2]))
    weight_sums, bias_sums, input_bias_sums = (x if needed else None for x, needed in zip(sums, needs, strict=True))
    blocks = multiprocessors(stream.device.index or 0) * _BLOCKS
    partial = stream.new_empty(blocks, 3, columns, dtype=torch.float32)
    _cuda.layer_norm_bwd(
        rows(torch.zeros_like(stream) if grad_output is None else grad_output),
        rows(grad_sum),
        rows(stream),
        aligned(weight),
        mean,
        rstd,
        dropout_p,
        rms,
        rows(grad_stream),
        rows(grad_input) if dropout_p > 0 else None,
        weight_sums,
        bias_sums,
        input_bias_sums,
        call(stream, rng, partial, COUNTERS),
    )
    return grad_stream, grad_input, *sums
