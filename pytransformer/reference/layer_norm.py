"""LayerNorm and RMSNorm with bias, dropout and residual, in plain PyTorch: the definition of the op.

    sum = residual + dropout(input + input_bias)
    output = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias          (LayerNorm)
    output = sum / sqrt(mean(sum^2) + eps) * weight                            (RMSNorm)

Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016, eq. 4; Zhang, Sennrich, "Root Mean Square Layer
Normalization", 2019, eq. 4; the residual form: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.1
and 5.4. Statistics are float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp
from pytransformer.reference._philox import dropout_multiplier


def add_residual(
    input: Tensor, residual: Tensor | None, input_bias: Tensor | None, rng: Tensor | None, dropout_p: float
) -> Tensor:
    """``residual + dropout(input + input_bias)``, rounded once to the input's dtype."""
    if residual is None and input_bias is None and dropout_p == 0:
        return input
    total = input.to(_wide(input.dtype))
    if input_bias is not None:
        total = total + input_bias
    if dropout_p > 0:
        assert rng is not None
        total = total * dropout_multiplier(input.shape, rng, dropout_p, total.dtype)
    if residual is not None:
        total = total + residual
    return total.to(input.dtype)


def normalize(
    stream: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(output, mean, rstd)`` of the rows of ``stream``; mean is 0 for RMSNorm."""
    wide = stream.to(_wide(stream.dtype))
    mean = torch.zeros_like(wide[..., :1]) if rms else wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    output = centred * rstd
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return output.to(stream.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """``(output, sum)``, differentiable."""
    total = add_residual(input, residual, input_bias, rng, dropout_p)
    return normalize(total, weight, bias, eps, rms)[0], total


def why_not(*args: object) -> str | None:
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
    total = add_residual(input, residual, input_bias, rng, dropout_p)
    output, mean, rstd = normalize(total, weight, bias, eps, rms)
    return output, total if store_sum else input.new_empty(0), mean.flatten(), rstd.flatten()


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
    """Gradients of ``(sum, input, weight, bias, input_bias)``; input's is empty where it equals sum's."""
    needs_weight, needs_bias, needs_input_bias = needs
    rows = tuple(range(stream.dim() - 1))
    grad_stream = grad_sum
    grad_weight = grad_bias = grad_input_bias = grad_input = None
    if grad_output is not None:

        def forward(z: Tensor, w: Tensor | None) -> tuple[Tensor]:
            return (normalize(z, w, None, eps, rms)[0],)

        from_output, grad_weight = vjp(forward, (stream, weight), (grad_output,))
        assert from_output is not None
        grad_stream = from_output if grad_stream is None else grad_stream + from_output
        if needs_bias:
            grad_bias = grad_output.sum(rows)
    else:  # weight and bias do not reach the sum: their gradients are zeros, not absent
        columns = stream.new_zeros(stream.shape[-1], dtype=_wide(stream.dtype))
        grad_weight, grad_bias = columns, columns.clone() if needs_bias else None
    if grad_stream is None:
        grad_stream = torch.zeros_like(stream)
    if dropout_p > 0:
        assert rng is not None
        grad_input = grad_stream * dropout_multiplier(stream.shape, rng, dropout_p, grad_stream.dtype)
    if needs_input_bias:
        grad_input_bias = (grad_stream if grad_input is None else grad_input).sum(rows)
    return (
        grad_stream,
        or_empty(grad_input, stream),
        or_empty(grad_weight if needs_weight else None, stream),
        or_empty(grad_bias, stream),
        or_empty(grad_input_bias, stream),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
