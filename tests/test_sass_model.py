"""The model of a multiprocessor: what it must say of loops that bound themselves, and which loops it finds."""

from __future__ import annotations

import cuda_table
import pytest
import sass
import sass_model
from sass import NO_SCOREBOARD, Instruction


def loop(*texts: str, stall: int = 1) -> list[Instruction]:
    return [Instruction(16 * i, text, stall, NO_SCOREBOARD, NO_SCOREBOARD, ()) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "stall", "clocks"),
    [
        ("HMMA.16816.F32.BF16 R0, R4, R6, R0", 1, 2 * 6.2),  # two warps share a scheduler's tensor core
        ("LDSM.16.M88.4 R0, [R4]", 1, 8 * 4),  # and eight the shared memory
        ("FFMA R0, R1, R2, R3", 1, 2),  # two warps share a scheduler
        ("FFMA R0, R1, R2, R3", 4, 4),  # which then waits for either
    ],
)
def test_a_loop_takes_what_its_scarcest_unit_takes(text, stall, clocks):
    path = loop("BAR.SYNC 0x0", *[text] * 400, stall=stall)
    assert sass_model.Multiprocessor([path], blocks=2).run() / 400 == pytest.approx(clocks, rel=0.1)


def test_the_shortest_way_around_skips_what_a_branch_skips():
    code = loop("BAR.SYNC 0x0", "@P0 BRA 0x30", "FADD R0, R0, R1", "HMMA R0, R4, R6, R0", "@P1 BRA 0x0", "EXIT")
    assert [x.unit for x in sass.shortest_loop(code, code[0])] == ["BAR", "BRA", "HMMA", "BRA"]
    assert sass.shortest_loop(code, code[-1]) == []


def test_two_warpgroups_that_take_turns_fill_tensor_cores():
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"
    softmax = ["FFMA R0, R1, R2, R3"] * 400
    turn, end = loop("BAR.SYNC R2, 0x100", "BAR.ARV R0, 0x100"), "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    path = [turn[0], *loop(*[product] * 15, f"{product}, gsb0"), turn[1], *loop(*softmax, end)]
    clocks = sass_model.Multiprocessor([path], 1, warps=8, taking_turns=True).run()
    assert clocks == pytest.approx(2 * 16 * 64, rel=0.05), "a softmax beside the other's products"
    alone = [x for x in path if x.unit != "BAR"]
    assert sass_model.Multiprocessor([alone], 1).run() == pytest.approx(16 * 64, rel=0.05), "of one warpgroup"


@pytest.mark.parametrize("groups", [2, 3])
def test_warpgroups_that_take_turns_are_never_at_it_together(groups):
    turn = loop("BAR.SYNC R2, 0x100", "BAR.ARV R0, 0x100")
    path = [turn[0], *loop(*["FFMA R0, R1, R2, R3"] * 200, stall=4), turn[1]]
    clocks = sass_model.Multiprocessor([path], 1, warps=4 * groups, taking_turns=True).run()
    assert clocks == pytest.approx(groups * 200 * 4, rel=0.05)


def test_who_has_given_a_turn_still_waits_for_its_own():
    wait, give = loop("BAR.SYNC R2, 0x100", "BAR.ARV R0, 0x100")
    model = sass_model.Multiprocessor([[wait, give]], 1, warps=8, taking_turns=True)
    first, second = model.warps[:4], model.warps[4:]
    model.met.clear()
    for warps, instruction in ((second, give), (second, wait), (first, wait)):
        for warp in warps:
            model._meet(warp, instruction, 0)
    assert not any(warp.at_barrier for warp in first)
    assert all(warp.at_barrier for warp in second)


@pytest.mark.skipif(cuda_table.missing() is not None, reason=str(cuda_table.missing()))
def test_the_loop_of_warpgroups_is_found():
    name = "attention_fwd_sm90_kernel<bf16, 128>"
    assert sass_model.computing_warps(sass.kernel(sass_model.ARCH, name)) == 8
    (found,) = sass_model.loops(name)
    assert sum(sass_model.columns(x) for x in found if x.unit == "HGMMA") == 128 * (128 + 128) / 16
    assert sum(x.unit == "MUFU" for x in found) == 64 + 2  # of 128 keys and two rows, and what rescales


@pytest.mark.skipif(cuda_table.missing() is not None, reason=str(cuda_table.missing()))
@pytest.mark.parametrize(
    ("name", "warps", "products"),
    [
        ("attention_fwd_kernel<bf16, 128, false>", 1, 2 * 2 * 4 * 8),  # two, of 2 x 4 fragments and 8 steps
        ("attention_bwd_key_kernel<bf16, 128>", 2, 2 * 2 * 4 * 8),
        ("attention_bwd_query_kernel<bf16, 128>", 1, 3 * 1 * 4 * 8),
    ],
)
def test_main_loops_are_found(name, warps, products):
    loops = sass_model.loops(name)
    assert [sum(x.unit == "HMMA" for x in loop) for loop in loops] == [products] * warps
    assert all(any(x.unit == "LDGSTS" for x in loop) for loop in loops), "the copies are part of it"
