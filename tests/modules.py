"""What the module tests share: torch's module and ours with the same weights, judged on outputs and gradients.

Semantics are settled in float64, where both compute the same numbers up to a rounding nobody sees: ``assert_parity``
asks for agreement within one rounding to float32, by the rule of compare.py. The kernels' float32 path through the
same modules runs in ``assert_close``: their numerics are judged by the tests of the ops, so what may go wrong here is
a mask, a scale, a layout or a missing term, errors of the size of the result.
"""

from __future__ import annotations

import copy
import math
from unittest import mock

import compare
import torch

from pytransformer import nn

E, H, B, L, S = 16, 4, 3, 7, 5


def pair(name, *args, seed=0, **kwargs):
    """torch's module and ours, with the same weights; biases and norms are moved off their initial 0 and 1."""
    torch.manual_seed(seed)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    torch.manual_seed(seed)
    ours = getattr(nn, name)(*args, **kwargs)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def as_id(options):
    """A test's options in its name, which must be the same in every process: a function's address is not."""
    return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "default"


def shake(module, by=0.1):
    """Moves biases and norms off their initial 0 and 1."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return module


def attention_mask(length, padded, pad):
    """int64 [B,length], 0 for the ``padded`` tokens of each row, on the side that ``pad`` says, or on none."""
    place, count = torch.arange(length), torch.tensor(padded)[:, None]
    hidden = {"right": place >= length - count, "left": place < count}.get(pad, count < 0)
    return (~hidden).long().expand(len(padded), length)


def assert_close(ours, theirs, what=""):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda m: f"{what}: {m}")


def assert_parity(theirs, ours, call, *inputs, **given):
    """Same outputs, same gradients of inputs and parameters, for ``call(module, *inputs, **given)``."""
    expected = results(theirs, call, inputs, given, torch.float64)
    settled = results(ours, call, inputs, given, torch.float64)
    fused = results(ours, call, inputs, given, torch.float32)
    assert settled.keys() == expected.keys()
    size = max(x.square().mean().sqrt() for x in expected.values()).item()
    for name, x in expected.items():
        # A gradient may be 0 by cancellation: what is left of it is rounding of terms of another size.
        compare.assert_close(name, settled[name].float(), x, x.float(), magnitude=1e-3 * size)
        assert_close(fused[name], x.float(), f"float32 {name}")


def call(module, *inputs, **given):
    return module(*inputs, **given)


def results(module, call, inputs, given, dtype):
    """Outputs and gradients by name, computed in ``dtype``; a gradient that torch leaves None has no name."""
    # torch's decoder layer goes over to relu in a copy where its activation is a module; ours does not.
    with mock.patch.object(torch.nn.TransformerDecoderLayer, "__setstate__", torch.nn.Module.__setstate__):
        module = copy.deepcopy(module).to(dtype)
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    found = call(module, *leaves, **{name: cast(x, dtype) for name, x in given.items()})
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    sum((x * torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape)).sum() for x in found).backward()
    named = {f"input {i}": x.grad for i, x in enumerate(leaves)}
    named |= {name: p.grad for name, p in module.named_parameters()}
    outputs = {f"output {i}": x.detach() for i, x in enumerate(found)}
    return outputs | {f"gradient of {name}": x for name, x in named.items() if x is not None}


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def padding(length=S):
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[0, -2:] = True
    mask[1, :1] = True  # padding on the left as well
    return mask


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


def bool_mask(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 2] = False  # every query keeps a key under every mask above
    return mask
