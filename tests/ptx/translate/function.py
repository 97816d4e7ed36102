"""One kernel as one C++ function, ``body(const uint8_t* params)``, that each GPU thread runs on a stack of its own.

Registers become local variables, scopes of inline assembly become C++ scopes, labels labels. Parameters are read at
their offsets from ``params``; shared variables become offsets into the block's shared memory. Every call into the
runtime carries the PTX line, by which races, deadlocks and wild addresses are reported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ptx.translate.parse import Kernel, Module, Statement, UnsupportedError, Variable, split
from ptx.translate.types import WIDTH, cast, cpp, integral, unsigned

SHARED_BASE = 0x400  # where the first shared variable stands, as on devices of compute capability 8 and 9

Handler = Callable[["Function", "Instruction"], None]
HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    """Registers the translation of the opcodes whose first part is one of ``names``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@dataclass(frozen=True)
class Translation:
    """A kernel in C++, and what its PTX lines are: ``lines[n]`` is (source line, text)."""

    name: str
    code: str
    lines: dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Instruction:
    """An instruction as the handlers see it: ``parts`` are the opcode's words, ``args`` its operands."""

    parts: list[str]
    args: list[str]
    line: int
    text: str

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    def has(self, *words: str) -> bool:
        return any(word in self.parts for word in words)

    def one_of(self, *words: str) -> str:
        """The one of ``words`` that the opcode has, or an empty string."""
        return next((word for word in words if word in self.parts), "")

    def refuse_other_than(self, *words: str) -> None:
        """Stops where the opcode has a modifier that its translation would ignore."""
        for part in self.parts[1:]:
            if part not in words:
                raise UnsupportedError(f"the modifier .{part}")


SPECIAL_REGISTERS = {
    "%laneid": "current->lane",
    "%warpid": "current->warp",
    "%nwarpid": "warp_count()",
    "%smid": "0u",
    "%nsmid": "multiprocessors",
    "%clock": "0u",
    "%clock64": "uint64_t(0)",
    "%globaltimer": "uint64_t(0)",
    "%dynamic_smem_size": "dynamic_shared_bytes()",
    "%lanemask_eq": "(1u << current->lane)",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_le": "(~0u >> (31 - current->lane))",
    "%lanemask_gt": "(~1u << current->lane)",
    "%lanemask_ge": "(~0u << current->lane)",
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
}
INDEX_REGISTERS = {
    "tid": "current->index",
    "ntid": "block_size",
    "ctaid": "block_index",
    "nctaid": "grid_size",
    "clusterid": "block_index",
    "nclusterid": "grid_size",
}
CLUSTER_OF_ONE = {"cluster_ctaid": "0u", "cluster_nctaid": "1u"}


