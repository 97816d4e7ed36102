"""``pytransformer verify``: is every kernel right on this very machine?

Every op runs forward and backward on every available backend, dtype and instruction set, over a few small
cases that between them reach each kind of mask, ragged sizes and each option, and is judged by the rule of
``_tolerance``. Each row of the table is the worst of its cases: its error over what it is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

from pytransformer import masks
from pytransformer._parity import Parity
from pytransformer.backends import OPS, ORDER, BackendError, has_op, unavailable
from pytransformer.backends import cpu as cpu_backend

DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

FAILURES_SHOWN = 3  # of each row; the first ones tell the most


@dataclass(frozen=True)
class VerifyCase:
    """One call: a function of ``pytransformer.ops``, its tensors and its options."""

    label: str
    function: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """The verdict on one op, backend, dtype and direction."""

    op: str
    where: str
    dtype: str
    direction: str
    ratio: float = 0.0
    failures: list[str] = field(default_factory=list)
    cases: int = 0

    @property
    def ok(self) -> bool:
        return not self.failures


class _Draw:
    """Random tensors of one dtype and device, the same ones on every machine."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device="cpu") * scale).to(self.device, self.dtype)

    def keep(self, *shape: int) -> Tensor:
        """A bool mask that keeps about 70%."""
        return (torch.rand(shape, generator=self.generator, device="cpu") < 0.7).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device="cpu").to(self.device)


def attention_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """Each kind of mask, alone and together; T != S; head dims of every width that kernels are made for, odd and
    unequal ones; shared heads; more blocks of queries and keys than a GPU has multiprocessors."""

    def qkv(B: int, H: int, T: int, S: int, D: int, G: int = 0, Dv: int = 0) -> dict[str, Tensor | None]:
        G, Dv = G or H, Dv or D
        return {"query": draw(B, H, T, D), "key": draw(B, G, S, D), "value": draw(B, G, S, Dv)}

    def case(label: str, tensors: dict[str, Tensor | None], **options: Any) -> VerifyCase:
        return VerifyCase(label, "attention", tensors, options)

    lengths = torch.tensor([127, 40], device=draw.device)
    left_padded = torch.arange(127, device=draw.device) >= torch.tensor([[0], [70]], device=draw.device)
    some_rows_masked = draw.keep(2, 1, 65, 63)
    some_rows_masked[:, :, 5:9] = False
    yield case("T=S=64", qkv(2, 3, 64, 64, 64))
    yield case("T=65 S=127 D=40", qkv(1, 2, 65, 127, 40))
    yield case("T=3 S=257 D=17 Dv=33", qkv(1, 2, 3, 257, 17, Dv=33))
    yield case("causal T=S=129", qkv(1, 2, 129, 129, 32), is_causal=True)
    yield case("causal T=40 S=100 bottom right", qkv(1, 2, 40, 100, 32), is_causal=True, causal_align="bottom_right")
    yield case("causal, 160 heads, 5 a key head", qkv(8, 20, 130, 130, 64, G=4), is_causal=True, enable_gqa=True)
    yield case("window 16, D=128", qkv(1, 2, 300, 300, 128), window=16)
    yield case("causal D=160 Dv=192", qkv(1, 2, 140, 150, 160, Dv=192), is_causal=True)
    yield case("causal D=256 bottom right", qkv(1, 2, 70, 200, 256), is_causal=True, causal_align="bottom_right")
    yield case("key lengths", qkv(2, 2, 65, 127, 64), key_lengths=lengths)
    yield case("left padding", qkv(2, 2, 65, 127, 64), attn_mask=masks.padding(left_padded))
    yield case("causal and lengths", qkv(2, 2, 127, 127, 32), is_causal=True, key_lengths=lengths)
    yield case("bool mask, rows fully masked", qkv(2, 2, 65, 63, 96), attn_mask=some_rows_masked)
    yield case("bias [H,T,S]", {**qkv(2, 3, 33, 63, 64), "bias": draw(3, 33, 63)})
    yield case("bias [1,S], causal", {**qkv(1, 2, 63, 63, 32), "bias": draw(1, 63)}, is_causal=True)
    yield case("4 query heads a key head", qkv(2, 8, 31, 65, 64, G=2), enable_gqa=True)
    yield case("softcap", qkv(1, 2, 33, 65, 80), softcap=5.0)
    yield case("dropout", qkv(1, 2, 33, 65, 64), dropout_p=0.2, seed=7)


