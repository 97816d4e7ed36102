"""LinearCrossEntropyLoss: the output projection and its loss as one module, with a weight of its own or a tied one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytransformer import ops


class LinearCrossEntropyLoss(nn.Module):
    """``loss = cross_entropy(input W^T + b, target)`` whose logits are never stored whole.

    The first arguments and the parameters' names are those of ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13);
    class weights, class probabilities and ``out_features`` are not served.

    Args:
        in_features: E. num_classes: V.
        bias: have b. device, dtype: of the parameters.
        reduction: ``"mean"`` over the targets that count, ``"sum"`` or ``"none"``.
        ignore_index: targets of this value add nothing. label_smoothing: in [0, 1].
        z_loss: weight of the squared log of the normaliser. softcap: c > 0 bends each logit x to c tanh(x / c).

    Raises:
        ValueError: an option's value is out of range, at the first call.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 5.4; Szegedy et al., 2016, sec. 7.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.z_loss, self.softcap = z_loss, softcap

    @classmethod
    def tied(cls, table: nn.Module, **kwargs: Any) -> LinearCrossEntropyLoss:
        """A loss whose weight is the [V,E] ``weight`` of ``table``, an embedding or a linear layer: one parameter,
        with the sum of both gradients. The other arguments are the constructor's."""
        weight: Any = table.weight
        loss = cls(weight.shape[1], weight.shape[0], **{"device": weight.device, "dtype": weight.dtype, **kwargs})
        loss.linear.weight = weight
        return loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Args:
            input: [..., E], floating point. target: integer [...], in [0, V) or ``ignore_index``.

        Returns:
            float32 (float64 for float64 inputs): a scalar, or [...] with ``reduction="none"``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            IndexError: a target lies outside [0, V) (on CPU).
        """
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def logits(self, input: Tensor) -> Tensor:
        """``input W^T + b`` [..., V], softcapped where the loss is: what decoding needs."""
        logits: Tensor = self.linear(input)
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
