"""LayerNorm and RMSNorm, and their fusion with the dropout and the residual sum before them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import ops
from pytransformer.nn._plain import is_plain


class LayerNorm(torch.nn.LayerNorm):
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions; torch's class on the fused op.

    Args:
        normalized_shape: the sizes of the dimensions to normalise over, the last of the input.
        eps, elementwise_affine, bias, device, dtype: as in ``torch.nn.LayerNorm``.

    Shape: input and output [..., *normalized_shape]; any floating dtype, computed in float32 (float64 for float64).
    A nested tensor goes to torch's own norm.

    Raises:
        ValueError: the input's last dimensions are not ``normalized_shape``.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016, eq. 4.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        x, weight, bias = _rows(self, input)
        return ops.layer_norm(x, weight, bias, eps=self.eps).reshape(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions; torch's class on the fused op.

    Args:
        normalized_shape: the sizes of the dimensions to normalise over, the last of the input.
        eps: the input dtype's machine epsilon where None, as in torch.
        elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.

    Shape: input and output [..., *normalized_shape]; any floating dtype, computed in float32 (float64 for float64).
    A nested tensor goes to torch's own norm.

    Raises:
        ValueError: the input's last dimensions are not ``normalized_shape``.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return super().forward(x)
        rows, weight, _ = _rows(self, x)
        return ops.rms_norm(rows, weight, eps=_rms_eps(self, x)).reshape(x.shape)  # type: ignore[no-any-return]


def add_norm(norm: Any, branch: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """``norm(residual + dropout(branch))`` [..., E], in one pass where ``norm`` allows it."""
    branch, residual = _promoted(branch, residual)
    if is_plain(norm, _LAYER_NORMS) and len(norm.normalized_shape) == 1:
        return ops.layer_norm(branch, norm.weight, norm.bias, residual, dropout_p=dropout_p, eps=norm.eps)
    if is_plain(norm, _RMS_NORMS) and len(norm.normalized_shape) == 1:
        eps = _rms_eps(norm, branch)
        return ops.rms_norm(branch, norm.weight, residual, dropout_p=dropout_p, eps=eps)  # type: ignore[no-any-return]
    out: Tensor = norm(residual + F.dropout(branch, dropout_p))
    return out


def add_prenorm(norm: Any, branch: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """``(norm(sum), sum)`` with ``sum = residual + dropout(branch)``, in one pass where ``norm`` allows it."""
    branch, residual = _promoted(branch, residual)
    if is_plain(norm, _LAYER_NORMS) and len(norm.normalized_shape) == 1:
        extra: dict[str, Any] = {"dropout_p": dropout_p, "eps": norm.eps, "prenorm": True}
        return ops.layer_norm(branch, norm.weight, norm.bias, residual, **extra)  # type: ignore[no-any-return]
    total = residual + F.dropout(branch, dropout_p)
    return norm(total), total


_LAYER_NORMS: tuple[type[torch.nn.Module], ...] = (LayerNorm, torch.nn.LayerNorm)
_RMS_NORMS: tuple[type[torch.nn.Module], ...] = (RMSNorm, torch.nn.RMSNorm)
NORMS = (*_LAYER_NORMS, *_RMS_NORMS)


def _promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, as a sum takes them: under autocast a branch is narrower than the residual stream."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _rows(norm: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input and parameters with the normalised dimensions as one."""
    shape = tuple(norm.normalized_shape)
    if tuple(x.shape[x.dim() - len(shape) :]) != shape or x.dim() < len(shape):
        raise ValueError(f"{type(norm).__name__}: input must be [..., *{list(shape)}], got {list(x.shape)}")
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if len(shape) == 1:
        return x, weight, bias
    flat = (None if parameter is None else parameter.flatten() for parameter in (weight, bias))
    return x.flatten(x.dim() - len(shape)), *flat  # type: ignore[return-value]


def _rms_eps(norm: Any, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else float(norm.eps)