@dataclass
class Function:
    kernel: Kernel
    module: Module
    out: list[str] = field(default_factory=list)
    scopes: list[dict[str, tuple[str, str]]] = field(default_factory=lambda: [{}])
    variables: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic_align: int = 16
    hints: int = 0
    features: set[str] = field(default_factory=set)

    def emit(self, line: str) -> None:
        self.out.append(line)

    def register(self, name: str) -> tuple[str, str] | None:
        """The C++ variable of a register and its type, from the innermost scope that declares it."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def read(self, operand: str, type: str) -> str:
        """A C++ expression of type ``cpp(type)``."""
        want = cpp(type)
        if operand.startswith("!"):
            return f"(!{self.read(operand[1:], type)})"
        if (register := self.register(operand)) is not None:
            return cast(register[0], register[1], want)
        if operand[0] in "-0123456789":
            return _literal(operand, want)
        if operand.startswith("%"):
            return f"{want}({_special(operand)})"
        return f"{want}({self.address_of(operand)})"

    def address_of(self, name: str) -> str:
        base, _, offset = name.partition("+")
        base = base.strip()
        extra = f" + {int(offset, 0)}" if offset else ""
        if base in self.shared:
            return f"({self.shared[base]}{extra})"
        if base in self.offsets:
            return f"({self.offsets[base]}{extra})"  # an address in the space of parameters is an offset
        if base in self.variables:
            return f"(reinterpret_cast<uintptr_t>(&{mangle(base)}){extra})"
        raise UnsupportedError(f"the operand {name!r}")

    def address(self, operand: str, *, shared: bool = False) -> str:
        """The address in ``[register + offset]``: 32 bits of shared memory, else 64."""
        inner = operand.strip()
        if inner.startswith("["):
            inner = inner[1:-1].strip()
        found = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", inner)
        name, offset = (found.group(1), int(found.group(2), 0)) if found else (inner, 0)
        register = self.register(name)
        narrow = shared or (register is not None and register[1] == "uint32_t")
        base = self.read(name, "u32" if narrow and not (register and register[1] == "uint64_t") else "u64")
        plain = base if offset == 0 else f"({base} + ({offset}))"
        return f"uint32_t({plain})" if shared else plain

    def write(self, operand: str, value: str, type: str = "") -> None:
        """Assigns a C++ expression; ``type``, where given, is the PTX type that it has."""
        if operand == "_":
            self.emit(f"(void)({value});")
            return
        register = self.register(operand)
        if register is None:
            raise UnsupportedError(f"the destination {operand!r}")
        converted = cast(value, cpp(type), register[1]) if type else f"bits<{register[1]}>({value})"
        self.emit(f"{register[0]} = {converted};")

    def hint(self) -> str:
        """A place of its own in which an access remembers the tensor it touched."""
        self.hints += 1
        return f"hints[{self.hints - 1}]"

    def vector(self, operand: str) -> list[str]:
        return split(operand[1:-1]) if operand.startswith("{") else [operand]

    # -- declarations

    def declare_registers(self, text: str) -> None:
        type, names = re.match(r"\.reg\s*\.(\w+)\s+(.+)", text, re.S).groups()  # type: ignore[union-attr]
        of = {"f32": "float", "f64": "double"}.get(type) or unsigned(type)
        declared = []
        for name in split(names):
            run = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            declared += [f"{run[1]}{i}" for i in range(int(run[2]))] if run else [name]
        self.scopes[-1].update({name: ("v_" + _word(name), of) for name in declared})
        self.emit(f"{of} " + ", ".join("v_" + _word(name) for name in declared) + ";")

    def declare_shared(self, variable: Variable) -> None:
        if variable.bytes == 0:
            self.shared[variable.name] = "dynamic_shared()"
            self.dynamic_align = max(self.dynamic_align, variable.align)
            return
        start = -(-self.shared_bytes // variable.align) * variable.align
        self.shared[variable.name] = f"{SHARED_BASE + start}u"
        self.shared_bytes = start + variable.bytes

    def declare_local(self, variable: Variable) -> None:
        if variable.space not in ("local", "global", "const"):
            raise UnsupportedError(f"a .{variable.space} variable in a body")
        self.variables[variable.name] = variable
        static = "" if variable.space == "local" else "static "
        self.emit(f"{static}alignas({max(variable.align, 1)}) uint8_t {mangle(variable.name)}[{variable.bytes}];")

    # -- statements

    def statement(self, statement: Statement) -> None:
        if statement.kind == "open":
            self.scopes.append({})
            self.emit("{")
        elif statement.kind == "close":
            self.scopes.pop()
            self.emit("}")
        elif statement.kind == "label":
            self.emit(f"{label(statement.text)}:;")
        elif statement.kind == "registers":
            self.declare_registers(statement.text)
        elif statement.kind == "variable":
            assert statement.variable is not None
            shared = statement.variable.space == "shared"
            (self.declare_shared if shared else self.declare_local)(statement.variable)
        elif statement.kind == "instruction":
            self.instruction(statement)

    def instruction(self, statement: Statement) -> None:
        parts = [part for word in statement.opcode.split(".") for part in [word] if part]
        instruction = Instruction(parts, list(statement.operands), statement.line, statement.text)
        handler = HANDLERS.get(instruction.base)
        try:
            if handler is None:
                raise UnsupportedError(f"the opcode {instruction.base}")
            if statement.guard:
                negated = statement.guard.startswith("!")
                predicate = self.read(statement.guard.lstrip("!"), "pred")
                self.emit(f"if ({'!' if negated else ''}{predicate}) {{")
            handler(self, instruction)
            if statement.guard:
                self.emit("}")
        except (UnsupportedError, KeyError, IndexError, ValueError) as error:
            where = f"{self.kernel.name}, PTX line {statement.line} ({statement.source})"
            raise UnsupportedError(f"{where}: `{statement.text}`: the runner does not know {error}") from error


def translate(module: Module, name: str) -> Translation:
    """The C++ translation unit of one kernel of ``module``."""
    kernel = module.kernels[name]
    function = Function(kernel, module)
    offset = 0
    for param in kernel.params:
        offset = -(-offset // param.align) * param.align
        function.offsets[param.name] = offset
        offset += param.bytes
    constants = _module_variables(function, kernel)
    for index, statement in enumerate(kernel.body):
        if statement.kind == "targets":
            function.targets[kernel.body[index - 1].text] = statement.operands
    for statement in kernel.body:
        function.statement(statement)
    code = [
        "// " + name,
        '#include "instructions.h"',
        "using namespace ptx;",
        *constants,
        f"static uint32_t hints[{max(function.hints, 1)}];",
        "static void body(const uint8_t* params) {",
        *function.out,
        "}",
        *_image(function, offset),
    ]
    lines = {s.line: (s.source, s.text) for s in kernel.body if s.kind == "instruction"}
    return Translation(name, "\n".join(code) + "\n", lines)


def _module_variables(function: Function, kernel: Kernel) -> list[str]:
    """Declares the module's variables that this kernel names; returns the C++ of constants and globals."""
    text = " ".join(" ".join(s.operands) for s in kernel.body)
    declared = []
    for variable in function.module.variables:
        if re.search(rf"(?<![\w$]){re.escape(variable.name)}(?![\w$])", text) is None:
            continue
        if variable.space == "shared":
            function.declare_shared(variable)
            continue
        function.variables[variable.name] = variable
        declared.append(_with_values(variable))
    return declared


