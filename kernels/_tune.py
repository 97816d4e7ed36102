"""Measures the candidates of every kernel and shape class, for ``pytransformer tune``.

A problem is a key of ``_configs``, the configurations that may serve it, the built-in one first, and a call that
launches the kernel at a size that fills a GPU. The call may launch others too: they cost every candidate the same.
Problems are measured in order, each with the best of those before it in use, and a candidate takes the built-in
one's place only where it is faster by more than ``MARGIN``. One that needs more than the GPU has is left out.

The choice between a product with the activation in its epilogue and torch's product with an elementwise kernel
behind it is measured like a configuration, after the configurations of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from pytransformer.kernels import (
    _configs,
    _table,
    attention,
    attention_bwd,
    attention_decode,
    embedding,
    ffn,
    layer_norm,
    linear_cross_entropy,
)
from pytransformer.kernels._matmul import accumulate
from pytransformer.kernels._table import Choice, Config

MARGIN = 0.03
HALF, SINGLE = torch.bfloat16, torch.float32
_QUERIES_KEYS = {
    16: ((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 128), (32, 64), (32, 32)),
    32: ((64, 32), (32, 64), (32, 32), (32, 16), (16, 32), (16, 16)),
}
_PRODUCT = {
    16: ((128, 256, 64), (128, 128, 64), (128, 128, 32), (128, 64, 64), (128, 64, 32), (64, 128, 32), (64, 64, 64)),
    32: ((128, 64, 16), (64, 64, 32), (64, 64, 16), (64, 32, 32), (32, 64, 32), (32, 32, 32)),
}
ATTENTION = {64: (4, 16), 128: (4, 8), 256: (4, 4)}  # batch and heads of a head dim


@dataclass(frozen=True)
class Problem:
    """Attributes:
    op: the op that it belongs to.
    key: of ``_configs``.
    candidates: the first is the built-in one.
    build: allocates the tensors and returns the call to time.
    """

    op: str
    key: str
    candidates: tuple[Choice, ...]
    build: Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Measured:
    """The time of each candidate, in milliseconds, or why it has none; and which is to be used."""

    problem: Problem
    times: dict[Choice, float]
    failed: dict[Choice, str]

    @property
    def best(self) -> Choice:
        built_in = self.problem.candidates[0]
        fastest = min(self.times, key=self.times.__getitem__)
        known = self.times.get(built_in)
        return built_in if known is not None and self.times[fastest] > (1 - MARGIN) * known else fastest


def milliseconds(call: Callable[[], object]) -> float:
    """The median over a fifth of a second, by events, the L2 cache flushed before each call.

    The call is replayed as a graph: where it launches several short kernels, the host would take longer than they do.
    """
    call()  # compiles, which cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(triton.testing.do_bench(graph.replay, warmup=50, rep=200, return_mode="median"))


def tune(
    problems: Iterable[Problem],
    timer: Callable[[Callable[[], object]], float] | None = None,
    done: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Every problem measured; ``done`` hears of each.

    Raises:
        RuntimeError: no candidate of a problem runs at all.
    """
    found: list[Measured] = []
    for problem in problems:
        with _table.trying({m.problem.key: m.best for m in found}):
            measured = _measure(problem, timer or milliseconds)
        found.append(measured)
        done(measured)
    return found


def _measure(problem: Problem, timer: Callable[[Callable[[], object]], float]) -> Measured:
    call, times, failed = problem.build(), {}, {}
    for candidate in problem.candidates:
        with _table.trying({problem.key: candidate}):
            try:
                times[candidate] = timer(call)
            except RuntimeError as error:
                failed[candidate] = f"{type(error).__name__}: {error}"
            except triton.runtime.errors.OutOfResources as error:
                failed[candidate] = f"needs more than this GPU has: {error}"
    if not times:
        raise RuntimeError(f"tune: no configuration of {problem.key!r} runs here: {next(iter(failed.values()))}")
    return Measured(problem, times, failed)


def problems(arch: str, device: str = "cuda") -> Iterator[Problem]:
    """All of them, those that others build on first."""
    yield from _of_attention(arch, device)
    yield from _of_decode(arch, device)
    yield from _of_layer_norm(arch, device)
    yield from _of_ffn(arch, device)
    yield from _of_linear_cross_entropy(arch, device)
    yield from _of_embedding(arch, device)


def _unique(built_in: Choice, others: Iterable[Choice]) -> tuple[Choice, ...]:
    return tuple(dict.fromkeys((built_in, *others)))


def _randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _rng(device: str) -> Tensor:
    return torch.ones(2, dtype=torch.int64, device=device)


