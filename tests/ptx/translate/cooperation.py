"""Instructions by which threads act together: barriers, shuffles, votes, matrix loads and matrix multiplications.

Each becomes a call that returns when all threads it needs have made it. What a fragment register holds, the runtime
knows (``runtime/matrix.cpp``); here registers are only lined up.
"""

from __future__ import annotations

import re

from ptx.translate.function import Function, Instruction, opcode
from ptx.translate.parse import UnsupportedError


@opcode("bar", "barrier")
def barrier(f: Function, i: Instruction) -> None:
    if i.has("cluster"):
        if i.has("wait"):
            f.emit(f"barrier_sync(0, 0, {i.line});")
        return
    if i.has("warp"):
        f.emit(f"sync_warp({f.read(i.args[0], 'u32')}, {i.line});")
        return
    if i.has("red"):
        _barrier_reduction(f, i)
        return
    threads = f.read(i.args[1], "u32") if len(i.args) > 1 else "0"
    name = "arrive" if i.has("arrive") else "sync"
    f.emit(f"barrier_{name}({f.read(i.args[0], 'u32')}, {threads}, {i.line});")


def _barrier_reduction(f: Function, i: Instruction) -> None:
    name = i.one_of("and", "or", "popc")
    to, number, *threads, predicate = i.args
    count = f.read(threads[0], "u32") if threads else "0"
    total = f"barrier_count({f.read(number, 'u32')}, {count}, {f.read(predicate, 'pred')}, {i.line})"
    value = {"popc": "total.yes", "or": "total.yes != 0", "and": "total.yes == total.all"}[name]
    f.emit(f"{{ const auto total = {total};")
    f.write(to, f"uint32_t({value})" if name == "popc" else value)
    f.emit("}")


@opcode("shfl")
def shuffle(f: Function, i: Instruction) -> None:
    to, _, valid = i.args[0].partition("|")
    value, distance, bounds, mask = (f.read(arg, "u32") for arg in i.args[1:5])
    mode = i.one_of("up", "down", "bfly", "idx")
    f.emit("{ bool within;")
    f.emit(f"const uint32_t got = shuffle(Shuffle::{mode}, {mask}, {value}, {distance}, {bounds}, &within, {i.line});")
    f.write(to, "got", "u32")
    if valid:
        f.write(valid, "within")
    f.emit("}")


@opcode("vote")
def vote(f: Function, i: Instruction) -> None:
    mode = i.one_of("ballot", "any", "all", "uni")
    mask, predicate = f.read(i.args[2], "u32"), f.read(i.args[1], "pred")
    ballot = f"ballot({mask}, {predicate}, {i.line})"
    lanes = f"(({mask}) & warp_lanes())"
    forms = {
        "ballot": ballot,
        "any": f"({ballot} != 0)",
        "all": f"({ballot} == {lanes})",
        "uni": f"uniform({ballot}, {lanes})",
    }
    f.write(i.args[0], forms[mode])


@opcode("activemask")
def active(f: Function, i: Instruction) -> None:
    f.write(i.args[0], "warp_lanes()")


@opcode("redux")
def redux(f: Function, i: Instruction) -> None:
    name = i.one_of("add", "min", "max", "and", "or", "xor")
    kind = name + ("_signed" if name in ("min", "max") and i.type == "s32" else "")
    value = f"reduce_warp(Reduction::{kind.replace('and', 'bit_and').replace('xor', 'bit_xor')}, "
    if name == "or":
        value = "reduce_warp(Reduction::bit_or, "
    f.write(i.args[0], f"{value}{f.read(i.args[2], 'u32')}, {f.read(i.args[1], 'u32')}, {i.line})")


@opcode("elect")
def elect(f: Function, i: Instruction) -> None:
    lane, _, chosen = i.args[0].partition("|")
    f.emit(f"{{ const uint32_t leader = elect({f.read(i.args[1], 'u32')}, {i.line});")
    f.write(lane, "leader")
    f.write(chosen or "_", "leader == current->lane")
    f.emit("}")


@opcode("ldmatrix", "stmatrix")
def matrix(f: Function, i: Instruction) -> None:
    if not i.has("m8n8") or i.type != "b16":
        raise UnsupportedError("a matrix of other than 8x8 elements of 16 bits")
    count = int((i.one_of("x1", "x2", "x4"))[1:])
    load = i.base == "ldmatrix"
    where, what = (i.args[1], i.args[0]) if load else (i.args[0], i.args[1])
    transposed = str(i.has("trans")).lower()
    rest = f"{count}, {transposed}, {f.address(where, shared=True)}, {i.line});"
    registers = f.vector(what)
    if load:
        f.emit(f"{{ uint32_t rows[{count}]; load_matrices(rows, {rest}")
        for n, register in enumerate(registers):
            f.write(register, f"rows[{n}]", "u32")
    else:
        f.emit(f"{{ uint32_t rows[{count}] = {{{', '.join(f.read(r, 'b32') for r in registers)}}};")
        f.emit(f"store_matrices(rows, {rest}")
    f.emit("}")


@opcode("movmatrix")
def move_matrix(f: Function, i: Instruction) -> None:
    f.write(i.args[0], f"transpose_matrix({f.read(i.args[1], 'b32')}, {i.line})")


