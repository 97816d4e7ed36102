"""Instructions that a thread executes by itself in registers: moves, arithmetic, comparisons, conversions, branches.

The functions of ``op::`` in ``runtime/instructions.h`` say what each one computes; here stands which one an opcode
means, and which modifiers are understood. Pairs of 16-bit floats go through ``pairwise``, lane by lane.
"""

from __future__ import annotations

from ptx.translate.function import Function, Instruction, label, opcode
from ptx.translate.parse import UnsupportedError
from ptx.translate.types import FLOATS, WIDTH, cpp

PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
BOOLEAN = {"and": "&&", "or": "||", "xor": "!="}


def _apply(f: Function, i: Instruction, name: str, inputs: int, directed: str = "") -> None:
    """``args[0] = op::name(args[1], ...)`` in the opcode's type, with .ftz, .sat and .relu."""
    type = PAIRS.get(i.type, i.type)
    if (plain := _plain(f, i, name)) and not directed:
        f.write(i.args[0], *plain)
        return
    arguments = ", ".join(f.read(arg, i.type) for arg in i.args[1 : 1 + inputs])
    function = _function(name, cpp(type), flush=i.has("ftz"))
    if type != i.type:
        call = f"pairwise<{cpp(type)}>({function}, {arguments})"
    elif directed:
        call = f"rounded<Rounding::{directed}, {cpp(type)}>({function}, {arguments})"
    elif i.has("ftz"):
        call = f"({function})({arguments})"
    else:
        call = f"op::{name}<{cpp(type)}>({arguments})"
    if i.has("sat") and type == "f32":
        call = f"saturate({call})"
    elif i.has("sat"):
        raise UnsupportedError(f".sat of {i.type}")
    if i.has("relu"):
        positive = f"[](auto x) {{ return op::max_nan<{cpp(type)}>(x, {cpp(type)}(0)); }}"
        if type != i.type:
            call = f"pairwise<{cpp(type)}>({positive}, {call})"
        elif i.type == "s32":
            call = f"({positive})({cpp(type)}({call}))"
        else:
            raise UnsupportedError(f".relu of {i.type}")
    f.write(i.args[0], call)


ROUNDED_TO_NORMAL = ("mul", "fma", "div", "div_approx")  # what rounding can lift from the subnormal numbers


def _function(name: str, type: str, *, flush: bool) -> str:
    """``op::name`` of elements of a C++ type as a lambda."""
    if flush and name in ROUNDED_TO_NORMAL:
        inner = f"[](auto x, auto... y) {{ return op::{name}<decltype(x)>(x, y...); }}"
        return f"[](auto... x) {{ return flushed<{type}>({inner}, flush(x)...); }}"
    call = f"flush(op::{name}<{type}>(flush(x)...))" if flush else f"op::{name}<{type}>(x...)"
    return f"[](auto... x) {{ return {call}; }}"


OPERATORS = {"add": "+", "sub": "-", "mul": "*", "mul_lo": "*"}


def _plain(f: Function, i: Instruction, name: str) -> tuple[str, str] | None:
    """The commonest operations as C++'s own, and the type they give; wrapping integers are unsigned."""
    if i.has("ftz", "sat", "relu") or i.type not in ("u32", "s32", "u64", "s64", "b32", "b64", "f32"):
        return None
    type = i.type if i.type == "f32" else f"u{WIDTH[i.type]}"
    values = [f.read(arg, type) for arg in i.args[1:]]
    if name in OPERATORS:
        return f"({values[0]} {OPERATORS[name]} {values[1]})", type
    if name == "mad_lo":
        return f"({values[0]} * {values[1]} + {values[2]})", type
    if name == "fma" and type == "f32":
        return f"__builtin_fmaf({', '.join(values)})", type
    return None


@opcode("mov")
def mov(f: Function, i: Instruction) -> None:
    to, source = i.args
    if to.startswith("{"):
        parts = f.vector(to)
        width = WIDTH[i.type] // len(parts)
        f.emit(f"{{ auto whole = {f.read(source, f'b{WIDTH[i.type]}')};")
        for n, part in enumerate(parts):
            f.write(part, f"slice<uint{width}_t>(whole, {n})")
        f.emit("}")
    elif source.startswith("{"):
        parts = f.vector(source)
        values = ", ".join(f.read(part, f"b{WIDTH[i.type] // len(parts)}") for part in parts)
        f.write(to, f"joined<{cpp(f'b{WIDTH[i.type]}')}>({values})")
    else:
        f.write(to, f.read(source, i.type), i.type)


@opcode("cvta")
def cvta(f: Function, i: Instruction) -> None:
    space = next((part.split("::")[0] for part in i.parts if part.split("::")[0] in ("shared", "param")), "")
    if space == "shared":
        to = i.has("to")
        name, type = ("shared_address", "u32") if to else ("shared_pointer", "u64")
        f.write(i.args[0], f"{name}({f.read(i.args[1], 'u64')})", type)
    elif space == "param":
        f.write(i.args[0], f"reinterpret_cast<uintptr_t>(params) + {f.read(i.args[1], 'u64')}")
    else:
        f.write(i.args[0], f.read(i.args[1], "u64"), "u64")