def _of_attention(arch: str, device: str) -> Iterator[Problem]:
    for D in ATTENTION:
        for dtype, call in ((HALF, "plain"), (HALF, "masked"), (HALF, "rich"), (SINGLE, "rich")):
            if call == "masked" and D == 256:
                continue  # there is no room for any but the rich tiles
            bits = 8 * dtype.itemsize
            shapes = [Config(tile, warps, stages) for tile in _QUERIES_KEYS[bits] for warps, stages in ((4, 2), (8, 2))]
            more = [Config(tile, 8, stages) for tile in _QUERIES_KEYS[bits] for stages in (1, 3)]
            for kernel in ("fwd", "dq", "dkv"):
                yield Problem(
                    "attention",
                    f"attention {kernel} {bits} bits D={D} {call}",
                    _unique(_configs.attention(kernel, dtype, D, call, arch), shapes + more),
                    partial(_attention_call, kernel, dtype, D, call, device),
                )


def _attention_call(kernel: str, dtype: torch.dtype, D: int, call: str, device: str) -> Callable[[], object]:
    """Over 4,096 tokens in 16 bits; causal, but for "masked", of whose tiles none is full or empty; "rich" with a mask
    of keys and dropout."""
    (B, H), T = ATTENTION[D], 4096 if dtype == HALF else 1024
    q, k, v, dout = (_randn(B, H, T, D, dtype=dtype, device=device) for _ in range(4))
    masked, rich = call == "masked", call == "rich"
    keep = torch.rand(B, 1, T if masked else 1, T, device=device) < 0.9 if masked or rich else None
    masks = attention.masking(
        None if keep is None else keep.expand(B, H, T, T), None, None, None, None if masked else 0
    )
    softmax = attention.Softmax(D**-0.5, 0.0, 0.1 if rich else 0.0, _rng(device) if rich else None)
    if kernel == "fwd":
        return partial(attention.attention_fwd, q, k, v, masks, softmax)
    out, lse = attention.attention_fwd(q, k, v, masks, softmax)
    return partial(attention_bwd.attention_bwd, dout, q, k, v, out, lse, masks, softmax)


def _of_decode(arch: str, device: str) -> Iterator[Problem]:
    for D in ATTENTION:
        for dtype in (HALF, SINGLE):
            built_in = _configs.attention("decode", dtype, D, "rich", arch)
            others = [Config((keys,), warps, stages) for keys in (32, 64, 128) for warps in (2, 4) for stages in (1, 3)]
            key = f"attention decode {8 * dtype.itemsize} bits D={D}"
            build = partial(_decode_call, dtype, D, device)
            yield Problem("attention", key, _unique(built_in, others), build)


def _decode_call(dtype: torch.dtype, D: int, device: str) -> Callable[[], object]:
    """32 heads over 8 of keys and values, 8,192 of them cached."""
    q = _randn(8, 32, 1, D, dtype=dtype, device=device)
    k, v = (_randn(8, 8, 8192, D, dtype=dtype, device=device) for _ in range(2))
    masks = attention.masking(None, None, None, None, None)
    softmax = attention.Softmax(D**-0.5, 0.0, 0.0, None)
    splits = attention_decode.splits_of(q, k, softmax)
    return partial(attention_decode.attention_decode, q, k, v, masks, softmax, splits)


def _of_layer_norm(arch: str, device: str) -> Iterator[Problem]:
    for E in (256, 512, 1024, 2048, 4096, 8192, 16384):
        for direction in ("fwd", "bwd"):
            pieces = _configs.whole_row(direction, HALF, arch) < E
            if pieces and E < 16384:  # whose pieces are those of the longest
                continue
            built_in = _configs.layer_norm(direction, HALF, E, arch)
            columns = built_in.tile[1]
            tiles = [(1, n) for n in (2048, 4096, 8192)] if pieces else [(rows, columns) for rows in (1, 2, 4, 8, 16)]
            tiles = [tile for tile in tiles if 256 <= tile[0] * tile[1] <= 16384]
            yield Problem(
                "layer_norm",
                f"layer_norm {direction} {'in pieces' if pieces else f'E={columns}'}",
                _unique(built_in, [Config(tile, *more) for tile in tiles for more in product((4, 8, 16), (1, 2))]),
                partial(_layer_norm_call, direction, E, device),
            )


