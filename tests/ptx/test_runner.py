"""The runner with kernels that are right: results, silence of the detectors, counts, and loud stops."""

from __future__ import annotations

import pytest
import torch

from ptx import build, emulator
from ptx.cases import CASES, HOPPER_ALONE, source
from ptx.translate import UnsupportedError, parse, translate

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture(scope="module", params=build.ARCHS)
def kernels(request):
    files = {file for file, _ in CASES.values() if request.param == "90a" or file not in HOPPER_ALONE}
    texts = [build.ptx_of(build.HERE / "kernels" / file, request.param) for file in sorted(files)]
    return {name: kernel for text in texts for name, kernel in emulator.load(text).items()}


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"races": True}, {"races": True, "seed": 2}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_silence(kernels, name, options):
    if name not in kernels:
        pytest.skip("these instructions came with compute capability 9.0")
    with emulator.watch(**options) as findings:
        off = CASES[name][1](kernels[name])
    assert not findings, findings
    assert max(off.values()) <= 1, off


def test_numbers(kernels):
    n = 32
    x = torch.cat([torch.randn(n - 4) * 3, torch.tensor([0.5, -80.0, 60.0, 1e-3])])
    k = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int64)
    y, pairs, words = torch.zeros(n, 8), torch.zeros(n, 2).bfloat16(), torch.zeros(n, 4, dtype=torch.int32)
    with emulator.watch() as findings:
        emulator.launch(kernels["numbers"], (1,), (n,), [x, k.int(), y, pairs, words])
    assert not findings, findings
    d, magnitude = x.double(), x.double().abs()
    wanted = torch.stack(
        [
            d.exp2(),
            d.tanh(),
            d.erf(),
            d.exp(),
            x.half().double(),
            x.bfloat16().double(),
            (k.div(7, rounding_mode="trunc") + k.fmod(7)).double() + (k % 2**32).div(5, rounding_mode="trunc").double(),
            magnitude.rsqrt() + magnitude.log() + magnitude.sqrt() + d / 3,
        ],
        1,
    )
    torch.testing.assert_close(y.double(), wanted, rtol=3e-6, atol=1e-30)
    pair = torch.stack([x.bfloat16(), (-x).bfloat16()], 1).double()
    torch.testing.assert_close(pairs, (pair * pair + torch.tensor([1.0, 0.25])).bfloat16(), rtol=0, atol=0)
    unsigned = k % 2**32
    high = torch.tensor([(0xD2511F53 * v) >> 32 for v in unsigned.tolist()])
    assert torch.equal(words[:, 0].long() % 2**32, high)
    bits = [format(v, "032b") for v in unsigned.tolist()]
    counted = [b.count("1") + len(b) - len(b.lstrip("0")) + (32 - b.rindex("1") if "1" in b else 0) for b in bits]
    assert words[:, 1].tolist() == counted
    ballot = sum(1 << i for i, v in enumerate(x.tolist()) if v > 0)
    extra = [1 << i for i in range(n)]
    assert [w % 2**32 for w in words[:, 3].tolist()] == [(ballot + e) % 2**32 for e in extra]


def test_counts_of_the_matrix_multiplication(kernels):
    with emulator.watch(counts=True):
        CASES["matmul"][1](kernels["matmul"])
        uses = emulator.uses()
    shared = [use for use in uses if use.space == "shared"]
    assert {use.bytes for use in shared} == {16}
    assert all(use.moved == use.ideal for use in shared), "the swizzled tiles have no bank conflicts"
    wanted = sum(use.ideal for use in uses if use.space == "global")
    assert sum(use.moved for use in uses if use.space == "global") == wanted, "whole sectors are read and written"


def test_counts_of_a_strided_read():
    text = source("basics.cu").replace("x[i] + y[i]", "x[i * 8 % n] + y[i]")
    kernel = emulator.translated(build.ptx_of(build.HERE / "kernels" / "basics.cu", "80", text=text), "axpy")
    x = torch.randn(1024)
    with emulator.watch(counts=True):
        emulator.launch(kernel, (8,), (128,), [x, torch.zeros(1024), 1.0, 1024])
        moved = sorted(use.moved / use.requests for use in emulator.uses())
    assert moved == [4, 4, 32]  # sectors to a request: a store and a load side by side, a load with a stride


BODY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p) {{
  .reg .b32 %r<4>;
  .reg .b64 %rd<4>;
  .reg .pred %p<2>;
  {}
  ret;
}}
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("tex.2d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [%rd0, {%r0, %r1}];", "the opcode tex"),
        ("add.sat.s32 %r0, %r1, %r2;", ".sat of s32"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r0}, {%r1}, {%r2}, {%r3};", "this shape and these types"),
        ("mov.u32 %r0, %clusterid.w;", "the register %clusterid.w"),
        ("call.uni vprintf, (%rd0);", "the opcode call"),
    ],
)
def test_what_is_not_known_stops_with_its_line(statement, message):
    with pytest.raises(UnsupportedError, match="k, PTX line 9") as caught:
        translate(parse(BODY.format(statement)), "k")
    assert message in str(caught.value)


def test_an_endless_loop_is_found():
    ptx = BODY.format(
        "L0: ld.param.u64 %rd0, [p]; ld.volatile.global.u32 %r0, [%rd0]; setp.eq.u32 %p0, %r0, 0; @%p0 bra L0;"
    )
    kernel = emulator.translated(ptx, "k")
    emulator.library().ptx_set_patience(1000)
    with emulator.watch() as findings:
        emulator.launch(kernel, (1,), (1,), [torch.zeros(1, dtype=torch.int32)])
    emulator.library().ptx_set_patience(0)
    assert len(findings) == 1, findings
    assert findings[0].startswith("endless at line (PTX line 9: `@%p0 bra L0`)"), findings
