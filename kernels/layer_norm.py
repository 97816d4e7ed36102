"""LayerNorm and RMSNorm with the bias, dropout and residual before them: one pass forward, one backward.

    z = residual + dropout(x + input_bias);  y = (z - mean) * rstd * weight + bias

Memory bound: nothing but bytes matters. A program holds ``weight`` and the biases in registers and walks over the
rows with a stride, the next rows on their way while it computes (``STAGES``), so that the forward moves x, residual, z
and y once each (8 bytes an element in 16 bits) and the backward dy, z, dz and, with dropout, dx. The dropout mask is
not stored but drawn again. Column sums (the gradients of weight and biases) stay in registers too, one row of partial
sums a program, added up at the end in a fixed order: the same bits in every run. Rows that do not fit in registers are
read in pieces, three times forward and twice backward; what is read again comes from the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._common import (
    dropout_threshold,
    empty_like,
    keep_columns,
    load,
    program_count,
    register_limit,
    rounded,
    store,
)

_LENGTHS = ["N", "threshold"]  # no kernel is compiled anew for these


@triton.jit
def _residual_sum(
    x_ptr,
    residual_ptr,
    input_bias,
    rng_ptr,
    rows,
    start,
    mask,
    E,
    threshold,
    keep_scale,
    BLOCK_E: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """``residual + dropout(x + input_bias)`` [R,BLOCK_E], rounded to the dtype of x as it is stored."""
    at = rows.to(tl.int64) * E + (start + tl.arange(0, BLOCK_E))[None, :]
    z = load(x_ptr + at, mask) + input_bias
    if rng_ptr is not None:
        z = tl.where(keep_columns(rng_ptr, rows, start, E, threshold, BLOCK_E, OCTETS), z * keep_scale, 0.0)
    if residual_ptr is not None:
        z += load(residual_ptr + at, mask)
    return rounded(z, x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _vector(pointer, columns, E, default: tl.constexpr):
    """A vector of length E as [1,BLOCK_E]; ``default`` where there is none."""
    vector = (
        load(pointer + columns, columns < E) if pointer is not None else tl.full(columns.shape, default, tl.float32)
    )
    return vector[None, :]


@triton.jit(do_not_specialize=_LENGTHS)
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    input_bias_ptr,
    rng_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    E,
    eps,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    OCTETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_E)
    weight, bias = _vector(weight_ptr, columns, E, 1.0), _vector(bias_ptr, columns, E, 0.0)
    input_bias = _vector(input_bias_ptr, columns, E, 0.0)
    inside = (columns < E)[None, :]
    for first in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS))[:, None]
        mask = (rows < N) & inside
        z = _residual_sum(
            x_ptr, residual_ptr, input_bias, rng_ptr, rows, 0, mask, E, threshold, keep_scale, BLOCK_E, OCTETS
        )
        z = tl.where(mask, z, 0.0)
        at = rows.to(tl.int64) * E + columns[None, :]
        if sum_ptr is not None:
            store(sum_ptr + at, z, mask)
        mean = tl.zeros((ROWS, 1), tl.float32) if RMS else (tl.sum(z, 1) / E)[:, None]
        centred = tl.where(mask, z - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)[:, None]
        store(y_ptr + at, centred * rstd * weight + bias, mask)
        tl.store(mean_ptr + rows, mean, mask=rows < N)
        tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=_LENGTHS)
def forward_in_pieces_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    input_bias_ptr,
    rng_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    E,
    eps,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    OCTETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As ``forward_kernel``, one row at a time; the sum is made anew for the mean, the variance and the output."""
    columns = tl.arange(0, BLOCK_E)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int32)
        mean = tl.zeros((1, 1), tl.float32)
        squares = tl.zeros((1, 1), tl.float32)
        rstd = tl.zeros((1, 1), tl.float32)
        for step in tl.static_range(1 if RMS else 0, 3):
            for start in range(0, E, BLOCK_E):
                mask = (start + columns < E)[None, :]
                input_bias = _vector(input_bias_ptr, start + columns, E, 0.0)
                z = _residual_sum(
                    x_ptr,
                    residual_ptr,
                    input_bias,
                    rng_ptr,
                    rows,
                    start,
                    mask,
                    E,
                    threshold,
                    keep_scale,
                    BLOCK_E,
                    OCTETS,
                )
                at = rows.to(tl.int64) * E + (start + columns)[None, :]
                if step == 0:
                    mean += tl.sum(tl.where(mask, z, 0.0), 1)[:, None] / E
                if step == 1:
                    centred = tl.where(mask, z - mean, 0.0)
                    squares += tl.sum(centred * centred, 1)[:, None]
                if step == 2:
                    weight = _vector(weight_ptr, start + columns, E, 1.0)
                    bias = _vector(bias_ptr, start + columns, E, 0.0)
                    store(y_ptr + at, (z - mean) * rstd * weight + bias, mask)
                    if sum_ptr is not None:
                        store(sum_ptr + at, z, mask)
            rstd = tl.rsqrt(squares / E + eps)
        tl.store(mean_ptr + rows, mean)
        tl.store(rstd_ptr + rows, rstd)


