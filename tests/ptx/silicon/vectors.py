"""The kernels of vectors.cu with what they are given: words made of a hash and of values at which something changes.

Nothing but the standard library, and the same words on every machine: a recording holds their digest, not the words.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, product
from pathlib import Path

SOURCE = Path(__file__).parent / "vectors.cu"
Words = list[int]


@dataclass(frozen=True)
class Map:
    """A tensor map of the input as a matrix of 16-bit columns, of which it tells the first; a row is a slot."""

    columns: int
    box: tuple[int, int]  # rows, columns
    swizzle: int  # bytes of a row; 0: none


@dataclass(frozen=True)
class Vectors:
    """A kernel: ``inputs`` gives each input slot's words, one to a thread; ``maps`` are its further arguments."""

    inputs: Callable[[], Sequence[Words]]
    outputs: int  # slots
    block: int = 32
    maps: tuple[Map, ...] = ()

    @property
    def words(self) -> array[int]:
        slots = self.inputs()
        assert {len(slot) for slot in slots} == {len(slots[0])}
        assert len(slots[0]) % self.block == 0
        return array("I", chain.from_iterable(slots))

    @property
    def threads(self) -> int:
        return len(self.inputs()[0])


def digest(words: array[int]) -> str:
    return hashlib.sha256(words.tobytes()).hexdigest()[:16]


@cache
def instructions(kernel: str) -> dict[int, str]:
    """The instruction whose first result is in an output slot, as vectors.cu has it."""
    body = SOURCE.read_text().split(f" {kernel}(", 1)[1].split('extern "C"', 1)[0]
    body = "\n".join(line for line in body.splitlines() if not line.endswith("\\"))
    helpers = r"(?:\{\.reg \.pred p; )?(?:setp\.ne\.u32 p, %1, 0; )?"
    found = re.findall(rf'\b[A-Z]\w*\((\d+),[^";]*(?:"[rh]",\s*)?"{helpers}([a-z]\w*(?:\.\w+)+)', body)
    return {int(slot): name for slot, name in found}


# -- words