def layer_norm_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """With and without each fused piece, LayerNorm and RMSNorm, sizes off every vector length."""
    for rows, E in ((33, 768), (7, 101), (3, 1)):
        x, weight, bias = draw(rows, E), draw(E), draw(E)
        norm: dict[str, Tensor | None] = {"input": x, "weight": weight, "bias": bias}
        fused = {**norm, "residual": draw(rows, E), "input_bias": draw(E)}
        if E == 1:
            yield VerifyCase("RMSNorm E=1", "rms_norm", {"input": x, "weight": weight})
            continue
        yield VerifyCase(f"plain E={E}", "layer_norm", norm)
        yield VerifyCase(f"no weight E={E}", "layer_norm", {"input": x, "weight": None})
        yield VerifyCase(f"residual, bias E={E}", "layer_norm", fused)
        yield VerifyCase(f"dropout E={E}", "layer_norm", fused, {"dropout_p": 0.1, "seed": 11})
        yield VerifyCase(f"pre-norm E={E}", "layer_norm", fused, {"prenorm": True})
        rms = {k: v for k, v in fused.items() if k != "bias"}
        yield VerifyCase(f"RMSNorm E={E}", "rms_norm", rms)


def ffn_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """Four activations, dropout, a gate, no biases, ragged sizes."""

    def layers(M: int, E: int, F: int, O: int = 0) -> dict[str, Tensor | None]:  # noqa: E741
        O = O or E  # noqa: E741
        return {
            "input": draw(M, E),
            "weight1": draw(F, E, scale=E**-0.5),
            "bias1": draw(F, scale=0.1),
            "weight2": draw(O, F, scale=F**-0.5),
            "bias2": draw(O, scale=0.1),
        }

    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield VerifyCase(f"{activation} 65x96x200", "ffn", layers(65, 96, 200), {"activation": activation})
    yield VerifyCase("gelu 5x33x77x19", "ffn", layers(5, 33, 77, 19), {"activation": "gelu"})
    yield VerifyCase("one row", "ffn", layers(1, 64, 256), {"activation": "silu"})
    no_bias = {**layers(17, 64, 128), "bias1": None, "bias2": None}
    yield VerifyCase("no biases", "ffn", no_bias, {"activation": "gelu"})
    options = {"activation": "relu", "dropout_p": 0.1, "seed": 5}
    yield VerifyCase("dropout", "ffn", layers(33, 64, 128), options)
    gated = {**layers(33, 64, 128), "weight_gate": draw(128, 64, scale=0.125), "bias_gate": draw(128, scale=0.1)}
    yield VerifyCase("gated", "ffn", gated, {"activation": "silu"})


def linear_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """Many rows, few, one; with and without a bias."""
    for M, E, O in ((130, 96, 77), (9, 33, 200), (1, 64, 50)):  # noqa: E741
        tensors: dict[str, Tensor | None] = {"input": draw(M, E), "weight": draw(O, E, scale=E**-0.5)}
        yield VerifyCase(f"{M}x{E}x{O}", "linear", tensors)
        yield VerifyCase(f"{M}x{E}x{O} bias", "linear", {**tensors, "bias": draw(O, scale=0.1)})


def linear_cross_entropy_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """Each option of the loss, with targets that are ignored."""
    target = draw.integers(301, 37)
    target[::5] = -100
    tensors: dict[str, Tensor | None] = {
        "input": draw(37, 64),
        "linear_weight": draw(301, 64, scale=0.125),
        "target": target,
    }
    with_bias = {**tensors, "linear_bias": draw(301)}
    name = "linear_cross_entropy"
    yield VerifyCase("mean", name, tensors)
    yield VerifyCase("bias, sum, label smoothing", name, with_bias, {"reduction": "sum", "label_smoothing": 0.1})
    yield VerifyCase("none, z-loss, softcap", name, with_bias, {"reduction": "none", "z_loss": 1e-3, "softcap": 10.0})


def embedding_cases(draw: _Draw) -> Iterator[VerifyCase]:
    """Tokens alone, and with positions, segments, scale and dropout."""
    table = draw(50, 33)
    tokens = draw.integers(50, 3, 19)
    yield VerifyCase("tokens", "embedding", {"tokens": tokens, "weight": table})
    full: dict[str, Tensor | None] = {
        "tokens": tokens,
        "weight": table,
        "positions": draw(19, 33),
        "segments": draw.integers(2, 3, 19),
        "segment_weight": draw(2, 33),
    }
    yield VerifyCase("positions, segments, scale", "embedding", full, {"scale": 5.0})
    yield VerifyCase("dropout", "embedding", full, {"dropout_p": 0.3, "seed": 2})


CASES: dict[str, Callable[[_Draw], Iterator[VerifyCase]]] = {
    "attention": attention_cases,
    "layer_norm": layer_norm_cases,
    "ffn": ffn_cases,
    "linear": linear_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "embedding": embedding_cases,
}


