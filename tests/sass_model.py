"""How fast the CUDA attention kernels would run on an H200, by their machine code: ``make sass-model``.

A multiprocessor issues the main loops of its blocks: each of four schedulers one instruction a clock, of the warp that
it issued last if that can go on. A warp goes on when the stall count of its last instruction is over and the
scoreboards that it waits for are free. Tensor cores, the units of each scheduler and shared memory, which all four have
in common, take as long as ``UNITS`` says; barriers wait for all warps. What the model does not know is memory: copies
arrive after ``COPY`` clocks, the rest of a kernel costs nothing, and all blocks are alike.

Two of its figures have been measured: of the kernels of commit c6cc6c5 it says 201 TFLOP/s forward and 105 backward at
128 columns (with the copies that their loops branch to), and an H200 ran them at 196 to 205 and at 99. So it is for
comparing versions of a loop where there is no GPU, and what it says is a prediction. Of kernels that use wgmma none has
been measured: those that copy are taken to be on time, and tensor cores to keep up their peak, which no card does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

import cuda_table
from sass import NO_SCOREBOARD, Code, Instruction, kernel, shortest_loop

ARCH, MULTIPROCESSORS, CLOCK = "sm_90a", 132, 1.755e9
WARPS, REGISTERS, SHARED = 4, 65536, 227 * 1024  # of a block; of a multiprocessor
PRODUCT = 16 * 8 * 16  # multiply-adds of an HMMA
OF_WARPGROUP = 0.5  # clocks of 16 rows by one column and 16 terms of wgmma, whose rate is the peak
COPY, BARRIER, QUEUE = 700, 16, 24  # clocks; the last: how much shared memory takes on before a warp has to wait
STEPS, FIRST = 30, 6  # of the simulation, and which is looked at first
# Clocks that an instruction takes its unit for, and until its result is there where a scoreboard tells. Rates by the
# CUDA C++ Programming Guide ("Arithmetic Instructions"); of products two thirds of the peak, as mma.sync has on Hopper
# (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", 2024); copies are a guess.
UNITS: dict[str, tuple[str, float, int]] = {
    "HMMA": ("tensor core", 6.2, 33),
    "MUFU": ("special", 8, 22),
    "IMAD": ("integer", 2, 5),
    **dict.fromkeys(
        ["FMNMX", "FSETP", "FSEL", "F2FP", "IADD3", "ISETP", "LEA", "LOP3", "PRMT", "SEL", "SHF", "VIADD", "VIMNMX"],
        ("logic", 2.0, 5),
    ),
    "LDSM": ("shared", 4, 29),
    "LDS": ("shared", 1, 24),
    "STS": ("shared", 1, 10),
    "SHFL": ("shared", 2, 23),
    "LDGSTS": ("shared", 6, 20),
    "S2R": ("", 0, 30),
    "LDC": ("", 0, 30),
}


@dataclass
class Warp:
    block: int
    number: int
    path: Code
    ready: int
    place: int = 0
    step: int = 0
    at_barrier: bool = False
    scoreboards: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    copies: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)  # groups of wgmma under way: when each is done
    ended: list[int] = field(default_factory=list)  # when each step was over


class Multiprocessor:
    def __init__(self, paths: list[Code], blocks: int, warps: int = WARPS, taking_turns: bool = False):
        self.busy: dict[tuple[str, int], float] = defaultdict(float)  # until when a unit is
        self.met: dict[tuple[int, str], list[Warp | None]] = defaultdict(list)  # at a barrier; None: does not wait
        self.warps = [
            Warp(b, w, paths[w % len(paths)], ready=131 * b + 3 * w) for b in range(blocks) for w in range(warps)
        ]
        self.blocks, self.of_block, self.taking_turns = blocks, warps, taking_turns
        if taking_turns:  # the first is that of the first warpgroup, which the last one gives
            self.met[0, "turn 0"] += [None] * 4

    def run(self) -> float:
        """Clocks in which every block makes one step."""
        queues = [[w for w in self.warps if w.number % 4 == s] for s in range(4)]
        clock = 0
        while any(w.step < STEPS for w in self.warps):
            for s in sorted(range(4), key=lambda s: (clock + s) % 4):  # nobody is always first at shared memory
                issued = next((w for w in queues[s] if self._issue(w, clock)), None)
                if issued:
                    queues[s].sort(key=lambda w: w is not issued)
            clock += 1
        begin = max(w.ended[FIRST] for w in self.warps)
        end = min(w.ended[-1] for w in self.warps)
        steps = sum(begin <= t < end for w in self.warps for t in w.ended) / self.of_block
        return (end - begin) / steps * self.blocks

    def _issue(self, warp: Warp, clock: int) -> bool:
        if warp.step == STEPS or warp.ready > clock or warp.at_barrier:
            return False
        x = warp.path[warp.place]
        if any(t > clock for i in x.waits for t in warp.scoreboards[i]):
            return False
        if x.unit == "DEPBAR" and any(t > clock for t in warp.copies):
            return False
        if x.opcode.startswith("WARPGROUP.DEPBAR") and not self._products_done(warp, x, clock):
            return False
        if x.unit == "HGMMA":
            self._begin_product(warp, x, clock)
        unit, clocks, latency = UNITS.get(x.unit, ("", 0, 5))
        key = (unit, 0 if unit == "shared" else warp.number % 4)
        if unit and self.busy[key] > clock + (QUEUE if unit == "shared" else 0):
            return False
        if unit and "@!PT" not in x.text:
            clocks *= _width(x)
            start = max(self.busy[key], clock - (unit != "shared"))
            self.busy[key] = start + clocks
            latency += (start - clock + clocks) * (unit == "shared")
        if x.unit == "LDGSTS":
            warp.copies = [t for t in warp.copies if t > clock] + [clock + COPY]
        for i in {x.written, x.read} - {NO_SCOREBOARD}:
            warp.scoreboards[i] = [t for t in warp.scoreboards[i] if t > clock] + [clock + latency]
        warp.ready = clock + max(x.stall, 1)
        if x.unit == "BAR":
            self._meet(warp, x, clock)
        warp.place += 1
        if warp.place == len(warp.path):
            warp.place, warp.step = 0, warp.step + 1
            warp.ended.append(clock)
        return True

    def _begin_product(self, warp: Warp, x: Instruction, clock: int) -> None:
        """Tensor cores make one product of a scheduler's warps after the other, while these go on.

        They read 16 terms of each column, of 2 bytes, and of 64 rows unless these are in registers; what else is read
        from shared memory meanwhile is little.
        """
        rows = 0 if re.search(r" R\d+, R\d+, gdesc", x.text) else 64
        of_warp = (columns(x) + rows) * 32 / 128 / 4  # clocks
        read, core = ("operands", 0), ("tensor core", warp.number % 4)
        self.busy[read] = max(self.busy[read], clock) + of_warp
        self.busy[core] = max(max(self.busy[core], clock) + OF_WARPGROUP * columns(x), self.busy[read])
        if "gsb0" in x.text:
            warp.products.append(self.busy[core])

    def _products_done(self, warp: Warp, x: Instruction, clock: int) -> bool:
        warp.products = [t for t in warp.products if t > clock]
        return len(warp.products) <= int(x.text.split()[-1], 16)

    def _meet(self, warp: Warp, x: Instruction, clock: int) -> None:
        found = re.search(r"BAR\.(\w+)\S*\s+(\w+)(?:, (\w+))?", x.text)
        assert found is not None, x.text
        kind, name, threads = found.groups()
        if threads and int(threads, 16) > 32 * self.of_block:  # with those that copy: they are always on time
            return
        if name.startswith("R"):
            name = f"pair {warp.number // 2}"
            if self.taking_turns:  # a warpgroup waits for its turn, and gives the next one's
                name = f"turn {(warp.number // 4 + (kind != 'SYNC')) % (self.of_block // 4)}"
        met = self.met[warp.block, name]
        warp.at_barrier = kind == "SYNC"
        met.append(warp if warp.at_barrier else None)
        if len(met) == (int(threads, 16) // 32 if threads else self.of_block):
            for waiting in filter(None, met):
                waiting.at_barrier, waiting.ready = False, max(waiting.ready, clock + BARRIER)
            met.clear()


def columns(x: Instruction) -> int:
    """Of a product of a warpgroup, of which each warp has 16 rows."""
    found = re.search(r"64x(\d+)x16", x.text)
    assert found is not None, x.text
    return int(found[1])


def computing_warps(code: Code) -> int:
    """Of a kernel of Hopper's: whole warpgroups, which take over nearly all registers."""
    (taken,) = [int(x.text.split()[-1], 16) for x in code if x.opcode.startswith("USETMAXREG.TRY_ALLOC")]
    return REGISTERS // (128 * taken) * 4


