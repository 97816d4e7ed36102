"""Loads, stores and atomics, and the copies to shared memory that run beside the program (cp.async, also in bulk).

A state space decides which function of ``runtime/memory.h`` is called: shared memory is bounded by the launch's
size, global memory by the tensors of the call; parameters and a thread's own stack are read without a check. A
volatile, relaxed, acquire or release access is ``strong``: it does not race with others of its kind.
"""

from __future__ import annotations

import re

from ptx.translate.function import Function, Instruction, opcode
from ptx.translate.parse import UnsupportedError, split
from ptx.translate.types import WIDTH, cast, cpp, unsigned

SPACES = ("shared", "global", "param", "local", "const")
STRONG = ("volatile", "relaxed", "acquire", "release", "mmio")
CACHING = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "cta", "gpu", "sys", "cluster", "v2", "v4", "v8")
ATOMICS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")


def space_of(i: Instruction) -> str:
    return next((part.split("::")[0] for part in i.parts[1:] if part.split("::")[0] in SPACES), "generic")


def _check_modifiers(i: Instruction) -> None:
    for part in i.parts[1:-1]:
        known = (*CACHING, *STRONG, *SPACES, *ATOMICS, "acq_rel", "noftz")
        if part not in known and not part.startswith(("L1::", "L2::", "shared::cta")):
            raise UnsupportedError(f"the modifier .{part}")


def _order(f: Function, i: Instruction, *, before: bool) -> None:
    """A release is a fence before the access, an acquire one after it."""
    if i.has("acq_rel") or i.has("release" if before else "acquire"):
        f.emit(f"fence({str(i.has('gpu', 'sys', 'cluster')).lower()});")


@opcode("ld", "ldu", "st")
def access(f: Function, i: Instruction) -> None:
    _check_modifiers(i)
    space, load = space_of(i), i.base != "st"
    where, what = (i.args[1], i.args[0]) if load else (i.args[0], i.args[1])
    values = f.vector(what)
    if space == "param":
        address = f.address(where)
        for n, value in enumerate(values):
            f.write(value, f"load_param<{cpp(i.type)}>(params + {address} + {n * WIDTH[i.type] // 8})", i.type)
        return
    vector = f"Vector<{unsigned(i.type)}, {len(values)}>"
    address = f.address(where, shared=space == "shared")
    kind = "Access::strong" if i.has(*STRONG) else "Access::weak"
    place = "shared" if space == "shared" else "private" if space in ("local", "const") else space
    site = f"{i.line}" if place in ("shared", "private") else f"{i.line}, {f.hint()}"
    f.emit("{")
    _order(f, i, before=True)
    if load:
        f.emit(f"const auto loaded = load_{place}<{vector}>({address}, {kind}, {site});")
        for n, value in enumerate(values):
            f.write(value, cast(f"loaded.x[{n}]", unsigned(i.type), cpp(i.type)), i.type)
    else:
        stored = ", ".join(f.read(value, f"b{WIDTH[i.type]}") for value in values)
        f.emit(f"store_{place}<{vector}>({address}, {{{{{stored}}}}}, {kind}, {site});")
    _order(f, i, before=False)
    f.emit("}")


@opcode("atom", "red")
def atomic(f: Function, i: Instruction) -> None:
    _check_modifiers(i)
    if i.has("v2", "v4"):
        raise UnsupportedError("a vector of atomics")
    returns = i.base == "atom"
    where, *operands = i.args[1:] if returns else i.args
    name = i.one_of(*ATOMICS)
    shared = space_of(i) == "shared"
    address = f.address(where, shared=shared)
    types = {"f16x2": ("half", True), "bf16x2": ("bfloat16", True)}
    if i.type in types:
        raise UnsupportedError(f"an atomic of {i.type}")
    type = cpp(i.type.replace("b", "u") if i.type in ("b32", "b64") else i.type)
    values = ", ".join(f.read(operand, i.type) for operand in operands)
    f.emit("{")
    _order(f, i, before=True)
    call = f"atomic_{'shared' if shared else 'global'}<{type}>({address}, {i.line}, {'' if shared else f.hint() + ', '}"
    f.emit(
        f"const auto old = {call}[](auto old, auto... x) {{ return op::atomic_{name}<{type}>(old, x...); }}, {values});"
    )
    _order(f, i, before=False)
    if returns:
        f.write(i.args[0], "old")
    f.emit("}")