def _layer_norm_call(direction: str, E: int, device: str) -> Callable[[], object]:
    """Bias, dropout and residual over 64 MiB."""
    x, residual = (_randn(2**25 // E, E, dtype=HALF, device=device) for _ in range(2))
    weight, bias, input_bias = (_randn(E, dtype=HALF, device=device) for _ in range(3))
    rng = _rng(device)
    forward = partial(
        layer_norm.layer_norm_fwd, x, weight, bias, residual, input_bias, rng, 0.1, 1e-5, False, True
    )  # fmt: skip
    if direction == "fwd":
        return forward
    _, z, mean, rstd = forward()
    return partial(layer_norm.layer_norm_bwd, residual, None, z, weight, mean, rstd, rng, 0.1, False)


def _of_ffn(arch: str, device: str) -> Iterator[Problem]:
    tiles = [(8, 256), (16, 256), (32, 64), (64, 64), (4, 512)]
    others = [Config(tile, warps) for tile in tiles for warps in (4, 8)]
    build = partial(_ffn_call, "fwd", HALF, 1024, device, False)
    yield Problem("ffn", "elementwise", _unique(_configs.elementwise(arch), others), build)
    for dtype in (HALF, SINGLE):
        for kernel in ("hidden", "gated", "backward"):
            direction = "bwd" if kernel == "backward" else "fwd"
            build = partial(_ffn_call, direction, dtype, 1024, device, True, kernel == "gated")
            yield _product(kernel, dtype, arch, "ffn", build)
    for dtype in (HALF, SINGLE):
        for E in (512, 1024, 2048, 4096):
            for direction in ("fwd", "bwd"):
                built_in = _configs.fuse_activation(direction, dtype, E, arch)
                key = f"ffn fused {direction} {8 * dtype.itemsize} bits E={E}"
                build = partial(_ffn_call, direction, dtype, E, device, None)
                yield Problem("ffn", key, (built_in, not built_in), build)


def _product(kernel: str, dtype: torch.dtype, arch: str, op: str, build: Callable[[], Callable[[], object]]) -> Problem:
    bits = 8 * dtype.itemsize
    others = [Config(tile, warps, stages) for tile in _PRODUCT[bits] for warps in (4, 8) for stages in (2, 3, 4)]
    return Problem(op, f"matmul {kernel} {bits} bits", _unique(_configs.matmul(kernel, dtype, arch), others), build)


def _ffn_call(
    direction: str, dtype: torch.dtype, E: int, device: str, fused: bool | None, gated: bool = False
) -> Callable[[], object]:
    """4,096 tokens, F = 4 E, with biases; ``fused`` as in ``hidden_fwd``."""
    N, F = 4096, 4 * E
    x, h, weight = (_randn(*shape, dtype=dtype, device=device) for shape in ((N, E), (N, F), (F, E)))
    bias = _randn(F, dtype=dtype, device=device)
    if direction == "bwd":
        return partial(ffn.hidden_bwd, x, weight.mT.contiguous(), h, None, None, "gelu", 0.0, fused)
    gate, bias_gate = (weight.clone(), bias) if gated else (None, None)
    return partial(ffn.hidden_fwd, x, weight, bias, gate, bias_gate, None, "gelu", 0.0, True, fused)


def _of_linear_cross_entropy(arch: str, device: str) -> Iterator[Problem]:
    for dtype in (HALF, SINGLE):
        yield _product("accumulate", dtype, arch, "linear_cross_entropy", partial(_accumulate_call, dtype, device))
    others = [Config((1, columns), warps) for columns in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]
    built_in = _configs.cross_entropy(50304, arch)
    key = f"cross_entropy V={built_in.tile[1]}"
    yield Problem("linear_cross_entropy", key, _unique(built_in, others), partial(_loss_call, device))


def _accumulate_call(dtype: torch.dtype, device: str) -> Callable[[], object]:
    """The weight's gradient of 1,024 rows of 50,304 logits."""
    dlogits, x = (_randn(1024, n, dtype=dtype, device=device) for n in (50304, 1024))
    return partial(accumulate, torch.zeros(50304, 1024, device=device), dlogits.mT, x)


def _loss_call(device: str) -> Callable[[], object]:
    """The losses of 1,024 rows of logits, and their gradient."""
    logits = _randn(1024, 50304, dtype=HALF, device=device)
    target = torch.randint(50304, (1024,), device=device)
    loss, lse = (torch.empty(1024, device=device) for _ in range(2))
    scale = torch.ones(1, device=device)
    return partial(linear_cross_entropy.cross_entropy_rows, logits, target, (-100, 0.0, 0.0, 0.0), scale, loss, lse)


def _of_embedding(arch: str, device: str) -> Iterator[Problem]:
    for E in (128, 1024):
        built_in = _configs.embedding(E, arch)
        columns = built_in.tile[1]
        others = [Config((rows, columns), warps) for rows in (4, 8, 16, 32) for warps in (4, 8)]
        build = partial(_embedding_call, E, device)
        yield Problem("embedding", f"embedding E={columns}", _unique(built_in, others), build)


def _embedding_call(E: int, device: str) -> Callable[[], object]:
    """Tokens and positions of 32 sequences of 512."""
    weight, positions = (_randn(n, E, dtype=HALF, device=device) for n in (30522, 512))
    tokens = torch.randint(30522, (32, 512), device=device)
    return partial(embedding.embedding_fwd, tokens, weight, positions, None, None, None, 1.0, 0.0)