def _width(x: Instruction) -> int:
    if x.unit not in ("LDS", "STS"):
        return 1
    return 4 if ".128" in x.opcode else 2 if ".64" in x.opcode else 1


def loops(name: str) -> list[list[Instruction]]:
    """The main loop of a kernel: one way around it, or one for each warp of a pair that meets at a barrier."""
    code = kernel(ARCH, name)
    if any(x.unit == "HGMMA" for x in code):  # through the wait with products of the next step under way
        (wait,) = [x for x in code if x.text.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1")]
        way = shortest_loop(code, wait)
        begin = 1 + max(i for i, x in enumerate(way) if x.opcode.startswith("BAR.ARV"))  # where the turn was given
        return [way[begin:] + way[:begin]]
    barriers = [x for x in code if x.unit == "BAR"]
    ways = [way for x in barriers if (way := shortest_loop(code, x)) and any(y.unit == "HMMA" for y in way)]
    of_pairs = [way for way in ways if re.search(r" R\d+, ", way[0].text)]
    sides = [[way for way in of_pairs if way[0].opcode.startswith(side)] for side in ("BAR.ARV", "BAR.SYNC")]
    return [min(side, key=len) for side in sides if side] or [min(ways, key=len)]


def speed(name: str, products: int, blocks: int) -> tuple[float, float]:
    """Clocks of a multiprocessor for each score and column of a head, and TFLOP/s of its ``products``."""
    paths = loops(name)
    if any(x.unit == "HGMMA" for x in paths[0]):
        warps = computing_warps(kernel(ARCH, name))
        work = sum(16 * 16 * columns(x) for x in paths[0] if x.unit == "HGMMA") * warps / products
        clocks = Multiprocessor(paths, blocks, warps, taking_turns=True).run() / work
    else:
        work = sum(x.unit == "HMMA" for path in paths for x in path) / len(paths) * WARPS * PRODUCT / products
        clocks = Multiprocessor(paths, blocks).run() / (blocks * work)
    return clocks, 2 * products / clocks * CLOCK * MULTIPROCESSORS / 1e12


def resident(row: str) -> int:
    """Blocks of a kernel of ``docs/cuda-kernels.txt`` that fit into a multiprocessor."""
    registers, _, static, dynamic = map(int, row.split()[-4:])
    of_block = -(-registers // 8) * 8 * 32 * WARPS
    return min(REGISTERS // of_block, SHARED // (static + dynamic + 1024))


def main() -> None:
    if (reason := cuda_table.missing()) is not None:
        raise SystemExit(f"no model: {reason}")
    table = cuda_table.TABLE.read_text().splitlines()
    for suffix in ("", "_sm90"):
        for width in (64, 128):
            backward = 0.0
            for stem, arguments, products in (("fwd", ", false", 2), ("bwd_key", "", 4), ("bwd_query", "", 3)):
                name = f"attention_{stem}{suffix}_kernel<bf16, {width}{'' if suffix else arguments}>"
                (row,) = [line for line in table if line.startswith(ARCH) and f" {name} " in line]
                blocks = 1 if suffix else resident(row)
                clocks, tflops = speed(name, products, blocks)
                backward += clocks if stem != "fwd" else 0
                print(f"{name:42} {blocks} blocks  {tflops:5.0f} TFLOP/s")
            effective = 2 * 5 / backward * CLOCK * MULTIPROCESSORS / 1e12
            print(f"{f'backward, {width} columns, of 5 products':42} {'':9} {effective:5.0f} TFLOP/s")


if __name__ == "__main__":
    main()