def hashed(i: int, salt: int = 0) -> int:
    """32 bits that look random: the finalizer of MurmurHash3."""
    x = (i * 0x9E3779B1 + salt * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


def f32(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def f16(x: float) -> int:
    return struct.unpack("<H", struct.pack("<e", x))[0]


def bf16(x: float) -> int:
    """Towards zero."""
    return f32(x) >> 16


def between(low: float, high: float, salt: int) -> Iterator[int]:
    """Floats evenly spread, as words, without end."""
    i = 0
    while True:
        yield f32(low + (high - low) * hashed(i, salt) / 2**32)
        i += 1


def in_binades(low: int, high: int, salt: int, *, signed: bool = False) -> Iterator[int]:
    """Floats of a random exponent from ``low`` to ``high``, as words, without end."""
    i = 0
    while True:
        sign = hashed(i, salt + 2) >> 31 << 31 if signed else 0
        yield sign | (127 + low + hashed(i, salt) % (high - low + 1)) << 23 | hashed(i, salt + 1) >> 9
        i += 1


MAGNITUDES = [
    0x00000000,  # zero
    *(0x00000001, 0x00000002, 0x00012345, 0x003FFFFF, 0x00400000, 0x007FFFFF),  # subnormals
    *(0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x01800000),  # the smallest normals
    *(0x33000000, 0x33800000, 0x34000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F000000, 0x3FC00000),  # about 1
    *(0x40000000, 0x40400000, 0x40490FDB, 0x3FC90FDB, 0x4B000000, 0x4B7FFFFF, 0x4B800001, 0x4EFFFFFF, 0x4F000000),
    *(0x7E7FFFFF, 0x7E800000, 0x7E800001, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFF),  # the largest
    *(0x7F800000, 0x7F800001, 0x7FA55555, 0x7FC00000, 0x7FFFFFFF),  # infinity, NaN
]
SPECIAL = [word | sign for word in MAGNITUDES for sign in (0, 1 << 31)]
_MAGNITUDES_16 = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0x81,
    0x3FF,
    0x400,
    0x401,
    0x3C00,
    0x3C01,
    0x3F80,
    0x4248,
    0x7BFF,
    0x7C00,
    0x7C01,
)
SPECIAL_16 = [
    word | sign for word in (*_MAGNITUDES_16, 0x7E00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF) for sign in (0, 1 << 15)
]
PROBED = 3072  # inputs of an approximate function


def of_function(extra: Sequence[float], *dense: Iterator[int]) -> Words:
    """The special values, every binade of both signs, ``extra``, and the rest from ``dense`` in turn."""
    every = [exponent << 23 | sign | hashed(exponent, 7) >> 9 for exponent in range(255) for sign in (0, 1 << 31)]
    words = [*SPECIAL, *every, *map(f32, extra)]
    return [*words, *islice(chain.from_iterable(zip(*dense, strict=True)), PROBED - len(words))]


def _approximate() -> list[Words]:
    half_pi = [n * math.pi / 2 for n in range(-4, 5)]
    powers = [*range(-152, 131), *(n + 0.5 for n in range(-152, 131)), -126.0001, 127.9999, -149.9, -149.1]
    functions = [
        of_function(powers, between(-150, 130, 11), between(-2, 2, 12), in_binades(-30, -2, 13, signed=True)),
        of_function([1 + n / 2**23 for n in range(-40, 40)], between(0.5, 2, 14), in_binades(-126, 127, 15)),
        of_function([], in_binades(-1, 1, 20, signed=True), in_binades(-126, 127, 23, signed=True)),
        of_function([n * n for n in range(50)], in_binades(-1, 2, 30), in_binades(-126, 127, 33)),
        of_function([n * n for n in range(50)], in_binades(-1, 2, 40), in_binades(-126, 127, 43)),
        of_function([], in_binades(-14, 4, 50, signed=True), between(-2, 2, 53)),
        of_function(half_pi, between(-math.pi, math.pi, 60), in_binades(-20, 7, 61, signed=True)),
        of_function(half_pi, between(-math.pi, math.pi, 70), in_binades(-20, 7, 71, signed=True)),
    ]
    ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos = functions
    twice = [words for words in (ex2, lg2, rcp, rsqrt, sqrt) for _ in range(2)]
    return [*twice, tanh, sin, sin, cos, cos, rcp, rcp, sqrt, sqrt]


def _approximate_pairs() -> list[Words]:
    """Every seventeenth of the 16-bit words, special ones, and those about 1."""
    some = [*SPECIAL_16, *range(0, 1 << 16, 17)][:3840]
    of_f16 = [*some, *(0x3B00 + 4 * (n % 128) | n // 128 << 15 for n in range(256))]
    of_bf16 = [*some, *(0x3F00 + (n % 128) | n // 128 << 15 for n in range(256))]
    return [
        [low | high << 16 for low, high in zip(x[::2], x[1::2], strict=True)]
        for x in (of_f16, of_f16, of_bf16, of_bf16)
    ]


def _pairs_of_special(values: Sequence[int]) -> tuple[Words, Words]:
    x, y = zip(*product(values, values), strict=True)
    return list(x), list(y)


def _divide() -> list[Words]:
    few = [word for n, word in enumerate(SPECIAL) if n % 2 == 0 or word in (0x80000000, 0xBF800000, 0xFF800000)]
    x, y = _pairs_of_special(few)
    streams = [in_binades(-3, 3, 80), in_binades(-3, 3, 83, signed=True)]
    streams += [in_binades(-126, 127, 86, signed=True), in_binades(-126, 127, 89, signed=True)]
    streams += [in_binades(-3, 3, 92), in_binades(124, 127, 95)]
    n = (3072 - len(x)) // 3
    for top, bottom in zip(streams[::2], streams[1::2], strict=True):
        x += islice(top, n)
        y += islice(bottom, n)
    missing = 3072 - len(x)
    return [x + SPECIAL[:missing], y + [0x40400000] * missing]


def _arithmetic() -> list[Words]:
    """Special values with each other, neighbours whose sums cancel, and random words."""
    some = [*SPECIAL[::3], 0x80000000, 0x7F800000, 0xFF800000]
    x, y = _pairs_of_special(some)
    z = [SPECIAL[hashed(i, 100) % len(SPECIAL)] for i in range(len(x))]
    near = list(islice(in_binades(-126, -100, 101, signed=True), 256))
    x += near
    y += [word ^ (1 << 31) ^ hashed(i, 104) % 1024 for i, word in enumerate(near)]
    z += [hashed(i, 105) & 0x81FFFFFF for i in range(256)]
    n = 1536 - len(x)
    streams = (in_binades(-70, 70, 110, signed=True), in_binades(-70, 70, 113, signed=True))
    return [
        [*x, *islice(streams[0], n)],
        [*y, *islice(streams[1], n)],
        [*z, *islice(in_binades(-120, 120, 116, signed=True), n)],
    ]


def _pairs_of_16(bits_of_exponent: int) -> list[Words]:
    """Pairs of 16-bit floats; of the random ones, half have exponents about 1."""
    x, y = _pairs_of_special([*SPECIAL_16[::2], 0x8000, 0x8001])
    z = [SPECIAL_16[hashed(i, 120) % len(SPECIAL_16)] for i in range(len(x))]
    mantissa = 15 - bits_of_exponent
    middle = ((1 << bits_of_exponent - 1) - 4) << mantissa

    def number(i: int, salt: int) -> int:
        word = hashed(i, salt) & 0xFFFF
        return word if i % 2 else (word & 0x8000) | (middle + (word & ((8 << mantissa) - 1)))

    slots = []
    for salt, low in ((121, x), (122, y), (123, z)):
        low = low + [number(i, salt) for i in range(1024 - len(low))]
        slots.append([word | number(i, salt + 10) << 16 for i, word in enumerate(low)])
    return slots


def _convert() -> list[Words]:
    """About each limit and half-way value of f16, bf16, tf32 and the integers, by one unit of float to either side."""
    points = [0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x33000000, 0x33000001, 0x38800000, 0x387FC000]
    points += [0x7F7F0000, 0x7F7F8000, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x00010000, 0x007F8000]
    points += [0x4F000000, 0x4F800000, 0xCF000000, 0x4EFFFFFF, *(f32(n + 0.5) for n in range(-6, 7)), f32(2**23 + 1)]
    points += [0x3F800000 + (n << shift) for shift in (12, 13, 15, 16) for n in range(1, 8)]
    points += [0x38000000 + (n << 12) for n in range(16)] + [0x33C00000 + (n << 20) for n in range(16)]
    about = [(point + by) & 0xFFFFFFFF | sign for point in points for by in (-1, 0, 1) for sign in (0, 1 << 31)]
    x = [*SPECIAL, *about, *islice(in_binades(-27, 34, 130, signed=True), 400)]
    x += islice(in_binades(-126, 127, 133, signed=True), 1280 - len(x))
    return [x, x[640:] + x[:640]]


def _convert_integers() -> list[Words]:
    edges = [0, 1, 2, 127, 128, 129, 255, 256, 32767, 32768, 65504, 65519, 65520, 65535, 65536, 2**24 - 1, 2**24 + 1]
    edges += [2**25 + 2, 2**25 + 6, 2**31 - 1, 2**31, 2**31 + 128, 2**31 + 384, 2**32 - 1]
    signed = [*edges, *(-n & 0xFFFFFFFF for n in edges), *SPECIAL_16]
    return [[*signed, *(hashed(i, 140) >> hashed(i, 141) % 32 for i in range(512 - len(signed)))]]


def _compare() -> list[Words]:
    x, y = _pairs_of_special([*SPECIAL[::3], 0x80000000, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000])
    missing = -len(x) % 128
    return [x + [0x3F800000] * missing, y + [0xBF800000 + i for i in range(missing)]]


def _integers() -> list[Words]:
    edges = [0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFF9, 0x0000FFFF, 0xFFFF0000, 0x55555555]
    x, y = _pairs_of_special(edges)
    n = 512
    x += [hashed(i, 150) >> (hashed(i, 151) % 32 if i % 4 == 0 else 0) for i in range(n - len(x))]
    y += [hashed(i, 152) >> (hashed(i, 153) % 32 if i % 3 == 0 else 0) for i in range(n - len(y))]
    z = [edges[i % len(edges)] if i % 5 == 0 else hashed(i, 154) for i in range(n)]
    start, length = (
        [hashed(i, salt) % 66 if i % 8 else (0, 31, 32, 255, 256)[i // 8 % 5] for i in range(n)] for salt in (155, 156)
    )
    return [x, y, z, start, length]


def _lanes() -> list[Words]:
    """A warp's block for each case. Bounds are 32 - width in the upper byte and the last lane (or 0) in the lower."""
    slots: list[Words] = [[], [], [], []]
    bounds = [31, 0, *((32 - width) << 8 | 31 for width in (2, 4, 8, 16)), *((32 - width) << 8 for width in (4, 16))]
    bounds += [15, 7, 0x1C07, 0x1003, 0x0A15]
    masks = [~0, 1, 0x80000000, 0x0000FFFF, 0x55555555, 0xF00F00F0, 0x7FFFFFFF, 0x00010010]
    for case in range(40):
        for lane in range(32):
            value = hashed(lane, 160 + case)
            if case % 5 < 2:  # all lanes vote alike
                value = value & ~1 | case % 5
            slots[0].append(value)
            slots[1].append(case % 33 if case < 33 else hashed(lane, 200 + case) % 40)
            slots[2].append(bounds[case % len(bounds)] if case < 36 else bounds[hashed(lane, 201) % len(bounds)])
            slots[3].append(masks[case % len(masks)] & 0xFFFFFFFF)
    return slots


def _barriers() -> list[Words]:
    return [[1] * 64 + [0] * 64 + [int(i == 37) for i in range(64)] + [hashed(i, 210) for i in range(64)]]


def _matrices() -> list[Words]:
    """Elements that are all different; rows in order, reversed and permuted."""
    data = [
        [2 * (4 * lane + i) | (2 * (4 * lane + i) + 1) << 16 for _ in range(3) for lane in range(32)] for i in range(4)
    ]
    orders = [*range(32), *range(31, -1, -1), *((5 * lane + 3) % 32 for lane in range(32))]
    return [*data, orders]


BLOCKS = 16  # of a matrix multiplication


def _fragments(word: Callable[[float], int], packed: int) -> list[Words]:
    """Blocks 0 to 3: small integers, whose sums are exact. 4 to 15: see ``_element``."""
    slots: list[Words] = [[] for _ in range(10)]
    for block in range(BLOCKS):
        for lane in range(32):
            for slot in range(10):
                place = 1000 * block + 32 * slot + lane
                if slot >= 6:
                    slots[slot].append(f32(_element(block, place, "c")))
                    continue
                matrix = "a" if slot < 4 else "b"
                parts = [word(_element(block, 2 * place + i, matrix)) for i in range(packed)]
                slots[slot].append(sum(part << 16 * i for i, part in enumerate(parts)))
    return slots


def _element(block: int, place: int, matrix: str) -> float:
    """An element of a block's A, B or C.

    4, 5   about 1, C = 0          8, 9    exponents from -8 to 8, C large
    6, 7   about 1, C about 1      10, 11  exponents from -4 to 4, all positive, C = 0
    12, 13 infinities and NaN      14      products and C that float32 holds as subnormals
           among the numbers       15      what float16 holds as subnormals
    """
    random = hashed(place, 300 + ord(matrix))
    fraction = (random / 2**31 - 1) or 0.5
    if block < 4:
        return random % 17 - 8 if matrix != "c" or block % 2 else 0
    if block < 8:
        return 0.0 if matrix == "c" and block < 6 else 2 * fraction
    if block < 10:
        return fraction * (2.0**12 if matrix == "c" else 2.0 ** (random % 17 - 8))
    if block < 12:
        return 0.0 if matrix == "c" else (1 + abs(fraction)) * 2.0 ** (random % 9 - 4)
    if block >= 14:
        return fraction * 2.0 ** ((-134 if matrix == "c" else -65) + random % 5 if block == 14 else random % 9 - 20)
    special = (math.inf, -math.inf, math.nan, 0.0, 2.0**-24, 3 * 2.0**-20, -(2.0**-15))
    return (
        special[random // 64 % (7 if block == 13 else 4) + (0 if block == 13 else 3)]
        if random % 37 < 3
        else 2 * fraction
    )


def _numbers_of_shared_memory() -> list[Words]:
    """Two float16 a word, normal and all different, in the order of memory."""
    number = [2 * i + 1024 | (2 * i + 1025) << 16 for i in range(4096)]
    return [number[128 * i : 128 * (i + 1)] for i in range(32)]


def _matrix() -> list[Words]:
    """40 rows of 64 numbers of 16 bits that are all different, and none 0."""
    return [[2 * i + 1 | (2 * i + 2) << 16 for i in range(32 * row, 32 * row + 32)] for row in range(40)]


MAPS = (Map(56, (32, 64), 128), Map(60, (32, 32), 64), Map(64, (32, 16), 32), Map(56, (32, 24), 0))


def _copies() -> list[Words]:
    data = [[hashed(32 * i + lane, 400) for lane in range(64)] for i in range(4)]
    sizes = [[lane % (bytes + 1) for lane in range(64)] for bytes in (4, 8, 16)]
    return [*data, *sizes]


def _atomics() -> list[Words]:
    x, y, _ = _arithmetic()
    x, y = x[::5][:256], y[::5][:256]
    y[::16] = x[::16]  # where a compare-and-swap swaps
    x[1::4] = [hashed(i, 410) % 8 for i in range(64)]
    y[1::4] = [hashed(i, 411) % 8 for i in range(64)]
    x[2::4] = _pairs_of_16(5)[0][:64]
    y[2::4] = _pairs_of_16(5)[1][:64]
    x[3::4] = _pairs_of_16(8)[0][512:576]
    y[3::4] = _pairs_of_16(8)[1][512:576]
    return [x, y]


KERNELS: dict[str, Vectors] = {
    "approximate": Vectors(_approximate, 19, 128),
    "approximate_pairs": Vectors(_approximate_pairs, 4, 128),
    "divide": Vectors(_divide, 6, 128),
    "arithmetic": Vectors(_arithmetic, 34, 128),
    "arithmetic_of_halves": Vectors(lambda: _pairs_of_16(5), 14, 128),
    "arithmetic_of_bfloat16": Vectors(lambda: _pairs_of_16(8), 11, 128),
    "convert": Vectors(_convert, 27, 128),
    "convert_integers": Vectors(_convert_integers, 14, 128),
    "compare": Vectors(_compare, 23, 128),
    "integers": Vectors(_integers, 35, 128),
    "lanes": Vectors(_lanes, 27),
    "barriers": Vectors(_barriers, 3, 64),
    "load_matrices": Vectors(_matrices, 15),
    "store_matrices": Vectors(_matrices, 24),
    "multiply_bf16": Vectors(lambda: _fragments(bf16, 2), 8),
    "multiply_f16": Vectors(lambda: _fragments(f16, 2), 8),
    "multiply_tf32": Vectors(lambda: _fragments(f32, 1), 8),
    "multiply_warpgroup_bf16": Vectors(lambda: _fragments(bf16, 2), 4, 128),
    "multiply_warpgroup_f16": Vectors(lambda: _fragments(f16, 2), 4, 128),
    "multiply_warpgroup_tf32": Vectors(lambda: _fragments(f32, 1), 4, 128),
    "operands": Vectors(_numbers_of_shared_memory, 536, 128),
    "copies": Vectors(_copies, 16),
    "boxes": Vectors(_matrix, 192, maps=MAPS),
    "atomics": Vectors(_atomics, 41, 128),
}

# Those that were written when no GPU was at hand: recordings from before do not have them.
AWAITED = {"multiply_warpgroup_bf16", "multiply_warpgroup_f16", "multiply_warpgroup_tf32", "operands", "boxes"}
