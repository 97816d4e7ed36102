"""Faults planted in the library's own kernels: each edit of ``csrc/cuda`` breaks a kernel, and must be noticed.

A fault is an edit of one file of a copy; ``unit`` is the .cu that is compiled then, for one dtype and one head width.
The launchers stay those of the library, and find the broken kernels by name. ``noticed`` is a kind of finding, with the
detectors on, ``result``, where only the numbers are wrong, or ``conflict``, where only the banks of shared memory tell.
``make test`` has a few of them, and the longer session all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_attention as attention_cases
import test_attention_varlen as varlen_cases
import test_embedding as embedding_cases
import test_ffn as ffn_cases
import test_layer_norm as layer_norm_cases
import test_linear_cross_entropy as linear_cross_entropy_cases
import torch
from helpers import EMULATED, check

from ptx import build
from ptx.test_ops import judge_attention
from pytransformer._parity import unwritten_is_nan

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

FP16, WIDTH, HOPPER_WIDTH = torch.float16, 32, 64


@dataclass(frozen=True)
class Fault:
    call: str  # of CALLS
    unit: str
    file: str  # that is edited
    what: str
    old: str
    new: str
    noticed: str


def attention(mask: str, *, T: int = 40, S: int = 70, **options: float) -> Callable[[str], None]:
    return lambda backend: judge_attention(backend, (1, 2, 1, T, S, WIDTH, WIDTH), mask, FP16, options)


def hopper(mask: str, *, T: int = 200, S: int = 600, width: int = HOPPER_WIDTH) -> Callable[[str], None]:
    """More tiles than stages, for both warpgroups."""
    return lambda backend: judge_attention(backend, (1, 1, 1, T, S, width, width), mask, FP16, {})


def hopper_poison(backend: str) -> None:
    """A value of NaN that no query sees, in the third tile, of which they see the rest."""
    tensors = attention_cases.qkv(1, 1, 1, 300, 330, HOPPER_WIDTH, HOPPER_WIDTH, dtype=FP16)
    harmless = tensors | {"value": tensors["value"].clone()}
    tensors["value"][:, :, 300:], harmless["value"][:, :, 300:] = torch.nan, 0
    check("attention", tensors, {"is_causal": True}, backend, harmless=harmless)


def end_to_end(queries: tuple[int, ...], keys: tuple[int, ...], width: int = WIDTH) -> Callable[[str], None]:
    case = varlen_cases.Case(queries, keys, D=width, Dv=width)
    return lambda backend: check("attention_varlen", case.tensors(FP16), {}, backend)


def layer_norm(shape: tuple[int, int]) -> Callable[[str], None]:
    def call(backend: str) -> None:
        for _ in range(2):  # the second finds the counters as the first has left them
            check("layer_norm", layer_norm_cases.make(shape, FP16), {}, backend)

    return call


CALLS: dict[str, Callable[[str], None]] = {
    "attention": attention("window_left"),
    "attention, masked": attention("bool_full"),
    "attention, rows in turns": lambda backend: judge_attention(  # of whose five the L2 cache holds two
        backend, (1, 5, 5, 130, 200, WIDTH, WIDTH), "causal", FP16, {}
    ),
    "attention, dropout": attention("none", dropout_p=0.3, seed=7),
    "attention, poison": lambda backend: attention_cases.test_what_is_behind_the_mask_never_leaks(
        backend, "dense", FP16, torch.nan
    ),
    "attention, end to end": end_to_end((5, 40), (7, 70)),  # of which the last ends where the tensors do
    "hopper": hopper("none"),
    "hopper, poison": hopper_poison,
    "hopper, end to end": end_to_end((70, 150), (90, 200), HOPPER_WIDTH),
    "hopper, wide": hopper("causal", T=200, S=130, width=160),
    "decode": attention("none", T=3, S=520),
    "layer_norm": layer_norm((100, 520)),
    "layer_norm, wide": layer_norm((3, 1032)),
    "layer_norm, wide rows": layer_norm((100, 1032)),
    "embedding": lambda backend: check("embedding", embedding_cases.make(dtype=FP16), {}, backend),
    "ffn": lambda backend: check("ffn", ffn_cases.make((9,), 16, 41, 9, dtype=FP16), {}, backend),
    "linear_cross_entropy": lambda backend: check(
        "linear_cross_entropy", linear_cross_entropy_cases.make((9,), V=130, dtype=FP16), {}, backend
    ),
}

FULL = "__syncthreads();  // this tile is here, and nobody reads the other buffer any more"
ARRIVED = f"ptx::wait_for_copies<0>();\n{{}}{FULL}"
FWD, FWD_H = "attention_fwd.cu", "attention_fwd_sm80.cuh"
HOPPER, HOPPER_H = "attention_fwd_sm90.cu", "attention_fwd_sm90.cuh"
HOPPER_QUERY, HOPPER_KEY = "attention_bwd_query_sm90.cu", "attention_bwd_key_sm90.cu"
HOPPER_KEY_H, HOPPER_WIDE_KEY = "attention_bwd_key_sm90.cuh", "attention_bwd_wide_key_sm90.cu"
ROLES, WARPGROUP = "attention_hopper.cuh", "warpgroup.cuh"
TILE, SCORES, MASKS = "attention_tile.cuh", "attention_scores.cuh", "attention_masks.cu"
KEY, QUERY, DECODE = "attention_bwd_key.cu", "attention_bwd_query.cu", "attention_decode.cu"
ARGUMENTS = "attention_arguments.h"
NORM, NORM_BWD, REDUCE = "layer_norm.cu", "layer_norm_bwd.cu", "reduce.cuh"
CROSS, EMBEDDING, FFN = "linear_cross_entropy.cu", "embedding.cu", "ffn.cu"
FAULTS = [
    Fault("attention", FWD, FWD_H, "the copies are not waited for",
          ARRIVED.format(" " * 4), f"ptx::wait_for_copies<1>();\n{FULL}", "race"),
    Fault("attention", FWD, FWD_H, "no barrier when the tile is here", FULL, "", "race"),
    Fault("attention, poison", FWD, FWD_H, "the second pass begun before all know that it is the second",
          "|| last) break;", "|| block.careful) break;", "race"),
    Fault("attention", FWD, TILE, "a row too many", "i * copy.step < end", "i * copy.step <= end", "out-of-bounds"),
    Fault("attention", FWD, TILE, "fragments of the right operand swapped",
          "left[m], right[0], right[1])", "left[m], right[1], right[0])", "result"),
    Fault("attention", FWD, TILE, "ldmatrix of the wrong row", "lane() / 16 * 8, lane() / 8 % 2",
          "lane() / 16 * 4, lane() / 8 % 2", "result"),
    Fault("attention", FWD, TILE, "chunks that are not permuted", "index ^ twist", "index", "conflict"),
    Fault("attention", FWD, SCORES, "a band that is a key short", "t + upper + 1, length", "t + upper, length",
          "result"),
    Fault("attention", FWD, SCORES, "the wrong bit of the mask", "n & 3) << 2) <<", "n & 3) << 1) <<", "result"),
    Fault("attention, dropout", FWD, SCORES, "bits of dropout from the wrong lane",
          "(lane() & ~3) | j)", "(lane() & ~3) | (j ^ 1))", "result"),
    Fault("attention, masked", MASKS, MASKS, "a word kept by the wrong lane", "lane == i)", "lane == i + 1)", "result"),
    Fault("attention, masked", MASKS, MASKS, "a key too many", "key < a.S &&", "key <= a.S &&", "out-of-bounds"),
    Fault("attention", KEY, KEY, "no barrier when the tile is here", FULL, "", "race"),
    Fault("attention", KEY, KEY, "half of the statistics", "if (i < 2 * N) ptx", "if (i < N) ptx", "uninitialised"),
    Fault("attention", KEY, KEY, "weights that are not waited for", "ptx::barrier(1 + pair, 64);", "", "race"),
    Fault("attention", KEY, KEY, "one barrier for both pairs", "ptx::barrier(1 + pair, 64);",
          "ptx::barrier(1, 64);", "(race|deadlock)"),
    Fault("attention", KEY, KEY, "weights of both pairs in one place", "+ pair * Cut::exchange_bytes", "", "race"),
    Fault("attention", QUERY, TILE, "results stored before the warp has met",
          "__syncwarp();\n  uint16_t* head", "uint16_t* head", "race"),
    Fault("attention", QUERY, QUERY, "statistics of a query too many", "row < v.T ?", "row <= v.T ?",
          "out-of-bounds"),
    Fault("attention, rows in turns", FWD, ARGUMENTS, "more rows in the last turns than are left",
          "min(rows - first, together)", "together", "(result|out-of-bounds)"),
    Fault("attention, end to end", FWD, ARGUMENTS, "keys beyond the end of their sequence",
          "S : cu_seq_k[batch + 1] - cu_seq_k[batch]", "S : S", "result"),
    Fault("attention, end to end", KEY, ARGUMENTS, "queries beyond the end of their sequence",
          "T : cu_seq_q[batch + 1] - cu_seq_q[batch]", "T : T", "result"),
    Fault("hopper", HOPPER, ROLES, "copies that tensor cores are not shown",
          "ptx::wait_for_copies<LATER>();\n  ptx::fence_async_proxy();", "ptx::wait_for_copies<LATER>();", "proxy"),
    Fault("hopper", HOPPER, ROLES, "the copies are not waited for", "ptx::wait_for_copies<LATER>();", "", "race"),
    Fault("hopper", HOPPER_KEY, ROLES, "told of before it is there", "finish_copies<1>();", "finish_copies<2>();",
          "race"),
    Fault("hopper, poison", HOPPER, ROLES, "a tile not told of by who waits for room",
          "if (under_way && !stages().is_free(uses)) finish();", "", "deadlock"),
    Fault("hopper", HOPPER, ROLES, "a warp that tells for lanes that are not there yet",
          "__syncwarp();\n    if (lane() == 0)", "if (lane() == 0)", "race"),
    Fault("hopper", HOPPER, ROLES, "a stage filled before it is free",
          "stages().wait_until_free(uses);\n      ask", "ask", "race"),
    Fault("hopper", HOPPER, ROLES, "barriers that the copy engine is not shown",
          "ptx::fence_async_proxy();  // the copy engine", "//", "proxy"),
    Fault("hopper", HOPPER, ROLES, "fewer bytes announced than come", "&full), N * D * 2)", "&full), N * D)",
          "(deadlock|race)"),
    Fault("hopper", HOPPER, ROLES, "boxes of the rows below",
          "head.before + first", "head.before + first + 8", "result"),
    Fault("hopper, end to end", HOPPER_KEY, ROLES, "a box beyond the end of a sequence",
          "row + Cut::tile_rows <= end", "row < end", "(out-of-bounds|result)"),
    Fault("hopper", HOPPER, ROLES, "the other phase", "wait_until_full(use / COUNT % 2)",
          "wait_until_full(use / COUNT % 2 ^ 1)", "(race|uninitialised|deadlock)"),
    Fault("hopper", HOPPER, HOPPER_H, "keys freed before they are read",
          "ptx::wait_for_products<1>();  // of the scores", "", "race"),
    Fault("hopper", HOPPER, HOPPER_H, "values freed before they are read",
          "ptx::wait_for_products<0>();  // of the tile before", "", "race"),
    Fault("hopper", HOPPER, HOPPER_H, "products behind a wait without a fence",
          "begin_scores = [&] {\n    ptx::begin_products();", "begin_scores = [&] {", "wgmma"),
    Fault("hopper", HOPPER, HOPPER_H, "the last values freed before they are read",
          "begin_total();\n  ptx::wait_for_products<0>();", "begin_total();", "race"),
    Fault("hopper", HOPPER, ROLES, "nobody has the first turn",
          "if (group_now() == 1) ptx::arrive", "if (group_now() == 2) ptx::arrive", "deadlock"),
    Fault("hopper, poison", HOPPER, ROLES, "cleaned values that tensor cores are not shown",
          "thread, Cut::computing);\n  ptx::fence_async_proxy();", "thread, Cut::computing);", "proxy"),
    Fault("hopper, poison", HOPPER, ROLES, "what is unclean forgotten while it is read",
          "ptx::barrier(of_computing, Cut::computing);  // nobody reads of the tile before any more", "", "race"),
    Fault("hopper", HOPPER, WARPGROUP, "chunks that are not permuted", "(index ^ row) & 7", "index & 7", "result"),
    Fault("hopper", HOPPER, WARPGROUP, "groups of rows too close", "group_bytes / 16;", "group_bytes / 32;",
          "(race|result)"),
    Fault("hopper", HOPPER, WARPGROUP, "more registers than there are", "setmaxnreg.dec.sync.aligned.u32 %0",
          "setmaxnreg.inc.sync.aligned.u32 %0", "(setmaxnreg|deadlock)"),
    Fault("hopper", HOPPER, ROLES, "more registers than were left", "group_registers = 224", "group_registers = 232",
          "deadlock"),
    Fault("hopper", HOPPER_QUERY, HOPPER_QUERY, "keys freed before they are read",
          "ptx::wait_for_products<0>();  // of the tile before", "", "race"),
    Fault("hopper", HOPPER_QUERY, HOPPER_QUERY, "values that are not waited for",
          "block.second.wait_until_full(progress.second);", "", "race"),
    Fault("hopper", HOPPER_KEY, HOPPER_KEY, "queries freed before they are read",
          "sums_are_here();  // of the tile before", "", "race"),
    Fault("hopper", HOPPER_KEY, HOPPER_KEY_H, "the lse of another tile",
          "stage = block.first.of(progress.first + ahead)", "stage = block.first.of(progress.first)", "result"),
    Fault("hopper, wide", HOPPER_WIDE_KEY, HOPPER_WIDE_KEY, "weights that are not waited for",
          "wait_for_turn<Cut>();\n      exchange().take(p);", "exchange().take(p);", "(race|uninitialised)"),
    Fault("hopper, wide", HOPPER_WIDE_KEY, HOPPER_WIDE_KEY, "weights written before the last were read",
          "wait_for_turn<Cut>();\n      exchange().put(x);", "exchange().put(x);", "(race|barrier|deadlock)"),
    Fault("hopper, wide", HOPPER_WIDE_KEY, HOPPER_WIDE_KEY, "the queries of another tile",
          "grad_outs(0) : at_hand.queries(0)", "grad_outs(0) : at_hand.queries(1)", "(race|uninitialised|result)"),
    Fault("decode", DECODE, FWD_H, "a share of one tile", "from + (rows.block + 1) * share);",
          "from + rows.block * share + 1);", "result"),
    Fault("layer_norm, wide", NORM, REDUCE, "no barrier before the sums are read",
          "ptx::barrier(1 + threadIdx.y, blockDim.x);", "", "race"),
    Fault("layer_norm, wide rows", NORM_BWD, REDUCE, "a barrier that all rows of the block share",
          "ptx::barrier(1 + threadIdx.y, blockDim.x);", "ptx::barrier(1, blockDim.x);", "race"),
    Fault("layer_norm", NORM_BWD, REDUCE, "no fence before the count", "__threadfence();\n    last", "last", "race"),
    Fault("layer_norm", NORM_BWD, REDUCE, "the counter is not reset", "if (last) *counter = 0;", "", "result"),
    Fault("layer_norm, wide rows", NORM_BWD, NORM_BWD, "one scratch for all rows", "turn ^= 1;", "", "race"),
    Fault("layer_norm", NORM_BWD, NORM_BWD, "no barrier between the kinds of sums",
          "__syncthreads();\n    columns.each", "columns.each", "race"),
    Fault("linear_cross_entropy", CROSS, CROSS, "no barrier before the maxima are read",
          "__syncthreads();\n  for (int i = 0; i < row", "for (int i = 0; i < row", "race"),
    Fault("linear_cross_entropy", CROSS, CROSS, "a class too many", "threadIdx.x < classes - end)",
          "threadIdx.x <= classes - end)", "out-of-bounds"),
    Fault("embedding", EMBEDDING, EMBEDDING, "the segment of two rows", "a.ends[row + 1]", "a.ends[row + 2]",
          "out-of-bounds"),
    Fault("ffn", FFN, FFN, "elements past the end", "if (place + N <= a.count)", "if (place < a.count)",
          "out-of-bounds"),
    Fault("ffn", FFN, FFN, "no barrier before the rows are added up", "__syncthreads();\n  BlockSums", "BlockSums",
          "race"),
]  # fmt: skip
FIRST = {fault.unit: fault for fault in reversed(FAULTS)}
CHOSEN = FAULTS if EMULATED else [FIRST[unit] for unit in (FWD, HOPPER, MASKS, NORM_BWD, CROSS)]
UNBROKEN = dict.fromkeys((fault.unit, fault.call) for fault in (CHOSEN if EMULATED else CHOSEN[:1]))


def narrowed(text: str, width: int) -> str:
    """For one dtype and one head width."""
    text = re.sub(r"by_dtype<(?:\w+, )+\w+>", "by_dtype<__half>", text)
    text = re.sub(r"^template void \w+<__nv_bfloat16>.*;\n", "", text, flags=re.M)
    return re.sub(rf"^ +if \(width <= (?!{width}\)).*\n", "", text, flags=re.M)


def source(file: str) -> str:
    return (build.ROOT / "csrc" / "cuda" / file).read_text()


def wrong(name: str, unit: str, file: str, old: str, new: str, counts: bool = False) -> str:
    """What is wrong with a call on a copy of the kernels with ``old`` replaced; nothing if it is right."""
    from ptx import backend

    text = source(file)
    assert old in text, f"{file} has no {old!r}"
    arch, width = ("90a", HOPPER_WIDTH) if build.is_hopper(build.ROOT / unit) else ("80", WIDTH)
    ptx = build.ptx_of_edited(unit, {file: text.replace(old, new, 1)}, lambda text: narrowed(text, width), arch)
    with backend.installed(arch, races=True, counts=counts) as installed, backend.replaced(ptx), unwritten_is_nan():
        try:
            CALLS[name](installed)
        except backend.FaultyKernelError as error:
            return str(error)
        except AssertionError as error:
            return f"result: {error}"
        tiles = [use for use in backend.module().uses if use.instruction.startswith("ldmatrix")]
    return "".join(f"conflict: {use}\n" for use in tiles if use.moved > use.ideal)


def test_every_fault_can_be_planted():
    """Of those, too, that only the long run plants."""
    assert [fault for fault in FAULTS if fault.old not in source(fault.file)] == []


@pytest.mark.parametrize("fault", CHOSEN, ids=[f"{f.unit}: {f.what}" for f in CHOSEN])
def test_a_fault_is_noticed(fault):
    found = wrong(fault.call, fault.unit, fault.file, fault.old, fault.new, fault.noticed == "conflict")
    assert re.search(rf"^{fault.noticed}\b", found, re.M), found or "nothing was noticed"


@pytest.mark.parametrize(("unit", "name"), UNBROKEN, ids=[f"{unit}: {name}" for unit, name in UNBROKEN])
def test_nothing_is_noticed_without_a_fault(unit, name):
    assert not wrong(name, unit, unit, "", "")
