"""Planted faults: each breaks one of the runner's kernels in a way that kernels are broken, and must be noticed.

A fault is a replacement in the source. ``noticed`` names what must notice it: a kind of finding, with detectors on,
or ``result``, where only the numbers are wrong. All broken kernels are compiled by one run of nvcc, each in a namespace
of its own, for each architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from ptx import build, emulator
from ptx.cases import CASES, HOPPER_ALONE, source

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@dataclass(frozen=True)
class Fault:
    kernel: str
    what: str
    old: str
    new: str
    noticed: str
    count: int = 1  # how many of the occurrences are replaced, from the first


SYNC = "__syncthreads();"
FAULTS = [
    Fault("axpy", "one element too many", "i < n", "i <= n", "out-of-bounds"),
    Fault("axpy", "stored one further", "y[i] =", "y[i + 1] =", "race"),
    Fault("axpy", "every block the same", "blockIdx.x * blockDim.x + threadIdx.x", "threadIdx.x", "race"),
    Fault("axpy", "the wrong operand", "a * x[i]", "a + x[i]", "result"),
    Fault("row_sums", "no barrier before the partial sums are read", SYNC, "", "race"),
    Fault("row_sums", "a barrier for half of the block", SYNC, "if (threadIdx.x < 64) __syncthreads();", "race"),
    Fault("row_sums", "one column too many", "i < columns", "i <= columns", "out-of-bounds"),
    Fault("row_sums", "partial sums stored past the array", "partial[warp]", "partial[warp + 31]", "out-of-bounds"),
    Fault("row_sums", "partial sums stored elsewhere", "partial[warp]", "partial[warp + 4]", "uninitialised"),
    Fault("row_sums", "a butterfly that stops early", "distance = 16", "distance = 8", "result"),
    Fault("row_sums", "a mask without the upper lanes", "__shfl_xor_sync(~0u", "__shfl_xor_sync(0xffffu", "mask"),
    Fault("row_sums", "a shuffle in a branch", "if (warp == 0) {", "if (warp == 0 && lane < 8) {", "deadlock"),
    Fault("last_block_sum", "no fence before the count", "__threadfence();", "", "race"),
    Fault("last_block_sum", "no fence after the count", "__threadfence();  // before: all", "// before: all", "race"),
    Fault("last_block_sum", "the counter is not reset", "*finished = 0;", "", "result"),
    Fault("last_block_sum", "no barrier in the loop", "+ half];\n    __syncthreads();", "+ half];", "race"),
    Fault("last_block_sum", "no barrier before the loop", ": 0.0f;\n  __syncthreads();", ": 0.0f;", "race"),
    Fault("last_block_sum", "no barrier before the flag is read", "  __syncthreads();\n  if (la", "  if (la", "race"),
    Fault("last_block_sum", "the count is not atomic", "atomicAdd(finished, 1u)", "(*finished)++", "race"),
    Fault("last_block_sum", "nobody is the last", "gridDim.x - 1", "gridDim.x", "result"),
    Fault("hand_over", "nobody waits for an empty slot", "if (r >= 2) asm", "if (r >= 99) asm", "barrier"),
    Fault("hand_over", "the slot is never full", "(1 + slot) : \"memory\");  // ", "(9 + slot)); //", "deadlock"),
    Fault("hand_over", "a barrier of one warp", 'arrive %0, 64;" ::"r"(1', 'arrive %0, 32;" ::"r"(1', "deadlock"),
    Fault("hand_over", "one slot for all", "slot = r & 1", "slot = 0", "barrier"),
    Fault("hand_over", "reads past its row", "(lane + 1) & 31", "lane + 1", "result"),
    Fault("matmul", "the copies are not waited for", "wait<1>()", "wait<2>()", "race"),
    Fault("matmul", "the last copies are not waited for", "wait<0>()", "wait<1>()", "race"),
    Fault("matmul", "the copies are not committed", "    commit();\n", "", "race"),
    Fault("matmul", "no barrier when the stage is full", "__syncthreads();  // the stage is full", "", "race"),
    Fault("matmul", "no barrier before the stage is overwritten", "__syncthreads();  // the stage may", "// ", "race"),
    Fault("matmul", "fetches into the stage in use", "(k0 + depth, stage ^ 1)", "(k0 + depth, stage)", "race"),
    Fault("matmul", "fragments of A swapped", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', "result"),
    Fault("matmul", "fragments of B swapped", "b[0], b[1])", "b[1], b[0])", "result"),
    Fault("matmul", "B is not transposed", "m8n8.x4.trans.", "m8n8.x4.", "result"),
    Fault("matmul", "read without the permutation", "b_at(k + (lane & 15), n", "b_at(k, n", "result"),
    Fault("matmul", "a source off by an element", "+ k0 + (i & 3) * 8", "+ k0 + (i & 3) * 8 + 1", "misaligned"),
    Fault("matmul", "a store off by an element", "+ (lane & 3) * 2;", "+ (lane & 3) * 2 + 1;", "misaligned"),
    Fault("matmul", "one tile of K too many", "k0 + depth < K) fetch", "k0 < K) fetch", "out-of-bounds"),
    Fault("matmul_warpgroup", "no fence between the proxies", '    asm volatile("fence.proxy.async', "  // ", "proxy"),
    Fault("matmul_warpgroup", "no fence before the products", '    asm volatile("wgmma.fence', "    // ", "wgmma"),
    Fault("matmul_warpgroup", "products not committed", '    asm volatile("wgmma.commit', "    // ", "race"),
    Fault("matmul_warpgroup", "products not waited for", "sync.aligned 1;", "sync.aligned 2;", "race"),
    Fault("matmul_warpgroup", "sums stored before they are there", "sync.aligned 0;", "sync.aligned 1;", "result"),
    Fault("matmul_warpgroup", "copies not waited for", "cp.async.wait_group 0", "cp.async.wait_group 1", "race"),
    Fault("matmul_warpgroup", "no barrier when the stage is full", "__syncthreads();  // the stage", "//", "race"),
    Fault("matmul_warpgroup", "no barrier before it is overwritten", "__syncthreads();  // the prod", "//", "race"),
    Fault("matmul_warpgroup", "B is not turned", '"1, 0, 1;"', '"1, 0, 0;"', "result"),
    Fault("matmul_warpgroup", "another swizzle", "uint64_t(1) << 62", "uint64_t(2) << 62", "result"),
    Fault("matmul_warpgroup", "groups of rows too near", "(1024 >> 4)", "(512 >> 4)", "result"),
    Fault("matmul_warpgroup", "an operand past the end", "b_tiles[stage]) + k", "b_tiles[2]) + k", "out-of-bounds"),
    Fault("matmul_warpgroup", "one warp brings another tile", "a_tiles[stage]) + k", "a_tiles[warp & 1]) + k", "wgmma"),
    Fault("column_sums", "no fence for the barriers", 'asm volatile("fence.proxy.async', "// ", "proxy"),
    Fault("column_sums", "no bytes announced", "_expecting(full + slot, tile_bytes)", "(full + slot)", "race"),
    Fault("column_sums", "too few bytes announced", "full + slot, tile_bytes", "full + slot, 64", "deadlock"),
    Fault("column_sums", "the tile is not waited for", "wait(full + slot, turn);", "", "uninitialised"),
    Fault("column_sums", "the other phase is waited for", "slot, turn)", "slot, !turn)", "uninitialised"),
    Fault("column_sums", "a slot is filled that is in use", "wait(empty + slot, turn ^ 1);", "", "race"),
    Fault("column_sums", "a slot is never free", "    arrive(empty + slot);\n", "", "deadlock"),
    Fault("column_sums", "bytes counted elsewhere", "tile_rows, full + slot)", "tile_rows, full)", "deadlock"),
    Fault("column_sums", "a tile nobody waits for", "adding && i < tiles", "adding && i <= tiles", "bulk"),
    Fault("column_sums", "a slot off its alignment", "load_box(tile[slot]", "load_box(tile[slot] + 64", "misaligned"),
    Fault("column_sums", "a slot too many", "load_box(tile[slot]", "load_box(tile[slot + 1]", "out-of-bounds"),
    Fault("column_sums", "the box below", "&map, 0, i * tile_rows", "&map, 0, i * tile_rows + 1", "result"),
    Fault("column_sums", "read without the permutation", "column / 8 ^ row % 8", "column / 8", "result"),
    Fault("add_matrices", "words that the engine is not shown", 'asm volatile("fence.proxy.async', "// ", "proxy"),
    Fault("add_matrices", "a slot written that is being read", "wait_group.read 1", "wait_group.read 2", "race"),
    Fault("add_matrices", "no barrier when the slot is read", "__syncthreads();  // the slot has", "//", "race"),
    Fault("add_matrices", "no barrier when the slot is full", "__syncthreads();  // the slot is", "//", "race"),
    Fault("add_matrices", "one slot for all", "tile[i % slots]", "tile[0]", "race"),
    Fault("add_matrices", "ends before all is read", "wait_group 0", "wait_group 1", "bulk"),
    Fault("add_matrices", "stored and not added", "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile",
          "cp.async.bulk.tensor.2d.global.shared::cta.tile", "result"),
    Fault("add_matrices", "every block the same rows", "blockIdx.x * tile_rows", "0 * tile_rows", "result"),
    Fault("column_sums", "no map where it is looked for", "tile[slot], &map,", "tile[slot], (&map) + 1,", "bulk"),
]  # fmt: skip


def _function(text: str, kernel: str) -> str:
    found = re.search(rf'extern "C" __global__ void(?:(?!\n}}\n).)*?\b{kernel}\(.*?\n}}\n', text, re.S)
    assert found is not None, kernel
    return found.group(0)


def _broken(fault: Fault, number: int) -> str:
    text = source(CASES[fault.kernel][0])
    body = text if CASES[fault.kernel][0] != "basics.cu" else _function(text, fault.kernel)
    assert fault.old in body, f"{fault.what}: the source has no {fault.old!r}"
    body = body.replace(fault.old, fault.new, fault.count)
    renamed = re.sub(rf"\b{fault.kernel}\(", f"{fault.kernel}_{number}(", body)
    return f"namespace fault_{number} {{\n{renamed}\n}}\n"


def _arch(fault: Fault) -> str:
    return "90a" if CASES[fault.kernel][0] in HOPPER_ALONE else "80"


@pytest.fixture(scope="module")
def ptx():
    """All broken kernels, by architecture."""
    headers = "#include <cuda.h>\n#include <cuda_bf16.h>\n#include <cstdint>\n"

    def text(arch: str) -> str:
        return headers + "".join(_broken(fault, number) for number, fault in enumerate(FAULTS) if _arch(fault) == arch)

    return {arch: build.ptx_of(build.HERE / "kernels" / "faults.cu", arch, text=text(arch)) for arch in build.ARCHS}


def _kernel(ptx, number: int) -> emulator.Kernel:
    fault = FAULTS[number]
    return emulator.translated(ptx[_arch(fault)], f"{fault.kernel}_{number}")


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{f.kernel}: {f.what}" for f in FAULTS])
def test_a_fault_is_noticed(ptx, number):
    fault = FAULTS[number]
    kernel = _kernel(ptx, number)
    with emulator.watch(races=True) as findings:
        off = CASES[fault.kernel][1](kernel)
    kinds = {finding.split(" at ")[0] for finding in findings}
    if fault.noticed == "result":
        assert max(off.values()) > 1, (off, findings)
    else:
        assert fault.noticed in kinds, (off, findings)


def test_faults_that_only_a_detector_sees(ptx):
    """The first schedule hides some faults; nothing but the detectors knows of them."""
    hidden = []
    for number, fault in enumerate(FAULTS):
        if fault.noticed in ("race", "uninitialised"):
            torch.manual_seed(0)
            with emulator.watch():
                off = CASES[fault.kernel][1](_kernel(ptx, number))
            hidden += [fault.what] * (max(off.values()) <= 1)
    assert "no fence before the count" in hidden
    assert len(hidden) >= 3, hidden


def test_a_race_names_both_lines(ptx):
    number = next(i for i, f in enumerate(FAULTS) if f.kernel == "row_sums" and f.noticed == "race")
    with emulator.watch(races=True) as findings:
        CASES["row_sums"][1](_kernel(ptx, number))
    report = next(finding for finding in findings if finding.startswith("race"))
    place = r"faults\.cu:\d+ \(PTX line \d+: `{}\.shared.*`\)"
    wanted = rf"race at {place.format('st')}: .* by thread \d+ is not ordered after the read by thread \d+ at "
    assert re.match(wanted + place.format("ld"), report), report


def test_a_deadlock_says_where_each_thread_waits(ptx):
    number = next(i for i, f in enumerate(FAULTS) if f.what == "the slot is never full")
    with emulator.watch() as findings:
        CASES["hand_over"][1](_kernel(ptx, number))
    report = next(finding for finding in findings if finding.startswith("deadlock"))
    assert re.search(r"of 64 threads wait for ever: 32 at named barrier at .*bar\.sync", report), report
