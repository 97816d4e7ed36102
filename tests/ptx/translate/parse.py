"""Reads PTX text into kernels, variables and statements, each with its line and the source line it came from.

PTX is line-oriented only in its directives: a statement ends at a semicolon, braces open scopes, and inline assembly
puts several statements on a line. So the text is scanned by position; comments are blanked first, so that positions
and line numbers stay true.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from pathlib import Path

from ptx.translate.types import WIDTH


class UnsupportedError(Exception):
    """PTX that the runner does not know; it must be taught, or the kernel written otherwise."""


@dataclass(frozen=True)
class Variable:
    """A declared variable: ``space`` is shared, global, const, local or param."""

    space: str
    name: str
    type: str
    bytes: int  # 0: its size is given at launch (extern shared)
    align: int
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statement:
    """One instruction, or what else stands in a body: a label, a scope's brace, a declaration.

    ``kind``: ``instruction``, ``label``, ``open``, ``close``, ``registers``, ``variable``, ``targets``.
    """

    kind: str
    line: int
    source: str = ""
    text: str = ""
    guard: str = ""
    opcode: str = ""
    operands: tuple[str, ...] = ()
    variable: Variable | None = None


@dataclass
class Kernel:
    name: str
    line: int
    params: list[Variable]
    directives: str
    body: list[Statement]


@dataclass
class Module:
    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def split(text: str) -> list[str]:
    """Splits at the commas that stand outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def parse(text: str) -> Module:
    return _Parser(text).module()


_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?P<space>shared|global|const|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?P<vector>\.v\d\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)"
    r"(?P<array>(?:\[\d*\])*)\s*(?:=\s*(?P<values>.*))?$",
    re.S,
)
_BLANK = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+[^\n]*")
_BODY_DIRECTIVE = re.compile(r"\.(?:pragma|section)[^\n]*")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(\([^)]*\))?([^{]*)\{")
_FUNCTION = re.compile(r"\.func\b[^{;]*[{;]")
_MODULE_VARIABLE = re.compile(r"^[ \t]*(?:\.(?:visible|extern|weak|common)\s+)*\.(?:shared|global|const)\s[^;]*;", re.M)
_GUARD = re.compile(r"@(!?[\w$%]+)\s+(.*)", re.S)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = _BLANK.sub(lambda m: re.sub(r"[^\n]", " ", m.group(0)), text)
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.files = {number: Path(name).name for number, name in _FILE.findall(text)}
        self.source = ""

    def line(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position)

    def module(self) -> Module:
        target = re.search(r"\.target\s+(\w+)", self.text)
        result = Module(target.group(1) if target else "")
        outside, position = [], 0
        while (entry := _ENTRY.search(self.text, position)) is not None:
            outside.append(self.text[position : entry.start()])
            name, params, directives = entry.groups()
            body, position = self._body(entry.end())
            kernel = Kernel(name, self.line(entry.start()), self._params(params), directives, body)
            result.kernels[name] = kernel
        outside.append(self.text[position:])
        for part in outside:
            part = _without_functions(part)
            result.variables += [variable(m.group(0).rstrip(";")) for m in _MODULE_VARIABLE.finditer(part)]
        return result

    def _params(self, text: str | None) -> list[Variable]:
        plain = re.sub(r"\.ptr\b(\s*\.(global|shared|const|local))?(\s*\.align\s+\d+)?", "", (text or "()")[1:-1])
        return [variable(part) for part in split(plain)]

    def _body(self, position: int) -> tuple[list[Statement], int]:
        found: list[Statement] = []
        depth = 1
        while True:
            position = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
            line, char = self.line(position), self.text[position]
            if char in "{}":
                depth += 1 if char == "{" else -1
                position += 1
                if depth == 0:
                    return found, position
                found.append(Statement("open" if char == "{" else "close", line))
            elif (loc := _LOC.match(self.text, position)) is not None:
                self.source = self._source(loc)
                position = loc.end()
            elif (skip := _BODY_DIRECTIVE.match(self.text, position)) is not None:
                position = skip.end()
            elif (label := _LABEL.match(self.text, position)) is not None:
                found.append(Statement("label", line, text=label.group(1)))
                position = label.end()
            else:
                end = self.text.index(";", position)
                if end > position:
                    found.append(self._statement(line, self.text[position:end].strip()))
                position = end + 1

    def _source(self, loc: re.Match[str]) -> str:
        here = f"{self.files.get(loc.group(1), '?')}:{loc.group(2)}"
        caller = _INLINED.search(loc.group(0))
        return here if caller is None else f"{here}, called at {self.files.get(caller[1], '?')}:{caller[2]}"

    def _statement(self, line: int, text: str) -> Statement:
        if text.startswith(".reg"):
            return Statement("registers", line, text=text)
        if text.startswith(".branchtargets"):
            return Statement("targets", line, operands=tuple(split(text.split(None, 1)[1])))
        if text.startswith("."):
            return Statement("variable", line, variable=variable(text))
        guard = _GUARD.match(text)
        guarded, plain = (guard.group(1), guard.group(2)) if guard else ("", text)
        opcode, _, operands = plain.partition(" ") if " " in plain else plain.partition("\t")
        opcode = re.split(r"\s", plain, maxsplit=1)[0]
        operands = plain[len(opcode) :]
        return Statement("instruction", line, self.source, text, guarded, opcode, tuple(split(operands.strip())))


def variable(text: str) -> Variable:
    found = _VARIABLE.match(text.strip())
    if found is None:
        raise UnsupportedError(f"the declaration {text.strip()!r}")
    size = WIDTH[found["type"]] // 8 * (int(found["vector"].strip()[2:]) if found["vector"] else 1)
    for count in re.findall(r"\[(\d*)\]", found["array"]):
        size *= int(count or 0)
    values = tuple(split(found["values"].strip().strip("{}"))) if found["values"] else ()
    return Variable(
        found["space"], found["name"], found["type"], size, int(found["align"] or WIDTH[found["type"]] // 8), values
    )


def _without_functions(text: str) -> str:
    """Leaves out the bodies of device functions: a kernel that calls one is refused at the call."""
    found = _FUNCTION.search(text)
    while found is not None:
        end = found.end()
        depth = 1 if text[end - 1] == "{" else 0
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        text = text[: found.start()] + text[end:]
        found = _FUNCTION.search(text)
    return text
