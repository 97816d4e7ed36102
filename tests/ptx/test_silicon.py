"""The runner against a GPU: the words that silicon/record.py wrote down, and those of the same kernels run here.

All but the approximate functions must be equal, word for word; a NaN is a NaN, though a GPU only makes 0x7fffffff (of
16 bits 0x7fff), and the runner any. That goes for matrix multiplications too: runtime/products.h computes what an H200
does. Of the 12288 words that mma.sync gave it gets none wrong; with 24 bits kept in place of 25 it would get every
eighth wrong, with 26 every seventeenth, with the products of either half of K by themselves every sixth.

What a GPU does besides, and the runner with it: .ftz flushes what is subnormal before it is rounded; .sat makes +0 of
-0; cvt.rna.tf32 makes infinity of a NaN whose upper bits are zeros; what is left of a division by 0 is ~0;
atom.add.f32 flushes subnormal numbers in global memory, but not in shared memory.

Of the approximate functions the PTX ISA says how far off they may be, which goes for both. The runner's are correctly
rounded; by how much the H200's are off at worst stands beside the bounds.
"""

from __future__ import annotations

import base64
import json
import lzma
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptx import build, emulator
from ptx.silicon import vectors

RECORDED = sorted((build.HERE.parent / "recorded").glob("silicon-*.json"))

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.skipif(not RECORDED, reason="no tests/recorded/silicon-*.json: tests/ptx/silicon/record.py makes one"),
    pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem.removeprefix("silicon-")),
]


@cache
def recording(path: Path) -> dict:
    return json.loads(path.read_text())


def missing(path: Path) -> set[str]:
    return vectors.KERNELS.keys() - recording(path)["kernels"].keys()


@cache
def of_silicon(path: Path, name: str) -> Tensor:
    """The recorded words, [slots, threads]."""
    if name in missing(path):
        pytest.skip("no GPU has been at hand since this kernel was written: tests/ptx/silicon/record.py")
    record, kernel = recording(path)["kernels"][name], vectors.KERNELS[name]
    assert record["inputs"] == vectors.digest(kernel.words), "recorded with other inputs: record again"
    assert record["instructions"] == {str(slot): text for slot, text in vectors.instructions(name).items()}
    words = bytearray(lzma.decompress(base64.b85decode(record["outputs"])))
    return torch.frombuffer(words, dtype=torch.int32).view(kernel.outputs, kernel.threads)


@cache
def given(name: str) -> Tensor:
    kernel = vectors.KERNELS[name]
    return torch.frombuffer(bytearray(kernel.words.tobytes()), dtype=torch.int32).view(-1, kernel.threads)


