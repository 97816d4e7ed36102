"""The feed-forward network: the activation, the gate and the dropout in the epilogue of a matrix product.

    h = x W1^T + b1;  a = dropout(act(h) * g);  y = a W2^T + b2        g = x Wg^T + bg, or 1

The first product writes h (for the backward) and a from its registers, with the gate's product beside it in the same
program; the backward's product dy W2 turns its tile into dh (and dg), makes a again from h, and leaves the column
sums of dh, which are b1's gradient: h is read once, and a, the largest tensor of the block, is not kept.

An epilogue saves a pass over h; a library's plain product is faster than one written here by about as much, in
proportion to E. So both forms stand here, and the configuration says which of them a width gets: the other is
torch's product and one elementwise kernel. Products with nothing to fuse go to torch in either form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._activations import activate
from pytransformer.kernels._common import (
    dropout_threshold,
    empty_like,
    float32_precision,
    keep_columns,
    load,
    rounded,
    store,
)
from pytransformer.kernels._matmul import product_tile, tile_of_program


@triton.jit
def _bias(pointer, n, N):
    return load(pointer + n, n < N)[None, :]


@triton.jit
def _hidden_gradients(
    da, h_ptr, gate_ptr, rng_ptr, a_ptr, dh_ptr, dgate_ptr, m, n0, at, mask, F, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """From the gradient of a: stores a, dh and dgate; returns dh as it is stored."""
    y, slope = activate(load(h_ptr + at, mask), ACTIVATION)
    a = y
    if gate_ptr is not None:
        a = y * load(gate_ptr + at, mask)
    if rng_ptr is not None:
        keep = keep_columns(rng_ptr, m[:, None], n0, F, threshold, BLOCK_F, OCTETS)
        a, da = tl.where(keep, a * keep_scale, 0.0), tl.where(keep, da * keep_scale, 0.0)
    store(a_ptr + at, a, mask)
    dh = da * slope
    if gate_ptr is not None:
        store(dgate_ptr + at, da * y, mask)
        dh *= load(gate_ptr + at, mask)
    dh = rounded(dh, dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + at, dh, mask=mask)
    return tl.where(mask, dh.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["M", "threshold"])
def hidden_kernel(
    x_ptr, w_ptr, b_ptr, wg_ptr, bg_ptr, rng_ptr, h_ptr, a_ptr, M, E, F, threshold, keep_scale,
    ACTIVATION: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h and a from x [M,E], W1 and Wg [F,E]."""
    row, column = tile_of_program(M, F, BLOCK_M, BLOCK_N)
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < F)[None, :]
    at = m[:, None] * F + n[None, :]
    h = product_tile(x_ptr, w_ptr, m, n, M, F, E, E, 1, 1, E, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if b_ptr is not None:
        h += _bias(b_ptr, n, F)
    if h_ptr is not None:
        store(h_ptr + at, h, mask)
    a, _ = activate(h, ACTIVATION)
    if wg_ptr is not None:
        gate = product_tile(x_ptr, wg_ptr, m, n, M, F, E, E, 1, 1, E, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        if bg_ptr is not None:
            gate += _bias(bg_ptr, n, F)
        a *= gate
    if rng_ptr is not None:
        a = tl.where(
            keep_columns(rng_ptr, m[:, None], column * BLOCK_N, F, threshold, BLOCK_N, OCTETS), a * keep_scale, 0.0
        )
    store(a_ptr + at, a, mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def hidden_backward_kernel(
    dy_ptr, w_ptr, h_ptr, gate_ptr, rng_ptr, a_ptr, dh_ptr, dgate_ptr, partial_ptr, M, OUT, F, threshold, keep_scale,
    ACTIVATION: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a, dh and dgate from dy [M,OUT], W2 [OUT,F] and h; ``partial_ptr`` [tiles of rows, F] gets column sums of dh."""
    row, column = tile_of_program(M, F, BLOCK_M, BLOCK_N)
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < F)[None, :]
    at = m[:, None] * F + n[None, :]
    da = product_tile(dy_ptr, w_ptr, m, n, M, F, OUT, OUT, 1, F, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    dh = _hidden_gradients(
        da, h_ptr, gate_ptr, rng_ptr, a_ptr, dh_ptr, dgate_ptr, m, column * BLOCK_N, at, mask, F, threshold,
        keep_scale, ACTIVATION, BLOCK_N, OCTETS,
    )  # fmt: skip
    tl.store(partial_ptr + row * F + n, tl.sum(dh, 0), mask=n < F)


@triton.jit(do_not_specialize=["M", "threshold"])
def activation_kernel(
    h_ptr, gate_ptr, rng_ptr, a_ptr, M, F, threshold, keep_scale,
    ACTIVATION: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a from h and the gate, elementwise."""
    m, n0 = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < F)[None, :]
    at = m.to(tl.int64)[:, None] * F + n[None, :]
    a, _ = activate(load(h_ptr + at, mask), ACTIVATION)
    if gate_ptr is not None:
        a *= load(gate_ptr + at, mask)
    if rng_ptr is not None:
        a = tl.where(keep_columns(rng_ptr, m[:, None], n0, F, threshold, BLOCK_N, OCTETS), a * keep_scale, 0.0)
    store(a_ptr + at, a, mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def activation_backward_kernel(
    da_ptr, h_ptr, gate_ptr, rng_ptr, a_ptr, dh_ptr, dgate_ptr, partial_ptr, M, F, threshold, keep_scale,
    ACTIVATION: tl.constexpr, OCTETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """a, dh and dgate from the gradient of a, elementwise, with the column sums of dh."""
    m, n0 = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (n < F)[None, :]
    at = m.to(tl.int64)[:, None] * F + n[None, :]
    dh = _hidden_gradients(
        load(da_ptr + at, mask), h_ptr, gate_ptr, rng_ptr, a_ptr, dh_ptr, dgate_ptr, m, n0, at, mask, F, threshold,
        keep_scale, ACTIVATION, BLOCK_N, OCTETS,
    )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0) * F + n, tl.sum(dh, 0), mask=n < F)


def hidden_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    rng: Tensor | None,
    activation: str,
    dropout_p: float,
    store_hidden: bool,
    fused: bool | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``(h, a)`` [M,F] from contiguous x [M,E] and weights [F,E]; h is None unless ``store_hidden``.

    ``fused`` overrides the configuration's choice between the two forms.
    """
    (M, E), width = x.shape, weight.shape[0]
    a = torch.empty(M, width, dtype=x.dtype, device=x.device)
    constants = {"ACTIVATION": activation, "OCTETS": width % 8 == 0}
    arch = _configs.architecture(x.device)
    if _in_reach(a) and (_configs.fuse_activation("fwd", x.dtype, E, arch) if fused is None else fused):
        h = empty_like(a) if store_hidden else None
        config = _configs.matmul("hidden" if weight_gate is None else "gated", x.dtype, arch)
        block_m, block_n, block_k = config.tile
        hidden_kernel[(triton.cdiv(M, block_m) * triton.cdiv(width, block_n),)](
            x, weight, bias, weight_gate, bias_gate, rng, h, a, M, E, width, *dropout_threshold(dropout_p),
            **constants, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=float32_precision(),
            **config.options,
        )  # fmt: skip
        return h, a
    h = F.linear(x, weight, bias)
    gate = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
    grid, tile = _elementwise(M, width, arch)
    activation_kernel[grid](h, gate, rng, a, M, width, *dropout_threshold(dropout_p), **constants, **tile)
    return h if store_hidden else None, a


def hidden_bwd(
    dy: Tensor,
    weight: Tensor,
    h: Tensor,
    gate: Tensor | None,
    rng: Tensor | None,
    activation: str,
    dropout_p: float,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``(a, dh, dgate, dbias)`` from contiguous dy [M,O], W2 [O,F], h and gate [M,F]; dbias is float32 [F]."""
    (M, O), width = dy.shape, weight.shape[1]  # noqa: E741
    a, dh = empty_like(h), empty_like(h)
    dgate = None if gate is None else empty_like(h)
    constants = {"ACTIVATION": activation, "OCTETS": width % 8 == 0}
    arch = _configs.architecture(dy.device)
    if _in_reach(a) and (_configs.fuse_activation("bwd", dy.dtype, O, arch) if fused is None else fused):
        config = _configs.matmul("backward", dy.dtype, arch)
        block_m, block_n, block_k = config.tile
        n_rows = triton.cdiv(M, block_m)
        partial = torch.empty(n_rows, width, dtype=torch.float32, device=dy.device)
        hidden_backward_kernel[(n_rows * triton.cdiv(width, block_n),)](
            dy, weight, h, gate, rng, a, dh, dgate, partial, M, O, width, *dropout_threshold(dropout_p),
            **constants, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=float32_precision(),
            **config.options,
        )  # fmt: skip
    else:
        grid, tile = _elementwise(M, width, arch)
        partial = torch.empty(grid[0], width, dtype=torch.float32, device=dy.device)
        activation_backward_kernel[grid](
            dy @ weight, h, gate, rng, a, dh, dgate, partial, M, width, *dropout_threshold(dropout_p),
            **constants, **tile,
        )  # fmt: skip
    return a, dh, dgate, partial.sum(0)


def _in_reach(a: Tensor) -> bool:
    """The fused kernels count elements in 32 bits, for want of registers."""
    return a.numel() < 2**31


def _elementwise(M: int, width: int, arch: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and constants of an elementwise kernel over [M,width]."""
    config = _configs.elementwise(arch)
    block_m, block_n = config.tile
    return (triton.cdiv(M, block_m), triton.cdiv(width, block_n)), {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        **config.options,
    }
