"""The machine code of the CUDA kernels: instructions with what the compiler tells the hardware, and the shortest way
around a loop.

An instruction of 128 bits ends with its control bits (from bit 105 on): how many clocks its warp waits after it, which
of six scoreboards it holds until its result is there or its operands are read, and for which it waits itself. They are
not documented; Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, section 2.1,
found them, and they have kept their places since.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_table import dump, names_of

NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    stall: int  # clocks
    written: int  # scoreboard, or NO_SCOREBOARD
    read: int
    waits: tuple[int, ...]  # scoreboards

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def unit(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.findall(r"0x([0-9a-f]+)", self.text)
        return int(found[-1], 16) if self.unit == "BRA" and found else None


Code = Sequence[Instruction]


def kernel(arch: str, name: str) -> list[Instruction]:
    """The instructions of a kernel of the module, by its readable name."""
    (mangled,) = [mangled for mangled, readable in names_of(arch).items() if readable == name]
    found = []
    instruction = r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/\s+/\* 0x([0-9a-f]+) \*/"
    for address, text, upper in re.findall(instruction, dump("-sass", "-arch", arch, "-fun", mangled)):
        bits = int(upper, 16) >> 41  # 105 - 64
        waits = tuple(i for i in range(6) if bits >> 11 + i & 1)
        found.append(Instruction(int(address, 16), text, bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits))
    return found


def shortest_loop(code: Code, through: Instruction) -> list[Instruction]:
    """From an instruction back to it, by as few instructions as there are on a way; empty where it is in no loop.

    What is asked for by few calls only, such as masks, dropout or a bias, is skipped by a branch: the shortest way is
    that of a call that asks for nothing.
    """
    at = {x.address: i for i, x in enumerate(code)}
    start = code.index(through)
    came_from: dict[int, int] = {}
    waiting = deque([start])
    while waiting and start not in came_from:
        i = waiting.popleft()
        for j in _following(code, i, at):
            if j not in came_from:
                came_from[j] = i
                waiting.append(j)
    way = []
    while start in came_from and (not way or way[-1] != start):
        way.append(came_from[way[-1] if way else start])
    return [code[i] for i in reversed(way)]


def _following(code: Code, i: int, at: dict[int, int]) -> list[int]:
    target = code[i].target
    jump = [at[target]] if target is not None and target in at else []
    ends = code[i].unit in ("BRA", "EXIT") and not code[i].predicated
    return jump if ends or i + 1 == len(code) else [*jump, i + 1]
