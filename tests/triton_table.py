"""What Triton kernel configurations take, compiled for GPUs that need not be here: ``make triton-table``.

A row names an architecture, a case, a kernel, its tile, warps and stages, and what the compiler made of it: registers
of a thread, bytes of stack (a spill; must be 0) and shared memory of a program. The table is committed, so that a
change of a kernel or of the compiler shows in review; ``test_triton_table.py`` recomputes a part of it.

    make triton-table                                         every case for every architecture, half an hour of a core
    make test-triton-table                                    fails where the committed table says otherwise
    python -P tests/triton_table.py "sm80 attention 16 bits"  prints the rows that contain this and writes nothing

Compiled kernels stay in Triton's cache (``TRITON_CACHE_DIR``), which processes share: the table is made by as many as
there are cores, and made again it compiles what changed. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parent.parent / "docs" / "triton-kernels.txt"
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
FIGURES = " {:>5} {:>5} {:>7}"
ROW = "{:7} {:34} {:26} {:11} {:>5} {:>6}" + FIGURES
WIDTH = len(ROW.format(*[""] * 9)) - len(FIGURES.format("", "", ""))
HEADER = ROW.format("arch", "case", "kernel", "tile", "warps", "stages", "regs", "stack", "shared")
DTYPES = {"16 bits": torch.bfloat16, "32 bits": torch.float32}  # products in true float32


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rng() -> torch.Tensor:
    return empty(2, dtype=torch.int64)


def attention(dtype: torch.dtype, head_dim: int, how: str) -> None:
    """Causal; "masked", with a bool mask and lengths; "grouped", masked over keys that four heads share; with
    "everything", with a bias, dropout and a soft cap too."""
    from pytransformer.kernels import attention, attention_bwd

    B, H, T = 2, 8, 1024
    masked, everything = how != "plain", how == "everything"
    q = empty(B, H, T, head_dim, dtype=dtype)
    k = q[:, :2] if how == "grouped" else q
    mask = empty(B, H, T, T, dtype=torch.bool) if masked else None
    lengths = empty(B, dtype=torch.int64) if masked else None
    bias = empty(B, H, T, T, dtype=dtype) if everything else None
    masks = attention.masking(mask, bias, lengths, None, 0)
    softmax = attention.Softmax(0.1, 20.0, 0.1, rng()) if everything else attention.Softmax(0.1, 0.0, 0.0, None)
    out, lse = attention.attention_fwd(q, k, k, masks, softmax)
    *_, delta = attention_bwd.attention_bwd(q, q, k, k, out, lse, masks, softmax)
    if bias is not None:
        attention_bwd.attention_dbias(bias.shape, q, q, q, q, lse, delta, masks, softmax)


def attention_varlen(dtype: torch.dtype, head_dim: int) -> None:
    """Sequences that lie end to end, causal from each end, and few queries of grouped heads over them."""
    from pytransformer.kernels import attention, attention_bwd, attention_decode

    N, total = 7, 4096

    def heads(H: int, tokens: int, longest: int) -> torch.Tensor:
        x = empty(1, tokens, H, head_dim, dtype=dtype).transpose(1, 2)
        return x.narrow(2, 0, longest).expand(N, H, longest, head_dim)

    def masks(total_q: int) -> attention.Masking:
        cu = empty(N + 1, dtype=torch.int32)
        sequences = attention.Sequences(cu, cu, total_q, total, at_end=True)
        return attention.masking(None, None, None, None, 0, sequences=sequences)

    q, softmax = heads(8, total, 1024), attention.Softmax(0.1, 0.0, 0.0, None)
    out, lse = attention.attention_fwd(q, q, q, masks(total), softmax)
    attention_bwd.attention_bwd(q, q, q, q, out, lse, masks(total), softmax)
    attention_decode.attention_decode(heads(32, N, 1), q, q, masks(N), softmax, 16)


def decode_in_pages(dtype: torch.dtype, head_dim: int) -> None:
    """One query, grouped heads, lengths, pages of 16 keys."""
    from pytransformer.kernels import attention, attention_decode

    q, pool = empty(4, 32, 1, head_dim, dtype=dtype), empty(1024, 16, 8, head_dim, dtype=dtype).transpose(1, 2)
    masks = attention.masking(None, None, empty(4, dtype=torch.int64), None, 0)
    softmax, table = attention.Softmax(0.1, 0.0, 0.0, None), empty(4, 256, dtype=torch.int32)
    attention_decode.attention_decode(q, pool, pool, masks, softmax, 16, table)


def decode(dtype: torch.dtype, head_dim: int) -> None:
    """One query, grouped heads, with a mask, a bias, lengths and a soft cap."""
    from pytransformer.kernels import attention, attention_decode

    q, k = empty(4, 32, 1, head_dim, dtype=dtype), empty(4, 8, 4096, head_dim, dtype=dtype)
    mask, bias = empty(4, 1, 1, 4096, dtype=torch.bool), empty(4, 32, 1, 4096, dtype=dtype)
    masks = attention.masking(mask.expand(4, 32, 1, 4096), bias, empty(4, dtype=torch.int64), None, None)
    attention_decode.attention_decode(q, k, k, masks, attention.Softmax(0.1, 20.0, 0.0, None), 16)


def layer_norm(dtype: torch.dtype, width: int) -> None:
    """Everything that the op fuses."""
    from pytransformer.kernels import layer_norm

    x, vector = empty(4096, width, dtype=dtype), empty(width, dtype=dtype)
    _, z, mean, rstd = layer_norm.layer_norm_fwd(x, vector, vector, x, vector, rng(), 0.1, 1e-5, False, True)
    layer_norm.layer_norm_bwd(x, x, z, vector, mean, rstd, rng(), 0.1, False)


def ffn(dtype: torch.dtype, activation: str, gated: bool) -> None:
    """Both forms, with biases and dropout."""
    from pytransformer.kernels import ffn

    x, weight = empty(4096, 768, dtype=dtype), empty(3072, 768, dtype=dtype)
    bias, h = empty(3072, dtype=dtype), empty(4096, 3072, dtype=dtype)
    gate, gate_bias = (weight, bias) if gated else (None, None)
    for fused in (True, False):
        ffn.hidden_fwd(x, weight, bias, gate, gate_bias, rng(), activation, 0.1, True, fused)
        ffn.hidden_bwd(x, weight.mT.contiguous(), h, h if gated else None, rng(), activation, 0.1, fused)


def linear_cross_entropy(dtype: torch.dtype) -> None:
    """Of an odd number of classes, in chunks, with a soft cap and label smoothing."""
    from pytransformer.backends.triton import linear_cross_entropy

    linear_cross_entropy.linear_cross_entropy_fwd(
        empty(4096, 768, dtype=dtype),
        empty(50257, 768, dtype=dtype),
        None,
        empty(4096, dtype=torch.int64),
        *("mean", -100, 0.1, 1e-4, 30.0),
        [True, True, False],
    )


def embedding(dtype: torch.dtype) -> None:
    """Tokens, positions and segments, with dropout."""
    from pytransformer.kernels import embedding

    tokens, weight = empty(16, 512, dtype=torch.int64), empty(30522, 768, dtype=dtype)
    positions = empty(512, 768, dtype=dtype)
    y = embedding.embedding_fwd(tokens, weight, positions, tokens, empty(2, 768, dtype=dtype), rng(), 2.0, 0.1)
    embedding.table_gradient(y.view(-1, 768), tokens.flatten(), weight, rng(), 1.0, 0.1)
    embedding.position_gradient(y, rng(), 0.1)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every shape class of the configurations, in 16 bits and in float32."""
    for head_dim, how in product((64, 128, 256), ("plain", "masked", "grouped", "everything")):
        for name, dtype in DTYPES.items():
            if how == "everything" or dtype != torch.float32:  # in 32 bits all calls are taken as rich
                yield f"attention {name} D={head_dim} {how}", lambda d=dtype, n=head_dim, h=how: attention(d, n, h)
    for (name, dtype), (activation, gated) in product(DTYPES.items(), (("gelu", False), ("silu", True))):
        how = f"{activation} gated" if gated else activation
        yield f"ffn {name} {how}", lambda d=dtype, a=activation, g=gated: ffn(d, a, g)
    for name, dtype in DTYPES.items():
        for head_dim in (64, 128, 256):
            yield f"attention_decode {name} D={head_dim}", lambda d=dtype, n=head_dim: decode(d, n)
            if dtype != torch.float32 or head_dim < 256:
                yield f"attention_varlen {name} D={head_dim}", lambda d=dtype, n=head_dim: attention_varlen(d, n)
            yield f"attention_pages {name} D={head_dim}", lambda d=dtype, n=head_dim: decode_in_pages(d, n)
        yield f"linear_cross_entropy {name}", lambda d=dtype: linear_cross_entropy(d)
        yield f"embedding {name}", lambda d=dtype: embedding(d)
        for width in (256, 768, 4096, 8192, 16384):
            if dtype != torch.float32 or width in (768, 8192, 16384):
                yield f"layer_norm {name} E={width}", lambda d=dtype, n=width: layer_norm(d, n)