@opcode("mma")
def mma(f: Function, i: Instruction) -> None:
    shapes = {
        ("m16n8k16", "bf16"): "bf16_k16",
        ("m16n8k16", "f16"): "f16_k16",
        ("m16n8k8", "bf16"): "bf16_k8",
        ("m16n8k8", "f16"): "f16_k8",
        ("m16n8k8", "tf32"): "tf32_k8",
        ("m16n8k4", "tf32"): "tf32_k4",
    }
    shape = next(part for part in i.parts if part.startswith(("m16", "m8")))
    d, a, b, c = i.parts[-4:]
    if (shape, a) not in shapes or a != b or d != "f32" or c != "f32":
        raise UnsupportedError("this shape and these types of mma")
    to, *sources = (f.vector(arg) for arg in i.args)
    f.emit("{ float d[4]; const float c[4] = {" + ", ".join(f.read(x, "f32") for x in sources[2]) + "};")
    for name, registers in (("a", sources[0]), ("b", sources[1])):
        f.emit(f"const uint32_t {name}[] = {{" + ", ".join(f.read(x, "b32") for x in registers) + "};")
    f.emit(f"multiply(Fragments::{shapes[shape, a]}, d, a, b, c, {i.line});")
    for n, register in enumerate(to):
        f.write(register, f"d[{n}]", "f32")
    f.emit("}")


@opcode("wgmma")
def warpgroup(f: Function, i: Instruction) -> None:
    f.features.add("async_proxy")
    if i.has("fence"):
        f.emit("products_fence();")
    elif i.has("commit_group"):
        f.emit("products_commit();")
    elif i.has("wait_group"):
        _wait_for_products(f, i)
    else:
        _warpgroup_product(f, i)


@opcode("mbarrier")
def mbarrier(f: Function, i: Instruction) -> None:
    """In the forms that need no state."""
    if i.has("init"):
        f.emit(f"mbarrier_init({f.address(i.args[0], shared=True)}, {f.read(i.args[1], 'u32')}, {i.line});")
    elif i.has("inval"):
        f.emit(f"mbarrier_inval({f.address(i.args[0], shared=True)}, {i.line});")
    elif i.has("arrive") and i.args[0] == "_" and len(i.args) == (3 if i.has("expect_tx") else 2):
        barrier = f.address(i.args[1], shared=True)
        if i.has("expect_tx"):
            f.emit(f"mbarrier_expect({barrier}, {f.read(i.args[2], 'u32')}, {i.line});")
        f.emit(f"mbarrier_arrive({barrier}, {i.line});")
    elif i.parts[1] == "expect_tx":
        f.emit(f"mbarrier_expect({f.address(i.args[0], shared=True)}, {f.read(i.args[1], 'u32')}, {i.line});")
    elif i.has("try_wait") and i.has("parity"):
        f.emit(f"mbarrier_wait({f.address(i.args[1], shared=True)}, {f.read(i.args[2], 'u32')}, {i.line});")
        f.write(i.args[0], "true")
    elif i.has("test_wait") and i.has("parity"):
        where, parity = f.address(i.args[1], shared=True), f.read(i.args[2], "u32")
        f.write(i.args[0], f"mbarrier_test({where}, {parity}, {i.line})")
    else:
        raise UnsupportedError("this form of mbarrier")


@opcode("setmaxnreg")
def set_registers(f: Function, i: Instruction) -> None:
    f.emit(f"set_registers({f.read(i.args[0], 'u32')}, {str(i.has('inc')).lower()}, {i.line});")


def _wait_for_products(f: Function, i: Instruction) -> None:
    """The runtime is told the registers in which sums may be: that a product writes, or that these were moved to."""
    moves = [s.operands for s in f.kernel.body if s.opcode.startswith("mov.")]
    sums: set[str] = set()
    found = {name for s in f.kernel.body if s.opcode.startswith("wgmma.mma") for name in f.vector(s.operands[0])}
    while found:
        sums |= found
        found = {to for to, source in moves if source in sums} - sums
    registers = [f"&{register[0]}" for name in sorted(sums) if (register := f.register(name))]
    f.emit(f"{{ void* const sums[] = {{{', '.join(registers) or 'nullptr'}}};")
    f.emit(f"products_wait({f.read(i.args[0], 'u32')}, sums, {len(registers)}); }}")


def _warpgroup_product(f: Function, i: Instruction) -> None:
    """``d, a, b, scale-d, scale-a, scale-b`` and, of 16-bit operands, which of those in shared memory lie turned."""
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    types = {"bf16": 16, "f16": 16, "tf32": 8}
    d_type, a_type, b_type = i.parts[5:8]
    if shape is None or d_type != "f32" or a_type != b_type or types.get(a_type) != int(shape[2]):
        raise UnsupportedError("this shape and these types of wgmma")
    to, a, b, scale_d, scale_a, scale_b, *turned = i.args
    in_registers = a.startswith("{")
    turned = [str(t != "0").lower() for t in turned] or ["false"]
    registers = f.vector(to)
    f.emit("{ float d[] = {" + ", ".join(f.read(x, "f32") for x in registers) + "};")
    if in_registers:
        f.emit("const uint32_t a[] = {" + ", ".join(f.read(x, "b32") for x in f.vector(a)) + "};")
    where = ("a, 0" if in_registers else f"nullptr, {f.read(a, 'u64')}") + f", {f.read(b, 'u64')}"
    scales = f"{f.read(scale_d, 'pred')}, {scale_a}.0f, {scale_b}.0f"
    layout = f"{'false' if in_registers else turned[0]}, {turned[-1]}"
    f.emit(f"multiply_warpgroup({{WarpgroupType::{a_type}, {shape[1]}, {where}, {scales}, {layout}}}, d, {i.line});")
    for n, register in enumerate(registers):
        f.write(register, f"d[{n}]", "f32")
    f.emit("}")