def _with_values(variable: Variable) -> str:
    width = WIDTH[variable.type] // 8
    values = []
    for value in variable.values:
        if not re.fullmatch(r"-?\w+", value):
            raise UnsupportedError(f"the initial value {value!r} of {variable.name}")
        values.append(_literal(value, f"uint{8 * width}_t"))
    count = max(variable.bytes // width, 1)
    initial = ", ".join(values)
    return f"alignas({variable.align}) static uint{8 * width}_t {mangle(variable.name)}[{count}] = {{{initial}}};"


def _image(function: Function, params_bytes: int) -> list[str]:
    params = function.kernel.params
    offsets = ", ".join(str(function.offsets[p.name]) for p in params) or "0"
    sizes = ", ".join(str(p.bytes) for p in params) or "0"
    limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", function.kernel.directives)
    threads = 1
    for factor in split(limit.group(1)) if limit else ["1024"]:
        threads *= int(factor)
    extents = [v for v in function.variables.values() if v.space in ("global", "const") and v.bytes]
    spaces = ", ".join(
        f'{{"{v.name}", {mangle(v.name)}, {v.bytes}}}' for v in extents if v in function.module.variables
    )
    static = -(-function.shared_bytes // function.dynamic_align) * function.dynamic_align
    flag = {name: str(name in function.features).lower() for name in ("cp_async", "async_proxy")}
    return [
        f"static const uint32_t offsets[] = {{{offsets}}};",
        f"static const uint32_t sizes[] = {{{sizes}}};",
        f"static const Constant constants[] = {{{spaces or '{nullptr, nullptr, 0}'}}};",
        'extern "C" const Image image = {',
        f'    "{function.kernel.name}", body, {len(params)}, offsets, sizes, {params_bytes}, {static},',
        f"    {threads}, {flag['cp_async']}, {flag['async_proxy']}, constants}};",
    ]


def mangle(name: str) -> str:
    return "m_" + _word(name)


def label(name: str) -> str:
    return "L_" + _word(name)


def _word(name: str) -> str:
    plain = re.sub(r"\W", "_", name.lstrip("%"))
    return plain if "$" not in name else f"{plain}_{hashlib.md5(name.encode()).hexdigest()[:6]}"


def _literal(text: str, want: str) -> str:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return f"bits<{want}>(0x{text[2:]}u)"
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return f"bits<{want}>(uint64_t(0x{text[2:]}ull))"
    value = int(text.rstrip("U"), 0) & (2**64 - 1)
    if integral(want) and want != "bool":
        return f"{want}({value & 0xFFFFFFFF}u)" if "64" not in want else f"{want}({value}ull)"
    if want in ("float", "double", "half", "bfloat16"):
        raise UnsupportedError(f"the literal {text!r} as {want}")
    return f"static_cast<{want}>({value}ull)"


def _special(name: str) -> str:
    if name in SPECIAL_REGISTERS:
        return SPECIAL_REGISTERS[name]
    base, _, axis = name[1:].partition(".")
    if base in CLUSTER_OF_ONE:
        return CLUSTER_OF_ONE[base]
    if base in INDEX_REGISTERS and axis in ("x", "y", "z"):
        return f"{INDEX_REGISTERS[base]}.{axis}"
    raise UnsupportedError(f"the register {name}")
