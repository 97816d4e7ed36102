"""Boxes of tensors that the copy engine brings and takes: what lies where, and which maps there are not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from ptx import build, emulator, test_silicon
from ptx.silicon import vectors

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture(scope="module")
def kernels():
    return emulator.load(build.ptx_of(build.HERE / "kernels" / "boxes.cu", "90a"))


def cut(x: torch.Tensor, box: Sequence[int], first: Sequence[int]) -> torch.Tensor:
    """The box of ``x`` that begins at ``first``, with zeros beyond ``x``."""
    for dim, (begin, count) in enumerate(zip(first, box, strict=True)):
        at = torch.arange(begin, begin + count)
        there = ((at >= 0) & (at < x.shape[dim])).view(-1, *[1] * (x.ndim - dim - 1))
        x = torch.where(there, x.index_select(dim, at.clamp(0, x.shape[dim] - 1)), 0)
    return x


def permuted(words: torch.Tensor, swizzle: int) -> torch.Tensor:
    """Words as a swizzle has them, whose shared memory begins at a multiple of 1,024 bytes.

    Of the chunks of 16 bytes in a row of ``swizzle`` bytes, chunk c of the 128 bytes number n lies at c ^ n, of which
    as many bits count as number the chunks.
    """
    bytes = torch.arange(len(words)) * words.element_size()
    moved = bytes ^ ((bytes // 128 % 8 & (swizzle // 16 - 1)) * 16)
    return torch.empty_like(words).index_copy_(0, moved // words.element_size(), words)


BOXES = {  # shape, box, first element, swizzle
    "1d": ((200,), (64,), (40,), 0),
    "1d-end": ((200,), (64,), (170,), 0),
    "2d-swizzle_128": ((70, 56), (32, 64), (40, 0), 128),
    "2d-before_the_beginning": ((70, 56), (16, 64), (-3, -5), 128),
    "2d-swizzle_64": ((40, 64), (24, 32), (7, 16), 64),
    "2d-swizzle_32": ((40, 64), (24, 16), (30, 56), 32),
    "2d-narrow_rows": ((40, 64), (24, 24), (5, 8), 128),
    "3d": ((3, 30, 40), (2, 8, 16), (2, 25, 32), 32),
    "4d": ((2, 3, 40, 64), (1, 1, 32, 64), (1, 2, 4, 0), 128),
    "4d-beyond": ((2, 3, 40, 64), (1, 1, 32, 64), (2, 0, 4, 0), 128),
    "5d": ((2, 2, 3, 5, 24), (2, 1, 2, 3, 16), (1, 1, 2, 3, 16), 0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("name", BOXES)
def test_a_box_is_what_torch_cuts(kernels, name, dtype):
    shape, box, first, swizzle = BOXES[name]
    if swizzle and box[-1] * dtype.itemsize > swizzle:
        box = (*box[:-1], box[-1] // 2)
    x = torch.randint(1, 127, shape).to(dtype)
    out = torch.zeros(math.prod(box) * dtype.itemsize // 4, dtype=torch.int32)
    given = [*reversed(first), 0, 0, 0, 0, 0][:5]
    map = emulator.tensor_map(x, box, swizzle)
    arguments = [map, out, 4 * len(out), *given]
    for options in ({"races": True}, {"seed": 3}):
        with emulator.watch(**options) as findings:
            shared = 4 * len(out) + 1024
            emulator.launch(kernels[f"box_{len(shape)}d"], (1,), (32,), arguments, shared, {"x": x, "out": out})
        assert not findings, findings
        wanted = cut(x, box, first).reshape(-1)
        assert torch.equal(out.view(dtype), permuted(wanted, swizzle or 16))


def test_a_box_of_a_part_of_a_tensor(kernels):
    """Rows with gaps between them, heads that lie beside one another: strides in any order."""
    x = torch.randint(1, 127, (2, 48, 3, 72)).bfloat16()[..., :64].transpose(1, 2)
    out = torch.zeros(32 * 64 // 2, dtype=torch.int32)
    arguments = [emulator.tensor_map(x, (1, 1, 32, 64), 128), out, 4096, 0, 16, 1, 1, 0]
    with emulator.watch(races=True) as findings:
        emulator.launch(kernels["box_4d"], (1,), (32,), arguments, 4096 + 1024, {"x": x, "out": out})
    assert not findings, findings
    assert torch.equal(out.view(torch.bfloat16), permuted(x[1, 1, 16:].reshape(-1), 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("first", [(3, 8), (30, 48), (-5, -8)], ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["store", "add"])
def test_a_box_goes_back(kernels, adds, first, dtype):
    """What goes beyond the matrix goes nowhere, and nothing beside the box changes."""
    x, columns = torch.randint(1, 100, (40, 64)).to(dtype), 128 // dtype.itemsize
    box = torch.randint(1, 100, (16, columns)).to(dtype)
    wanted = x.clone()
    for i in range(16):
        for j in range(columns):
            row, column = first[0] + i, first[1] + j
            if 0 <= row < 40 and 0 <= column < 64:
                wanted[row, column] = box[i, j] + (x[row, column] if adds else 0)
    given = permuted(box.reshape(-1), 128).view(torch.int32)
    map = emulator.tensor_map(x, (16, columns), 128)
    arguments = [map, given, 4 * len(given), *reversed(first)]
    kernel = kernels["add_box" if adds else "store_box"]
    with emulator.watch(races=True, seed=2) as findings:
        emulator.launch(kernel, (1,), (32,), arguments, 4 * len(given) + 1024, {"x": x, "in": given})
    assert not findings, findings
    assert torch.equal(x, wanted)


def test_words_of_16_bits_are_not_added(kernels):
    x, given = torch.ones(40, 64, dtype=torch.int16), torch.zeros(512, dtype=torch.int32)
    with emulator.watch() as findings:
        arguments = [emulator.tensor_map(x, (16, 64), 128), given, 2048, 0, 0]
        emulator.launch(kernels["add_box"], (1,), (32,), arguments, 2048 + 1024, {"x": x, "in": given})
    assert len(findings) == 1, findings
    assert "no sums of elements" in findings[0]


def test_sectors_are_counted_once(kernels):
    x, out = torch.ones(64, 64).bfloat16(), torch.zeros(32 * 64 // 2, dtype=torch.int32)
    arguments = [emulator.tensor_map(x, (32, 64), 128), out, 4096, 0, 8, 0, 0, 0]
    with emulator.watch(counts=True):
        emulator.launch(kernels["box_2d"], (1,), (32,), arguments, 4096 + 1024, {"x": x, "out": out})
        uses = [use for use in emulator.uses() if use.tensor == "x"]
    assert sum(use.moved for use in uses) == 32 * 64 * 2 // 32


ASKED = [(0, 0, 0, 8), (32, 0, 8, 30), (64, 0, -3, -5), (96, 1, 32, 30), (128, 2, 48, 4), (160, 3, 24, 33)]


@pytest.mark.parametrize(("slot", "map", "column", "row"), ASKED)
def test_the_boxes_that_a_gpu_is_asked_for(slot, map, column, row):
    """Those of silicon/vectors.cu, until one has been asked; behind a box memory is as it was."""
    map = vectors.MAPS[map]
    matrix = test_silicon.given("boxes").view(torch.int16)[:, : map.columns]
    wanted = permuted(cut(matrix, map.box, (row, column)).reshape(-1), map.swizzle or 16).view(torch.int32)
    found = test_silicon.of_runner("boxes")[slot : slot + 32].reshape(-1)
    assert torch.equal(found[: len(wanted)], wanted)
    assert (found[len(wanted) :] == 0xA5A5A5A5 - 2**32).all()


def test_a_map_of_whole_chunks():
    assert len(emulator.tensor_map(torch.ones(8, 60), (8, 60))) == 128  # strides and box of 240 bytes


@pytest.mark.parametrize(
    ("x", "box", "swizzle"),
    [
        (torch.ones(8, 61), (8, 60), 0),
        (torch.ones(8, 64)[:, 1:], (8, 32), 0),
        (torch.ones(8, 64), (8, 30), 0),
        (torch.ones(8, 64), (8, 64), 128),
        (torch.ones(1, 64).expand(8, 64), (8, 32), 128),
        (torch.ones(300, 4), (300, 4), 0),
    ],
    ids=["stride", "begins", "row", "wider_than_the_swizzle", "same_rows", "rows"],
)
def test_maps_there_are_not(x, box, swizzle):
    with pytest.raises(ValueError, match=r"no tensor map of \["):
        emulator.tensor_map(x, box, swizzle)
