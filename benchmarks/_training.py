"""A step of training without the optimiser: forward, a loss, backward, of our modules and torch's with equal weights.

Both are in training mode without dropout, so that both can be checked; the loss weighs every real token's output
by a fixed random number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer import nn as fused
from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import BYTES, OURS, PEER, SECONDS, AbsentError, Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import TRANSFORMER_BASE, Model
from pytransformer.benchmarks.attention import lengths

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

    def step(module: nn.Module, dtype: torch.dtype) -> Callable[[], Any]:
        module = module.to(dtype)
        inputs, scale = x.to(dtype, copy=True).requires_grad_(), weight.to(dtype)
        return partial(_step, module, inputs, scale, mask)

    providers = {OURS: step(ours, dtype), PEER: step(theirs, dtype)}
    if math:
        providers[MATH] = partial(_with_math, providers[PEER])
    kept: dict[str, Any] = {}

    def check(outputs: tuple[Tensor, Tensor]) -> list[Comparison]:
        if not kept:
            kept.update(expected=step(oracle, torch.float64)(), plain=providers[PEER]())
        seen = slice(None) if mask is None else ~mask
        parts = zip(("output", "dinput"), outputs, kept["expected"], kept["plain"], strict=True)
        return [compare(name, *(y[seen] for y in found)) for name, *found in parts]

    return Problem(providers, check)


def _module(library: Any, model: Model, layers: int) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.0, "activation": model.activation, "batch_first": True}
    if model == TRANSFORMER_BASE:
        if not hasattr(library, "Transformer"):
            raise AbsentError("this version has no nn.Transformer")
        return library.Transformer(model.width, model.heads, layers, layers, model.hidden, **options).train()
    layer = library.TransformerEncoderLayer(model.width, model.heads, model.hidden, **options)
    return library.TransformerEncoder(layer, layers, enable_nested_tensor=False).train()


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