def launched(arch: str, name: str) -> dict[str, Any]:
    """The launches of one case, by their rows without figures."""
    from pytransformer.kernels import _offline

    with _offline.recorded(arch) as launches:
        dict(cases())[name]()
    found: dict[str, Any] = {}
    for launch in launches:
        options = launch.options["num_warps"], launch.options.get("num_stages", 3)
        row = ROW.format(arch, name, launch.name, tile(launch.arguments), *options, "", "", "").rstrip()
        found.setdefault(row, launch)
    return found


def rows(arch: str, name: str, kernels: str = "") -> list[str]:
    """The rows of one case; of the kernels whose name contains ``kernels``."""
    found = []
    for row, launch in launched(arch, name).items():
        if kernels in launch.name:
            figures = launch.compile(arch)
            found.append(row.ljust(WIDTH) + FIGURES.format(figures.registers, figures.stack, figures.shared))
    return found


def tile(arguments: dict[str, object]) -> str:
    """The sizes that a configuration chose."""
    chosen = [n for n in arguments if n == "ROWS" or (n.startswith("BLOCK_") and n not in ("BLOCK_D", "BLOCK_DV"))]
    return "x".join(str(arguments[n]) for n in chosen)


def main(*patterns: str) -> None:
    """Writes the table; with patterns prints the rows that contain one of them, with ``--check`` compares instead."""
    check = "--check" in patterns
    patterns = tuple(pattern for pattern in patterns if pattern != "--check")
    work = [(arch, name) for arch in ARCHITECTURES for name, _ in cases()]
    work = [pair for pair in work if not patterns or any(pattern in " ".join(pair) for pattern in patterns)]
    found = [HEADER]
    print(HEADER)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for case in pool.map(rows, *zip(*work, strict=True)):
            print(*case, sep="\n", flush=True)
            found += case
    if check:
        known = set(TABLE.read_text().splitlines())
        changed = [row for row in found if row not in known]
        print(*changed, sep="\n")
        sys.exit(f"{len(changed)} rows are not in {TABLE.name}: run `make triton-table`" if changed else 0)
    if not patterns:
        TABLE.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
