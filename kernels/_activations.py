"""The activations of the feed-forward network and their derivatives, float32."""

from __future__ import annotations

import triton
import triton.language as tl

from pytransformer.kernels._attention import tanh

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``(activation(x), its derivative)``; what is not used is not computed."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        y = x * below
        slope = below + x * (tl.exp(-0.5 * x * x) * _INVERSE_SQRT_2PI)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        th = tanh(x * _SQRT_2_OVER_PI * (1.0 + square * _CUBIC))
        y = 0.5 * x * (1.0 + th)
        # Where the tanh has reached 1 the second term is 0, and its last factor may be infinite.
        bend = (1.0 - th) * (1.0 + th) * x
        bend = tl.where(bend == 0, 0.0, bend * ((1.0 + square * (3.0 * _CUBIC)) * _SQRT_2_OVER_PI))
        slope = 0.5 * (1.0 + th) + 0.5 * bend
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = 1.0 / (1.0 + tl.exp(-x))
        y = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
    return y, slope