@opcode("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max")
def arithmetic(f: Function, i: Instruction) -> None:
    floating = PAIRS.get(i.type, i.type) in FLOATS
    directed = i.one_of("rz", "rm", "rp")
    if directed and i.type not in ("f32", "f64"):
        raise UnsupportedError(f"the rounding .{directed} of {i.type}")
    known = ("rn", "rz", "rm", "rp", "ftz", "sat", "relu", "lo", "hi", "wide", "approx", "full", "NaN")
    i.refuse_other_than(*known, i.type)
    name = i.base
    if i.base in ("mul", "mad") and not floating:
        name += "_" + (i.one_of("hi", "wide") or "lo")
    elif i.base == "mad":
        name = "fma"
    elif i.has("NaN"):
        name += "_nan"
    elif i.base == "div" and i.has("approx"):
        name += "_approx"
    if name.endswith("_wide"):
        wide = f"{i.type[0]}{2 * WIDTH[i.type]}"
        product = f"({cpp(wide)}({f.read(i.args[1], i.type)}) * {cpp(wide)}({f.read(i.args[2], i.type)}))"
        f.write(
            i.args[0], f"op::add<{cpp(wide)}>({product}, {f.read(i.args[3], wide)})" if i.base == "mad" else product
        )
        return
    _apply(f, i, name, 3 if i.base in ("mad", "fma") else 2, directed)


