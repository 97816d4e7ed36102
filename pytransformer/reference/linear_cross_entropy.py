"""The loss of a linear classifier in plain PyTorch: the definition of the op.

    logits = softcap * tanh((input linear_weight^T + linear_bias) / softcap)
    loss_n = (1 - e) * -log softmax(logits)[target_n] + e / V * sum_v -log softmax(logits)[v] + z * lse_n^2

Sources: Szegedy et al., "Rethinking the Inception Architecture", 2016, sec. 7 (label smoothing e); Chowdhery et
al., "PaLM", 2022, sec. 5 (z-loss); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The loss, float32 at least; differentiable. ``input`` [..., E], ``target`` [...]."""
    flat_target = target.reshape(-1)
    logits = _logits(input, linear_weight, linear_bias, softcap)
    losses = F.cross_entropy(
        logits, flat_target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    counted = flat_target != ignore_index
    if z_loss > 0:
        losses = losses + z_loss * torch.where(counted, torch.logsumexp(logits, -1).square(), 0)
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """[rows,V], float32 at least."""
    logits = F.linear(input.reshape(-1, input.shape[-1]), weight, bias)
    logits = logits.to(torch.promote_types(input.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def why_not(*args: object) -> str | None:
    return None


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``(loss, lse, grad_input, grad_weight, grad_bias)``.

    ``lse`` [rows] is of the logits, 0 where the target is ignored. The gradients are of the reduced loss, of those
    arguments that ``needs`` says; the others are empty, and all of them with ``reduction="none"``.
    """
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    loss = linear_cross_entropy(input, linear_weight, linear_bias, target, *options)
    logits = _logits(input, linear_weight, linear_bias, softcap)
    lse = torch.where(target.flatten() != ignore_index, torch.logsumexp(logits, -1), 0)
    needs = [n and reduction != "none" for n in needs]
    if not any(needs):
        return loss, lse, *(input.new_empty(0) for _ in needs)
    tensors = (input, linear_weight, linear_bias, target, lse)
    return loss, lse, *linear_cross_entropy_bwd(torch.ones_like(loss), *tensors, *options, needs)


def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of input, linear_weight and linear_bias; empty where ``needs`` says no.

    ``lse`` is what the forward returned; the reference starts anew.
    """

    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor]:
        options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
        return (linear_cross_entropy(x, w, b, target, *options),)

    grads = vjp(forward, (input, linear_weight, linear_bias), (grad_loss,))
    return tuple(or_empty(g if n else None, input) for g, n in zip(grads, needs, strict=True))