@cache
def of_runner(name: str) -> Tensor:
    kernel = vectors.KERNELS[name]
    out = torch.zeros(kernel.outputs, kernel.threads, dtype=torch.int32)
    translated = emulator.translated(build.ptx_of(vectors.SOURCE, "90a"), name)
    matrix = given(name).view(torch.int16)
    maps = [emulator.tensor_map(matrix[:, : map.columns], map.box, map.swizzle) for map in kernel.maps]
    with emulator.watch() as findings:
        emulator.launch(translated, (kernel.threads // kernel.block,), (kernel.block,), [given(name), out, *maps])
    assert not findings, findings
    return out


def test_everything_is_recorded(path):
    assert not recording(path)["failed"]
    assert missing(path) <= vectors.AWAITED
    assert recording(path)["kernels"].keys() <= vectors.KERNELS.keys()


# -- words

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES |= {f"{name}x2": TYPES[name] for name in ("f16", "bf16")}


def result_type(instruction: str) -> str:
    parts = instruction.split(".")
    return parts[-2] if parts[0] == "cvt" else parts[-1]


def with_one_nan(words: Tensor, type: str) -> Tensor:
    """Words, or both halves of words of 16-bit floats, with the GPU's NaN for every NaN."""
    if type not in TYPES:
        return words
    floats = words.view(TYPES[type])
    whole = torch.int32 if type == "f32" else torch.int16
    return torch.where(floats.isnan(), torch.iinfo(whole).max, floats.view(whole)).view(torch.int32)


def difference(path: Path, kernel: str, slot: int, instruction: str) -> str:
    """Where silicon and runner differ in a slot, as inputs and outputs; empty if they do not."""
    silicon, runner = (
        with_one_nan(words[slot], result_type(instruction)) for words in (of_silicon(path, kernel), of_runner(kernel))
    )
    wrong = (silicon != runner).nonzero().flatten().tolist()
    shown = [
        f"of {_hex(given(kernel)[:, i])} silicon has {_hex(silicon[i : i + 1])}, the runner {_hex(runner[i : i + 1])}"
        for i in wrong[:3]
    ]
    return f"slot {slot}, {instruction}: {len(wrong)} of {len(silicon)}; {'; '.join(shown)}" if wrong else ""


def _hex(words: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.tolist())


def instruction_of_each_slot(kernel: str) -> list[str]:
    """An instruction's further results follow its first."""
    named, current = vectors.instructions(kernel), ""
    return [current := named.get(slot, current) for slot in range(vectors.KERNELS[kernel].outputs)]


ROUNDED = ("approximate", "approximate_pairs", "divide")


@pytest.mark.parametrize("kernel", [name for name in vectors.KERNELS if name not in ROUNDED])
def test_words_are_equal(path, kernel):
    found = [difference(path, kernel, *each) for each in enumerate(instruction_of_each_slot(kernel))]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(
    ("kernel", "slot", "instruction"),
    [(name, *each) for name in ROUNDED for each in vectors.instructions(name).items() if ".rn." in each[1]],
)
def test_correctly_rounded_words_are_equal(path, kernel, slot, instruction):
    assert not difference(path, kernel, slot, instruction)


# -- where the operands of a warpgroup's products lie


def along_k(i: int, k: int, row: int, leading: int, stride: int) -> int:
    """Where element k of row i of a left operand, or of column i of a right one, lies before the swizzle.

    ``row``: bytes among which chunks are permuted; 16: they are not.
    """
    chunk = k // 8 * (leading if row == 16 else 16)
    return i // 8 * stride + i % 8 * row + chunk + k % 8 * 2


def across_k(i: int, k: int, row: int, leading: int, stride: int) -> int:
    """The same of operands that lie turned: rows of K's terms hold what differs in i."""
    group, inside = divmod(i, row // 2)
    of_group, of_k = (stride, leading) if row == 16 else (leading, stride)
    return group * of_group + inside * 2 + k // 8 * of_k + k % 8 * row


def swizzled(place: int, row: int) -> int:
    """Rows of 128 bytes: chunk c of row r of eight lies at c ^ r; of 64, c ^ r / 2 of four; of 32, c ^ r / 4 of two."""
    chunks = row // 16
    r, c = place // row % 8, place % row // 16
    return place // row * row + (c ^ r * chunks // 8) * 16 + place % 16


LAYOUTS = {  # slot: (place, begin, bytes of a row, leading, stride) as vectors.cu has it
    0: (along_k, 0, 16, 2048, 128),
    64: (along_k, 0, 32, 16, 256),
    128: (along_k, 32, 64, 16, 512),
    192: (along_k, 96, 128, 16, 1024),
    256: (across_k, 0, 16, 2048, 128),
    320: (across_k, 0, 32, 512, 256),
    384: (across_k, 0, 64, 1024, 512),
    448: (across_k, 2048, 128, 4096, 1024),
    512: (along_k, 64, 128, 16, 1024),
    520: (across_k, 0, 128, 16, 1024),
    528: (across_k, 0, 64, 1024, 512),
}


def read_operand(words: Tensor, slot: int) -> Tensor:
    """The operand of a slot, [rows or columns, k], as its product with the identity matrix."""
    columns = 128 if slot < 512 else 16
    lanes = words[slot : slot + columns // 2].view(torch.float32).view(columns // 8, 2, 2, 4, 8, 4)
    product = lanes.permute(3, 1, 4, 0, 5, 2).reshape(64, columns)  # [warp, half, row of eight; group, lane, column]
    return product[:16].T if slot < 512 else product


@pytest.mark.parametrize("slot", LAYOUTS)
@pytest.mark.parametrize("of_whom", [of_silicon, lambda path, name: of_runner(name)], ids=["silicon", "runner"])
def test_operands_lie_as_the_ptx_isa_says(path, of_whom, slot):
    """ "Asynchronous Warpgroup Level Matrix Shared Memory Layout"."""
    place, begin, row, leading, stride = LAYOUTS[slot]
    found = read_operand(of_whom(path, "operands"), slot)
    places = [[swizzled(begin + place(i, k, row, leading, stride), row) for k in range(16)] for i in range(len(found))]
    memory = given("operands").flatten().view(torch.float16)
    assert torch.equal(found, memory[torch.tensor(places) // 2].float())


# -- approximate functions

MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST = {torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}  # exponents of normal numbers
Bound = Callable[[Tensor, Tensor, torch.dtype], Tensor]  # of x, f(x) and the type: how far off the result may be


def unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of numbers of the type about ``exact``."""
    exponent = exact.frexp().exponent - 1
    return 2.0 ** (exponent.clamp(min=SMALLEST[dtype]) - MANTISSA[dtype]).double()


def units(n: float) -> Bound:
    return lambda x, exact, dtype: n * unit(exact, dtype)


def relative(exponent: float) -> Bound:
    return lambda x, exact, dtype: exact.abs() * 2**exponent


def absolute(exponent: float) -> Bound:
    return lambda x, exact, dtype: torch.full_like(exact, 2**exponent)


def of_halves(x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Relative to normal numbers; of subnormal ones, whose relative distance is more than the bound, their distance."""
    return relative(-9.9)(x, exact, dtype).maximum(torch.tensor(2.0 ** (SMALLEST[dtype] - MANTISSA[dtype])))


def of_logarithm(x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where((x > 0.5) & (x < 2), 1.0, exact.abs()) * 2**-22


def of_angle(x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Beyond 100 pi nothing is promised; no sine or cosine is off by more than 2."""
    far = torch.where(x.abs() <= 100 * math.pi, 2**-14.7, 2.0)
    return torch.where(x.abs() <= 2 * math.pi, 2**-20.5, far)


def fast_quotient(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y.abs() > 2.0**126, x * torch.zeros_like(y).copysign(y), x / y)


# What the PTX ISA promises, and behind it the worst of the H200; "2 ulp" are 2 from the correctly rounded value.
APPROXIMATE: dict[str, tuple[Callable[..., Tensor], Bound]] = {
    "ex2.approx.f32": (torch.exp2, units(2.5)),  # 1.77 units
    "lg2.approx.f32": (torch.log2, of_logarithm),  # 2^-22.4, beyond 2^-22.9
    "rcp.approx.f32": (torch.reciprocal, units(1)),  # 0.90
    "rsqrt.approx.f32": (torch.rsqrt, relative(-22.9)),  # 2^-23.1, 1.20 units
    "sqrt.approx.f32": (torch.sqrt, relative(-23)),  # 2^-23.4, 0.88 units
    "tanh.approx.f32": (torch.tanh, relative(-11)),  # 2^-16.5, 120 units
    "sin.approx.f32": (torch.sin, of_angle),  # 2^-20.7, beyond 2^-15.3; of a subnormal number 0
    "cos.approx.f32": (torch.cos, of_angle),  # 2^-20.8, beyond 2^-15.1
    "div.approx.f32": (fast_quotient, units(2)),  # 1.50
    "div.full.f32": (torch.div, units(2)),  # 1.50
    # These cut off what 16 bits cannot hold, so that most are off by up to a unit.
    "ex2.approx.f16x2": (torch.exp2, of_halves),  # 2^-10.0
    "tanh.approx.f16x2": (torch.tanh, absolute(-10.987)),  # 2^-11.0
    "ex2.approx.bf16x2": (torch.exp2, relative(-7)),  # 2^-7.1
    "tanh.approx.bf16x2": (torch.tanh, absolute(-7.999)),  # the promise is 2^-8, and 0.74609375 misses it by 2^-22
}


def operands(kernel: str, slot: int, dtype: torch.dtype, flush: Callable[[Tensor], Tensor]) -> list[Tensor]:
    words = given(kernel)[:2] if kernel == "divide" else given(kernel)[slot : slot + 1]
    return [flush(x.view(dtype).double()) for x in words]


@pytest.mark.parametrize(
    ("kernel", "slot", "instruction"),
    [(name, *each) for name in ROUNDED for each in vectors.instructions(name).items() if ".rn." not in each[1]],
)
def test_approximations(path, kernel, slot, instruction):
    """Zeros, infinities and NaN are what the exact result is, the rest is within bounds."""
    dtype = TYPES[result_type(instruction)]
    function, bound = APPROXIMATE[instruction.replace(".ftz", "")]

    def flush(x: Tensor) -> Tensor:
        subnormal = (x.abs() < 2.0 ** SMALLEST[dtype]) & (".ftz" in instruction)
        return torch.where(subnormal, torch.zeros_like(x).copysign(x), x)

    x = operands(kernel, slot, dtype, flush)
    exact = flush(function(*x))
    definite = (exact == 0) | ~exact.to(dtype).isfinite()
    half_a_unit = units(0.500001)(x[0], exact, dtype)
    for who, words, allowed in (
        ("silicon", of_silicon(path, kernel), bound(x[0], exact, dtype)),
        ("the runner", of_runner(kernel), half_a_unit),
    ):
        found = words[slot].view(dtype)
        same = (found == exact.to(dtype)) & (found.signbit() == exact.signbit()) | found.isnan() & exact.isnan()
        near = (found.double() - exact).abs() <= allowed
        wrong = torch.where(definite, ~same, ~near).nonzero().flatten().tolist()
        assert not wrong, f"{who}: " + "; ".join(
            f"{instruction} of {[each[i].item() for each in x]} is {found[i].item()}" for i in wrong[:5]
        )