@triton.jit
def _normalized(dy_ptr, z_ptr, weight, mean, rstd, at, mask):
    """``(dy, dy * weight, (z - mean) * rstd)`` of a tile, 0 where masked."""
    dy = load(dy_ptr + at, mask) if dy_ptr is not None else tl.zeros(mask.shape, tl.float32)
    return dy, dy * weight, tl.where(mask, (load(z_ptr + at, mask) - mean) * rstd, 0.0)


@triton.jit
def _store_gradients(
    dz, dsum_ptr, rng_ptr, dz_ptr, dx_ptr, rows, start, at, mask, E, threshold, keep_scale,
    BLOCK_E: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """Adds the stream's own gradient, stores dz and dx, and returns dx."""
    if dsum_ptr is not None:
        dz += load(dsum_ptr + at, mask)
    store(dz_ptr + at, dz, mask)
    dx = dz
    if rng_ptr is not None:
        dx = tl.where(keep_columns(rng_ptr, rows, start, E, threshold, BLOCK_E, OCTETS), dz * keep_scale, 0.0)
        store(dx_ptr + at, dx, mask)
    return tl.where(mask, dx, 0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def backward_kernel(
    dy_ptr,
    dsum_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    dz_ptr,
    dx_ptr,
    partial_ptr,
    N,
    E,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    OCTETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz, dx, and this program's sums over its rows of dy * normalised, dy and dx: ``partial_ptr`` [programs,3,E]."""
    columns = tl.arange(0, BLOCK_E)
    inside = (columns < E)[None, :]
    weight = _vector(weight_ptr, columns, E, 1.0)
    dweight, dbias = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    dinput_bias = tl.zeros((BLOCK_E,), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS))[:, None]
        mask = (rows < N) & inside
        at = rows.to(tl.int64) * E + columns[None, :]
        if BLOCK_E > 4096:  # rows that take all registers leave none for a vector that the cache holds
            weight = _vector(weight_ptr, columns, E, 1.0)
        mean, rstd = load(mean_ptr + rows, rows < N), load(rstd_ptr + rows, rows < N)
        dy, wdy, normal = _normalized(dy_ptr, z_ptr, weight, mean, rstd, at, mask)
        dweight += tl.sum(dy * normal, 0)
        dbias += tl.sum(dy, 0)
        dz = wdy - normal * (tl.sum(wdy * normal, 1) / E)[:, None]
        if not RMS:
            dz -= (tl.sum(wdy, 1) / E)[:, None]
        dx = _store_gradients(
            dz * rstd, dsum_ptr, rng_ptr, dz_ptr, dx_ptr, rows, 0, at, mask, E, threshold, keep_scale, BLOCK_E, OCTETS
        )
        dinput_bias += tl.sum(dx, 0)
    partial = partial_ptr + tl.program_id(0) * 3 * E + columns
    tl.store(partial, dweight, mask=columns < E)
    tl.store(partial + E, dbias, mask=columns < E)
    tl.store(partial + 2 * E, dinput_bias, mask=columns < E)


@triton.jit(do_not_specialize=_LENGTHS)
def backward_in_pieces_kernel(
    dy_ptr,
    dsum_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    dz_ptr,
    dx_ptr,
    partial_ptr,
    N,
    E,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    OCTETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As ``backward_kernel``, one row at a time; the program's column sums lie in memory, zero at first."""
    columns = tl.arange(0, BLOCK_E)
    partial_ptr += tl.program_id(0) * 3 * E
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        rows = row + tl.zeros((1, 1), tl.int32)
        mean, rstd = tl.load(mean_ptr + rows), tl.load(rstd_ptr + rows)
        projection = tl.zeros((1, 1), tl.float32)
        average = tl.zeros((1, 1), tl.float32)
        for start in range(0, E, BLOCK_E):
            mask = (start + columns < E)[None, :]
            at = rows.to(tl.int64) * E + (start + columns)[None, :]
            weight = _vector(weight_ptr, start + columns, E, 1.0)
            dy, wdy, normal = _normalized(dy_ptr, z_ptr, weight, mean, rstd, at, mask)
            projection += tl.sum(wdy * normal, 1)[:, None] / E
            if not RMS:
                average += tl.sum(wdy, 1)[:, None] / E
        for start in range(0, E, BLOCK_E):
            mask = (start + columns < E)[None, :]
            at = rows.to(tl.int64) * E + (start + columns)[None, :]
            weight = _vector(weight_ptr, start + columns, E, 1.0)
            dy, wdy, normal = _normalized(dy_ptr, z_ptr, weight, mean, rstd, at, mask)
            dz = (wdy - normal * projection - average) * rstd
            dx = _store_gradients(
                dz, dsum_ptr, rng_ptr, dz_ptr, dx_ptr, rows, start, at, mask, E, threshold, keep_scale, BLOCK_E, OCTETS
            )
            partial = partial_ptr + (start + columns)[None, :]
            tl.store(partial, load(partial, mask) + dy * normal, mask=mask)
            tl.store(partial + E, load(partial + E, mask) + dy, mask=mask)
            tl.store(partial + 2 * E, load(partial + 2 * E, mask) + dx, mask=mask)


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    store_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``(y, z, mean, rstd)`` of contiguous x [N,E]; z is None unless ``store_sum``. ``rng`` is int64 [2] or None."""
    N, E = x.shape
    y, z = empty_like(x), empty_like(x) if store_sum else None
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    arch = _configs.architecture(x.device)
    config = _configs.layer_norm("fwd", x.dtype, E, arch)
    kernel = forward_kernel if _configs.whole_row("fwd", x.dtype, arch) >= E else forward_in_pieces_kernel
    tensors = (x, weight, bias, residual, input_bias, rng, y, z, mean, rstd)
    _launch(kernel, config, x, tensors, (eps,), dropout_p, rms)
    return y, z, mean, rstd


def layer_norm_bwd(
    dy: Tensor | None,
    dsum: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(dz, dx, columns)`` for contiguous dy and z [N,E].

    ``dsum`` is a gradient of z from elsewhere, dx is None without dropout (it is dz), and ``columns`` float32 [3,E]
    holds the gradients of weight, bias and input_bias.
    """
    E = z.shape[1]
    dz, dx = empty_like(z), empty_like(z) if rng is not None else None
    arch = _configs.architecture(z.device)
    config, kernel = _configs.layer_norm("bwd", z.dtype, E, arch), backward_kernel
    partial = torch.empty(_programs(config, z), 3, E, dtype=torch.float32, device=z.device)
    if _configs.whole_row("bwd", z.dtype, arch) < E:
        kernel = backward_in_pieces_kernel
        partial.zero_()
    _launch(kernel, config, z, (dy, dsum, z, weight, mean, rstd, rng, dz, dx, partial), (), dropout_p, rms)
    return dz, dx, partial.sum(0)


def _programs(config: _configs.Config, x: Tensor) -> int:
    """As many as are at work at a time: one more would begin when the first have walked over all their rows."""
    warp_registers = 32 * (config.registers or 64)
    return program_count(
        -(-x.shape[0] // config.tile[0]), x.device, per_processor=65536 // (warp_registers * config.num_warps)
    )


def _launch(
    kernel: Any,
    config: _configs.Config,
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[float, ...],
    dropout_p: float,
    rms: bool,
) -> None:
    N, E = x.shape
    rows, columns = config.tile
    kernel[(_programs(config, x),)](
        *tensors, N, E, *scalars, *dropout_threshold(dropout_p),
        RMS=rms, OCTETS=E % 8 == 0, ROWS=rows, BLOCK_E=columns, STAGES=config.num_stages,
        **register_limit(_configs.architecture(x.device), config.registers), **config.options,
    )  # fmt: skip