@opcode("neg", "abs", "not", "cnot", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos")
def unary(f: Function, i: Instruction) -> None:
    i.refuse_other_than("rn", "approx", "ftz", i.type)
    if i.type == "pred":
        f.write(i.args[0], f"!{f.read(i.args[1], 'pred')}")
        return
    _apply(f, i, {"not": "complement"}.get(i.base, i.base), 1)


@opcode("popc", "clz", "brev", "bfind")
def of_bits(f: Function, i: Instruction) -> None:
    i.refuse_other_than("shiftamt", i.type)
    name = i.base + ("_shift" if i.has("shiftamt") else "")
    f.write(i.args[0], f"op::{name}<{cpp(i.type)}>({f.read(i.args[1], i.type)})")


@opcode("copysign")
def copysign(f: Function, i: Instruction) -> None:
    _apply(f, i, "copysign", 2)


@opcode("sad")
def sad(f: Function, i: Instruction) -> None:
    _apply(f, i, "sad", 3)


@opcode("and", "or", "xor")
def logic(f: Function, i: Instruction) -> None:
    name = {"and": "&", "or": "|", "xor": "^"}[i.base]
    f.write(i.args[0], f"{cpp(i.type)}({f.read(i.args[1], i.type)} {name} {f.read(i.args[2], i.type)})", i.type)


@opcode("shl", "shr")
def shift(f: Function, i: Instruction) -> None:
    name = {"shl": "shift_left", "shr": "shift_right"}[i.base]
    if i.args[2].isdigit() and int(i.args[2]) < WIDTH[i.type]:
        sign = "<<" if i.base == "shl" else ">>"
        f.write(i.args[0], f"{cpp(i.type)}({f.read(i.args[1], i.type)} {sign} {i.args[2]})", i.type)
        return
    f.write(i.args[0], f"op::{name}<{cpp(i.type)}>({f.read(i.args[1], i.type)}, {f.read(i.args[2], 'u32')})")


@opcode("shf")
def funnel(f: Function, i: Instruction) -> None:
    name = f"funnel_{'left' if i.has('l') else 'right'}<{str(i.has('clamp')).lower()}>"
    f.write(i.args[0], f"op::{name}({', '.join(f.read(arg, 'u32') for arg in i.args[1:])})")


@opcode("lop3", "prmt", "bfe", "bfi")
def fields(f: Function, i: Instruction) -> None:
    if i.base == "prmt" and i.type != "b32":
        raise UnsupportedError(f"the mode .{i.type}")
    if i.base == "lop3" and i.parts != ["lop3", "b32"]:
        raise UnsupportedError("a form of lop3 with a predicate")
    types = {"bfe": [i.type, "u32", "u32"], "bfi": [i.type, i.type, "u32", "u32"]}
    read = [f.read(a, t) for a, t in zip(i.args[1:], types.get(i.base, ["u32"] * 4), strict=False)]
    f.write(i.args[0], f"op::{i.base}({', '.join(read)})")


@opcode("setp", "set")
def compare(f: Function, i: Instruction) -> None:
    comparison, type = i.parts[1], i.type
    x, y = f.read(i.args[1], type), f.read(i.args[2], type)
    first, _, second = i.args[0].partition("|")
    if type in PAIRS:
        if i.parts != ["setp", comparison, type]:
            raise UnsupportedError("a comparison of pairs with a modifier")
        for half, to in enumerate((first, second)):
            low = f"float(bits<{cpp(PAIRS[type])}>(slice<uint16_t>({{}}, {half})))"
            f.write(to, _holds(comparison, "f32", low.format(x), low.format(y)), "pred")
        return
    if i.has("ftz"):
        x, y = f"flush({x})", f"flush({y})"
    test = _holds(comparison, type, x, y)
    if (joined := i.one_of(*BOOLEAN)) and joined == i.parts[2]:
        test = f"({test} {BOOLEAN[joined]} {f.read(i.args[3], 'pred')})"
    if i.base == "set":
        result = cpp(i.parts[-2])
        yes = "1.0f" if i.parts[-2] in FLOATS else "~0u"
        f.write(i.args[0], f"({test} ? {result}({yes}) : {result}(0))")
        return
    if not second:
        f.write(first, test, "pred")
        return
    f.emit(f"{{ const bool test = {test};")
    f.write(first, "test", "pred")
    f.write(second, "!test", "pred")
    f.emit("}")


def _holds(comparison: str, type: str, x: str, y: str) -> str:
    """A C++ condition; the unordered comparisons hold where an operand is NaN, the others do not."""
    if comparison in UNSIGNED_COMPARISONS:
        return f"({x} {UNSIGNED_COMPARISONS[comparison]} {y})"
    if comparison == "ne" and type in FLOATS:
        return f"({x} < {y} || {x} > {y})"
    if comparison in COMPARISONS:
        return f"({x} {COMPARISONS[comparison]} {y})"
    if comparison in ("num", "nan"):
        return f"({'' if comparison == 'num' else '!'}({x} == {x} && {y} == {y}))"
    return f"({x} != {x} || {y} != {y} || {x} {COMPARISONS[comparison[:-1]]} {y})"


@opcode("selp")
def selp(f: Function, i: Instruction) -> None:
    x, y = (f.read(arg, i.type) for arg in i.args[1:3])
    f.write(i.args[0], f"({f.read(i.args[3], 'pred')} ? {x} : {y})", i.type)


@opcode("cvt")
def convert(f: Function, i: Instruction) -> None:
    rounding = i.one_of("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna") or "none"
    i.refuse_other_than("rn", "rz", "rni", "rzi", "rmi", "rpi", "rna", "ftz", "sat", "relu", *i.parts[-2:])
    to, source = i.parts[-2:]
    if to in PAIRS:
        if source != "f32":
            raise UnsupportedError(f"a conversion from {source}")
        high, low = (f.read(arg, "f32") for arg in i.args[1:3])
        if i.has("relu"):
            high, low = f"op::max_nan<float>({high}, 0.0f)", f"op::max_nan<float>({low}, 0.0f)"
        f.write(
            i.args[0], f"joined<uint32_t>({_rounded(PAIRS[to], rounding, low)}, {_rounded(PAIRS[to], rounding, high)})"
        )
        return
    x = f.read(i.args[1], source)
    if i.has("ftz") and source == "f32":
        x = f"flush({x})"
    if i.has("relu"):
        x = f"op::max_nan<float>({x}, 0.0f)"
    if to == "tf32" or to in ("f16", "bf16"):
        value = _rounded(to, rounding, x)
    elif i.has("sat") and to in FLOATS:
        value = f"saturate(convert<{cpp(to)}, Rounding::{rounding}>({x}))"
    elif i.has("sat"):
        value = f"clamped<{cpp(to)}>({x})"
    else:
        value = f"convert<{cpp(to)}, Rounding::{rounding}>({x})"
    f.write(i.args[0], value)


def _rounded(to: str, rounding: str, x: str) -> str:
    if to == "tf32":
        return f"tf32<Rounding::{rounding}>({x})"
    if rounding == "rz":
        return f"towards_zero<{cpp(to)}>({x})"
    return f"convert<{cpp(to)}, Rounding::{rounding}>({x})"


@opcode("bra")
def branch(f: Function, i: Instruction) -> None:
    to = label(i.args[-1])
    if f"{to}:;" in f.out:
        f.emit(f"loop({i.line});")
    f.emit(f"goto {to};")


@opcode("brx")
def branch_table(f: Function, i: Instruction) -> None:
    index, table = i.args
    f.emit(f"switch ({f.read(index, 'u32')}) {{")
    for n, target in enumerate(f.targets[table]):
        f.emit(f"case {n}: goto {label(target)};")
    f.emit("}")


@opcode("ret", "exit")
def end(f: Function, i: Instruction) -> None:
    f.emit("return;")


@opcode("trap")
def trap(f: Function, i: Instruction) -> None:
    f.emit(f"trap({i.line}); return;")


@opcode("pmevent", "nanosleep", "griddepcontrol", "prefetch", "prefetchu", "applypriority", "discard")
def nothing(f: Function, i: Instruction) -> None:
    """Hints, and waiting: what is computed does not depend on them."""
