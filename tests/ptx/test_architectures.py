"""The PTX for compute capability 9.0 is the one for 8.0 but for one instruction: what holds of one holds of both.

nvcc widens bfloat16 with ``cvt.f32.bf16`` where there is one, and by moving the bits where there is not. The runner
translates the kernels in the words of 8.0 (``build.in_words_of_80``).
"""

from __future__ import annotations

import pytest
import torch

from ptx import build, emulator

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def test_the_kernels_differ_in_one_instruction():
    of_80, *others = build.module()[1].values()
    for other in others:
        assert any("cvt.f32.bf16" in text for text in other), "nothing is left to rewrite"
        for old, new in zip(of_80, other[: len(of_80)], strict=True):  # behind them, what only the other has
            pairs = enumerate(zip(old.splitlines(), build.in_words_of_80(new).splitlines(), strict=True), 1)
            assert not [(number, *pair) for number, pair in pairs if pair[0] != pair[1]][:1]


WIDEN = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry widen(.param .u64 x, .param .u64 y) {{
  .reg .b16 %rs<2>;
  .reg .b32 %r<4>;
  .reg .f32 %f<2>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [x];
  ld.param.u64 %rd2, [y];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %tid.x;
  mad.lo.s32 %r3, %r1, 1024, %r2;
  mul.wide.s32 %rd3, %r3, 2;
  add.s64 %rd1, %rd1, %rd3;
  mul.wide.s32 %rd4, %r3, 4;
  add.s64 %rd2, %rd2, %rd4;
  ld.global.u16 %rs1, [%rd1];
  {}
  st.global.f32 [%rd2], %f1;
  ret;
}}
"""


def test_both_ways_to_widen_are_the_same():
    statement = "cvt.f32.bf16 %f1, %rs1;"
    texts = [WIDEN.format(statement), build.in_words_of_80(WIDEN.format(statement))]
    assert statement not in texts[1]
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for text in texts:
        y = torch.zeros(2**16)
        with emulator.watch() as findings:
            emulator.launch(emulator.translated(text, "widen"), (64,), (1024,), [x, y])
        assert not findings, findings
        torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)
