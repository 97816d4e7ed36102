"""layer_norm by ``kernels/layer_norm.py``."""

from __future__ import annotations

from torch import Tensor

from pytransformer.backends._arguments import DTYPES, contiguous, rows, unsupported_dtype
from pytransformer.kernels import layer_norm as kernels


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
        if vector is not None and vector.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16, not {vector.dtype}"
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
    output, total, mean, rstd = kernels.layer_norm_fwd(
        rows(input),
        contiguous(weight),
        contiguous(bias),
        rows(residual),
        contiguous(input_bias),
        rng,
        dropout_p,
        eps,
        rms,
        store_sum,
    )
    total = input.new_empty(0) if total is None else total.view(input.shape)
    return output.view(input.shape), total, mean, rstd


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
    grad_stream, grad_input, columns = kernels.layer_norm_bwd(
        rows(grad_output), rows(grad_sum), rows(stream), contiguous(weight), mean, rstd, rng, dropout_p, rms
    )
    grad_input = stream.new_empty(0) if grad_input is None else grad_input.view(stream.shape)
    vectors = (
        column.clone() if needed else columns.new_empty(0) for column, needed in zip(columns, needs, strict=True)
    )
    return grad_stream.view(stream.shape), grad_input, *vectors