def devices() -> list[str]:
    """The device types of this machine that have backends."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def instruction_sets(emulated: bool) -> list[str]:
    """The built instruction sets that this CPU runs; emulated ones only if asked for."""
    if unavailable("cpu") is not None:
        return []
    found = [name for name, runs in cpu_backend.isa_status().items() if runs]
    return [name for name in found if emulated or "emulated" not in name]


@dataclass(frozen=True)
class Target:
    """What is judged: a backend, and for the CPU kernels an instruction set."""

    backend: str
    device: str
    isa: str | None = None

    @property
    def name(self) -> str:
        if self.isa is not None:
            return f"{self.backend} {self.isa}"
        return self.backend if self.device == "cpu" else f"{self.backend} ({self.device})"


def targets(op: str, device: str, only_backend: str | None, all_isas: bool) -> list[Target]:
    """Everything on ``device`` that has kernels for ``op`` and runs here."""
    found = []
    for backend in ORDER[device]:
        if only_backend not in (None, backend) or unavailable(backend) is not None or not has_op(backend, op):
            continue
        isas = instruction_sets(all_isas) if backend == "cpu" else [None]
        found += [Target(backend, device, isa) for isa in isas]
    return found


def verify(ops: Sequence[str] = OPS, only_backend: str | None = None, all_isas: bool = False) -> Iterator[Row]:
    """The rows of everything asked for, as they are done. Restores the instruction set in use."""
    for op in ops:
        for device in devices():
            found = targets(op, device, only_backend, all_isas)
            for dtype in DTYPES[device] if found else ():
                yield from verify_op(op, found, dtype, device)


def verify_op(op: str, judged: Sequence[Target], dtype: torch.dtype, device: str) -> list[Row]:
    """Two rows for each target, forward and backward; none for one that serves no case."""
    dtype_name = str(dtype).removeprefix("torch.")
    rows = {target: [Row(op, target.name, dtype_name, way) for way in ("forward", "backward")] for target in judged}
    for case in CASES[op](_Draw(dtype, device)):
        call = Parity(case.function, case.tensors, case.options)
        for target in judged:
            _judge(case.label, call, target, rows[target])
    return [row for target in judged for row in rows[target] if row.cases]


def _judge(label: str, call: Parity, target: Target, rows: list[Row]) -> None:
    """One case on one target, entered into its forward and backward rows."""
    try:
        with _instruction_set(target.isa):
            found = call.judge(target.backend)
    except BackendError:
        return  # the backend says so itself, and `auto` serves the call elsewhere
    except Exception as error:  # a kernel that raises is a kernel that fails
        for row in rows:
            row.cases += 1
            row.ratio = float("inf")
            row.failures.append(f"{label}: {type(error).__name__}: {error}")
        return
    for row in rows:
        row.cases += 1
    for comparison in found:
        row = rows[0 if comparison.name.split()[-1].startswith("output") else 1]
        row.ratio = max(row.ratio, comparison.ratio)
        if not comparison.ok:
            row.failures.append(f"{label}: {comparison}")


@contextmanager
def _instruction_set(isa: str | None) -> Iterator[None]:
    """Runs the CPU kernels of ``isa`` in the block."""
    if isa is None:
        yield
        return
    in_use = cpu_backend.isa()
    cpu_backend.set_isa(isa)
    try:
        yield
    finally:
        cpu_backend.set_isa(in_use)


def print_rows(rows: Iterable[Row], stream: TextIO | None = None) -> list[Row]:
    """Prints the table row by row, then every failure, then what was not run. Returns the rows."""
    out = stream or sys.stdout
    widths = (20, max([9, *(len(f"cpu {isa}") for isa in instruction_sets(True))]), 8, 8, 5, 7)

    def line(*cells: str) -> str:
        left, right = cells[:4], cells[4:6]
        parts = [c.ljust(w) for c, w in zip(left, widths, strict=False)]
        parts += [c.rjust(w) for c, w in zip(right, widths[4:], strict=True)]
        return " ".join((*parts, cells[6])).rstrip()

    print(line("op", "backend", "dtype", "", "cases", "error", ""), file=out)
    done = []
    for row in rows:
        verdict = "ok" if row.ok else "FAIL"
        cells = (row.op, row.where, row.dtype, row.direction, str(row.cases), f"{row.ratio:.2f}", verdict)
        print(line(*cells), file=out, flush=True)
        done.append(row)
    print("error: the worst over what is allowed; at most 1 passes", file=out)
    for row in done:
        for failure in row.failures[:FAILURES_SHOWN]:
            print(f"FAIL {row.op}, {row.where}, {row.dtype}: {failure}", file=out)
        if len(row.failures) > FAILURES_SHOWN:
            print(f"     and {len(row.failures) - FAILURES_SHOWN} more of this row", file=out)
    return done


def main(ops: Sequence[str], backend: str | None, all_isas: bool) -> int:
    """Runs the command; the exit code: 0 all right, 1 a failure, 2 nothing to verify."""
    if backend is not None and (reason := unavailable(backend)) is not None:
        print(f"pytransformer verify: backend {backend!r} cannot run here: {reason}", file=sys.stderr)
        return 2
    rows = print_rows(verify(ops or OPS, backend, all_isas))
    for name in dict.fromkeys(name for order in ORDER.values() for name in order):
        if backend is None and (reason := unavailable(name)) is not None:
            print(f"not run: {name}: {reason}")
    if not rows:
        print(f"pytransformer verify: backend {backend!r} has no kernel for {', '.join(ops)}", file=sys.stderr)
        return 2
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} rows ok" + (f", {failed} FAILED" if failed else ""))
    return 1 if failed else 0
