"""A step of training without the optimiser: forward, a loss, backward, of our modules and torch's with equal weights.

Both are in training mode without dropout, so that both can be checked; the loss weighs every real token's output
by a fixed random number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer import nn as fused
from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import BYTES, OURS, PEER, SECONDS, AbsentError, Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import TRANSFORMER_BASE, Model
from pytransformer.benchmarks.attention import lengths

SPELLINGS = 6  # of torch's step, where one does not tell how far rounding can lead
MATH = "torch-math"  # torch with attention written out: what training long sequences cost before fused kernels


def case(
    dtype: torch.dtype,
    model: Model,
    layers: int,
    B: int,
    S: int,
    padded: bool = False,
    device: str = "cpu",
    metric: str = SECONDS,
    **more: Any,
) -> Case:
    """An encoder of some layers of the model; Transformer-base has as many layers of decoder too."""
    real = float(lengths(B, S).sum()) if padded else float(B * S)
    pairs = float(lengths(B, S).double().square().sum()) if padded else float(B * S * S)
    E, F = model.width, model.hidden
    attention, hidden = 2 * (4 * E * E * real + 2 * E * pairs), 2 * (2 * E * F * real)
    both = model == TRANSFORMER_BASE
    forward = layers * (attention * (3 if both else 1) + hidden * (2 if both else 1))
    weights = layers * ((4 * E * E) * (3 if both else 1) + (2 * E * F) * (2 if both else 1))
    return Case(
        op="models",
        direction="fwd+bwd",
        dtype=dtype_name(dtype),
        shape=f"{model.name} {B}x{S}" + (" padding" if padded else ""),
        operations=3 * forward,
        bytes=3 * weights * dtype.itemsize,
        build=partial(build, dtype, model, layers, B, S, padded, device, metric == BYTES),
        sizes={"B": B, "T": S, "layers": layers, "E": E, "F": F},
        device=device,
        metric=metric,
        **more,
    )


def build(
    dtype: torch.dtype, model: Model, layers: int, B: int, S: int, padded: bool, device: str, math: bool
) -> Problem:
    """Both models, the batch and the check of output and input gradient."""
    ours, theirs = (_module(library, model, layers).to(device) for library in (fused, nn))
    ours.load_state_dict(theirs.state_dict())
    oracle = copy.deepcopy(theirs).double()
    x = draw(B, S, model.width, dtype=dtype, device=device)
    padding = torch.arange(S) >= lengths(B, S)[:, None]
    mask = padding.to(device) if padded else None
    weight = draw(B, S, model.width, dtype=torch.float32, seed=1).bfloat16().to(device)
    if padded:
        weight = weight.masked_fill(padding[..., None].to(device), 0)

    def step(module: nn.Module, dtype: torch.dtype, x: Tensor = x) -> Callable[[], Any]:
        module = module.to(dtype)
        inputs, scale = x.to(dtype, copy=True).requires_grad_(), weight.to(dtype)
        return partial(_step, module, inputs, scale, mask)

    def moved(seed: int) -> Tensor:
        """The input a rounding away."""
        signs = draw(*x.shape, dtype=torch.float32, seed=seed).sign().to(device)
        return (x.float() * (1 + torch.finfo(dtype).eps * signs)).to(dtype)

    providers = {OURS: step(ours, dtype), PEER: step(theirs, dtype)}
    if math:
        providers[MATH] = partial(_with_math, providers[PEER])
    seen = slice(None) if mask is None else ~mask
    plain = [lambda seed=seed: step(theirs, dtype, moved(seed))() for seed in range(1, SPELLINGS)]
    gate = _Gate(step(oracle, torch.float64), [providers[PEER], *plain], seen, smooth=model.activation != "relu")
    return Problem(providers, gate)


class _Gate:
    """Judges the output and the input's gradient of a step against float64, by the error of torch's steps.

    Of millions of arguments of relu some are within a rounding of 0, where its gradient jumps. Whether torch's jumps
    too is luck: where its first step says that ours is wrong, others are asked, of inputs a rounding away.
    """

    def __init__(self, oracle: Callable[[], Any], plain: Sequence[Callable[[], Any]], seen: Any, smooth: bool) -> None:
        self._oracle, self._plain, self._seen, self._smooth = oracle, plain, seen, smooth

    def __call__(self, outputs: tuple[Tensor, Tensor]) -> list[Comparison]:
        found = self._judged(outputs, self._first)
        if self._smooth or all(verdict.ok for verdict in found):
            return found
        return self._judged(outputs, self._every)

    def _judged(self, outputs: Sequence[Tensor], plain: Sequence[Sequence[Tensor]]) -> list[Comparison]:
        def cut(x: Tensor) -> Tensor:
            return x[self._seen]

        parts = zip(("output", "dinput"), outputs, self._expected, zip(*plain, strict=True), strict=True)
        return [compare(name, cut(y), cut(wanted), [cut(x) for x in xs]) for name, y, wanted, xs in parts]

    @cached_property
    def _expected(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._oracle()
        return found

    @cached_property
    def _first(self) -> list[Sequence[Tensor]]:
        return [self._plain[0]()]

    @cached_property
    def _every(self) -> list[Sequence[Tensor]]:
        return [*self._first, *(plain() for plain in self._plain[1:])]


def _module(library: Any, model: Model, layers: int) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.0, "activation": model.activation, "batch_first": True}
    if model == TRANSFORMER_BASE:
        if not hasattr(library, "Transformer"):
            raise AbsentError("this version has no nn.Transformer")
        return library.Transformer(model.width, model.heads, layers, layers, model.hidden, **options).train()
    layer = library.TransformerEncoderLayer(model.width, model.heads, model.hidden, **options)
    return library.TransformerEncoder(layer, layers).train()


def _step(module: Any, x: Tensor, weight: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output and the input's gradient; the gradients of the weights are left on them, as in training."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    if isinstance(module, nn.Transformer):
        masks = {"src_key_padding_mask": padding, "tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
        output = module(x, x, **masks)
    else:
        output = module(x, src_key_padding_mask=padding)
    (output * weight).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


def _with_math(step: Callable[[], Any]) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return step()