@opcode("membar", "fence")
def fence(f: Function, i: Instruction) -> None:
    if i.has("proxy"):
        if "async" not in i.text:
            raise UnsupportedError(f"the fence .{'.'.join(i.parts[1:])}")
        f.features.add("async_proxy")
        f.emit("fence_async_proxy();")
    else:
        f.emit(f"fence({str(i.has('gl', 'gpu', 'sys', 'cluster')).lower()});")


@opcode("cp")
def copy(f: Function, i: Instruction) -> None:
    if i.has("bulk"):
        _bulk_copy(f, i)
        return
    f.features.add("cp_async")
    if i.has("commit_group"):
        f.emit("copies_commit();")
    elif i.has("wait_group"):
        f.emit(f"copies_wait({i.args[0]}, {i.line});")
    elif i.has("wait_all"):
        f.emit(f"copies_commit(); copies_wait(0, {i.line});")
    elif i.has("mbarrier"):
        raise UnsupportedError("an arrival by cp.async")
    else:
        size = int(i.args[2], 0)
        given = f.read(i.args[3], "u32") if len(i.args) > 3 else str(size)
        if len(i.args) > 3 and (register := f.register(i.args[3])) is not None and register[1] == "bool":
            raise UnsupportedError("the predicate that ignores the source")
        if i.has("cg") and size != 16:
            raise UnsupportedError("cp.async.cg of other than 16 bytes")
        source = f.address(i.args[1])
        f.emit(f"copy_async({f.address(i.args[0], shared=True)}, {source}, {size}, {given}, {i.line}, {f.hint()});")


BULK = ("async", "bulk", "tensor", "global", "tile", "reduce", "add", "L2::cache_hint")
COMES, GOES = "mbarrier::complete_tx::bytes", "bulk_group"


def _bulk_copy(f: Function, i: Instruction) -> None:
    """A box of a tensor: ``[to], [map, {coordinates}], [mbarrier]``, or back, ``[map, {coordinates}], [from]``."""
    f.features.add("async_proxy")
    if i.has("commit_group"):
        f.emit("stores_commit();")
        return
    if i.has("wait_group"):
        f.emit(f"stores_wait({i.args[0]});")
        return
    shared = ("shared::cta", "shared::cluster")  # of a cluster there is this block
    rank = i.one_of("1d", "2d", "3d", "4d", "5d")
    if not (rank and i.has(*shared) and i.has(COMES, GOES)) or i.has("reduce") != i.has("add"):
        raise UnsupportedError("bulk copies of other kinds")
    i.refuse_other_than(*BULK, *shared, COMES, GOES, rank)
    there, here = (i.args[1], i.args[0]) if i.has(COMES) else (i.args[0], i.args[1])
    map, coordinates = split(there.strip()[1:-1])
    at = ", ".join(f.read(x, "s32") for x in f.vector(coordinates))
    box, here = f"{f.address(map)}, at, {rank[0]}", f.address(here, shared=True)
    f.emit(f"{{ const int32_t at[] = {{{at}}};")
    if i.has(COMES):
        f.emit(f"load_box({here}, {box}, {f.address(i.args[2], shared=True)}, {i.line}, {f.hint()}); }}")
    else:
        f.emit(f"store_box({box}, {here}, {str(i.has('add')).lower()}, {i.line}, {f.hint()}); }}")


@opcode("isspacep")
def is_in_space(f: Function, i: Instruction) -> None:
    if not re.match(r"shared", i.parts[1]):
        raise UnsupportedError(f"the space .{i.parts[1]}")
    f.write(i.args[0], f"is_shared({f.read(i.args[1], 'u64')})")
