"""linear_cross_entropy of the GPU backends: torch's products around a kernel that knows rows of logits.

The logits [N,V] are never stored whole. For each chunk of rows torch's product writes them, the backend's kernel reads
them once for their losses and, where gradients are wanted, once more to put their gradient in their place; products
with the gradient give that of the input, and add to the weight's in float32, so that a chunk costs no rounding. A logit
costs 10 bytes in 16 bits, and the memory is that of one chunk.

A row of logits starts at a multiple of 16 elements whatever the vocabulary is. Three products and the kernel read or
write these rows, and where rows start anywhere, as they do with GPT-2's 50,257 classes, none of the four moves 16 bytes
at a time.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; the chunks: Hsu et al., "Liger
Kernel", 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytransformer.backends._arguments import contiguous, rows

_CHUNK = 2**27  # bytes of logits stored at a time: enough to fill a GPU with a product's tiles
_CHUNK_ON_CPU = 2**13  # where only tests run these backends: several chunks of small problems
_UNIT = 16  # elements that the rows of logits start at multiples of

# (ignore_index, label_smoothing, z_loss, softcap), as the op takes them
Options = tuple[int, float, float, float]


def empty_weight(weight: Tensor) -> str | None:
    """Why no kernel takes this weight, or None."""
    return f"it takes no weight of shape {list(weight.shape)}" if 0 in weight.shape else None


@dataclass(frozen=True)
class LossByChunks:
    """The op's two functions, of what a backend brings.

    Attributes:
        rows_kernel: ``rows_kernel(logits, target, options, row_scale, loss, lse)`` writes the loss and lse, float32
            [n], of logits [n,V] whose rows lie apart by a multiple of 16; unless ``row_scale``, float32 [n] or [1], is
            None, the logits become ``row_scale * dloss / dlogits``.
        add_product: ``add_product(total, a, b)`` adds ``a @ b`` to a contiguous float32 ``total``.
    """

    rows_kernel: Callable[[Tensor, Tensor, Options, Tensor | None, Tensor, Tensor], None]
    add_product: Callable[[Tensor, Tensor, Tensor], None]

    def fwd(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Loss and lse, and the gradients for a gradient of 1 of the loss."""
        options = (ignore_index, label_smoothing, z_loss, softcap)
        wanted = [n and reduction != "none" for n in needs]
        counted = (target != ignore_index).sum() if reduction == "mean" else None
        scale = _scale_of_one(counted, target) if any(wanted) else None
        loss, lse, grads = self._losses(input, linear_weight, linear_bias, target, options, scale, wanted)
        if reduction == "none":
            return loss.view(target.shape), lse, *grads
        return loss.sum() if counted is None else loss.sum() / counted, lse, *grads

    def bwd(
        self,
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
        needs: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """The gradients alone. Neither the logits nor lse are taken from the forward: a float32 lse would cost the
        digits of p - 1."""
        options = (ignore_index, label_smoothing, z_loss, softcap)
        scale = grad_loss / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else grad_loss
        scale = scale.expand(target.shape).flatten().float().contiguous()
        return self._losses(input, linear_weight, linear_bias, target, options, scale, needs)[2]

    def _losses(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: Options,
        scales: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """``(loss, lse, gradients)``: float32 [N] each, and the gradients of input, weight and bias as ``needs`` asks.

        The gradients are of the losses' sum, each loss times its one of ``scales``, float32 [N] or [1]; None where none
        is needed.
        """
        x, weight, classes = rows(input), contiguous(weight), target.flatten().contiguous()
        loss, lse = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
        logits = _room_for_logits(x, weight.shape[0])
        chunk = max(logits.shape[0], 1)
        gradients = _Gradients(x, weight, needs, 0 < x.shape[0] <= chunk, self.add_product)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, min(start + chunk, x.shape[0]))
            some = logits[: part.stop - start]
            _linear(x[part], weight, bias, some)
            scale = scales if scales is None or scales.numel() == 1 else scales[part]
            self.rows_kernel(some, classes[part], options, scale, loss[part], lse[part])
            if any(needs):
                gradients.add(part, some)
        grad_input, *rest = gradients.found()
        return loss, lse, (grad_input.view(input.shape) if needs[0] else grad_input, *rest)


def _room_for_logits(x: Tensor, classes: int) -> Tensor:
    """[n,V] for as many rows as are computed at a time, of chunks of nearly one size.

    Chunks are of multiples of 16 rows, so that what is cut into them starts alike aligned in each.
    """
    N, width = x.shape[0], _up(classes, _UNIT)
    chunks = -(-N * width * x.element_size() // (_CHUNK_ON_CPU if x.is_cpu else _CHUNK))
    return x.new_empty(min(_up(-(-N // max(chunks, 1)), _UNIT), N), width)[:, :classes]


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias, x, weight.mT, out=out)


class _Gradients:
    """Adds up what the gradient of each chunk's logits gives, the sums over chunks in float32."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        needs: Sequence[bool],
        whole: bool,
        add_product: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        self.x, self.weight, self.whole, self.needs, self.add_product = x, weight, whole, needs, add_product
        self.grad_input = torch.empty_like(x) if needs[0] else x.new_empty(0)
        self.grad_weight = x.new_empty(0)
        if needs[1] and not whole:
            self.grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        count = weight.shape[0] if needs[2] and not whole else 0
        self.grad_bias = torch.zeros(count, dtype=torch.float32, device=x.device)

    def add(self, part: slice, grad_logits: Tensor) -> None:
        if self.needs[0]:
            torch.mm(grad_logits, self.weight, out=self.grad_input[part])
        if self.needs[1] and self.whole:
            self.grad_weight = grad_logits.mT @ self.x
        elif self.needs[1]:
            self.add_product(self.grad_weight, grad_logits.mT, self.x[part])
        if self.needs[2] and self.whole:
            self.grad_bias = grad_logits.sum(0, dtype=torch.float32)
        elif self.needs[2]:
            self.grad_bias += grad_logits.sum(0, dtype=torch.float32)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias, in the dtype of the input; empty where not needed."""
        return self.grad_input, self.grad_weight.to(self.x.dtype), self.grad_bias.to(self.x.dtype)


def _scale_of_one(counted: Tensor | None, target: Tensor) -> Tensor:
    """What the gradient of each row's loss is to be multiplied by where that of the result is 1, float32 [1].

    The result is a mean over so many ``counted``, or a sum.
    """
    if counted is None:
        return torch.ones(1, dtype=torch.float32, device=target.device)
    return counted.clamp(min=1).reciprocal().view(1)
