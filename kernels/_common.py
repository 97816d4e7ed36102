"""What the kernels share: rounding, matrix products and the random bits of dropout.

Arithmetic is float32: tiles are widened when they are loaded and rounded once, when they are stored. Triton's
interpreter truncates where it should round to bfloat16, and multiplies bfloat16 tiles wrongly without saying so;
``store`` and ``dot`` work around both, so kernels use them instead of Triton's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store(pointers, x, mask):
    """Stores float32 ``x`` in the dtype that ``pointers`` point to."""
    tl.store(pointers, rounded(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def load(pointers, mask):
    """Loads as float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tile(pointers, inside, columns, BOUNDED: tl.constexpr, WHOLE: tl.constexpr):
    """Rows as they lie, 0 where masked: ``inside`` is asked where the tile is ``BOUNDED``, ``columns`` unless it has
    ``WHOLE`` rows. A load that asks for nothing is a copy of fewer instructions."""
    if BOUNDED and not WHOLE:
        return tl.load(pointers, mask=inside & columns, other=0.0)
    if BOUNDED:
        return tl.load(pointers, mask=inside, other=0.0)
    if not WHOLE:
        return tl.load(pointers, mask=columns, other=0.0)
    return tl.load(pointers)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """float32 ``a @ b``; ``PRECISION`` is that of float32 operands, ``"ieee"`` or ``"tf32"``."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _philox(rng_ptr, block):
    """The four words of Philox4x32-7 for each block; ``rng_ptr`` holds int64 (seed, offset)."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    zero = tl.zeros_like(block)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    offset_low = (zero + (offset & 0xFFFFFFFF)).to(tl.uint32)
    offset_high = (zero + ((offset >> 32) & 0xFFFFFFFF)).to(tl.uint32)
    return tl.philox(seed, low, high, offset_low, offset_high, n_rounds=7)


@triton.jit
def keep_columns(rng_ptr, rows, start, width, threshold, BLOCK: tl.constexpr, OCTETS: tl.constexpr):
    """Which elements of ``rows`` [M,1] of a tensor with ``width`` columns dropout keeps, from column ``start`` on:
    [M,BLOCK].

    Eight neighbours share a block of random words where ``width`` is a multiple of eight, which ``OCTETS`` says; else a
    block is made for each element.
    """
    rows = rows.to(tl.int64)
    if OCTETS:
        blocks = rows * (width // 8) + (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
        w0, w1, w2, w3 = _philox(rng_ptr, blocks)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M,N,2,2], word 2i + j at [i,j]
        numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (blocks.shape[0], BLOCK))
        keep = numbers.to(tl.int32) >= threshold
    else:
        elements = rows * width + (start + tl.arange(0, BLOCK))[None, :]
        w0, w1, w2, w3 = _philox(rng_ptr, elements // 8)
        number = (elements % 8).to(tl.uint32)
        low, high = tl.where(number < 2, w0, w1), tl.where(number < 6, w2, w3)
        word = tl.where(number < 4, low, high) >> (number % 2 * 16)
        keep = (word & 0xFFFF).to(tl.int32) >= threshold
    return keep


def dropout_threshold(p: float) -> tuple[int, float]:
    """``(threshold, scale)`` as kernels take them: an element is kept, and scaled, iff its number of 16 bits is at
    least the threshold. At p = 1 that is none."""
    threshold = int(p * 2**16 + 0.5)
    return threshold, 2**16 / max(2**16 - threshold, 1)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def program_count(work: int, device: torch.device, per_processor: int) -> int:
    """Programs of a kernel whose programs loop over ``work`` items: what a GPU holds at a time, or fewer."""
    return min(work, 4 if device.type != "cuda" else processors(device) * per_processor)


def register_limit(arch: str, most: int) -> dict[str, int]:
    """Options of a launch that ptxas, left alone, spills some bytes of, to fit in one more program; 0 leaves it."""
    return {"maxnreg": most} if arch.startswith("sm") and most > 0 else {}


def float32_precision() -> str:
    """The precision of float32 matrix products that torch is set to, by whichever of its interfaces.

    torch raises where the older ``allow_tf32`` is read after the newer was set. AMD GPUs get true float32.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if allowed else "ieee"


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous empty tensor of the shape of ``x``."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
