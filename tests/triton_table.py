"""What Triton kernel configurations take, compiled for GPUs that need not be here: ``make triton-table``.

A row names an architecture, a case, a kernel, its tile, warps and stages, and what the compiler made of it: registers
of a thread, bytes of stack (a spill; must be 0) and shared memory of a program. The table is committed, so that a
change of a kernel or of the compiler shows in review; ``test_triton_table.py`` recomputes a part of it.

    make triton-table                                         every case for every architecture, some minutes
    python -P tests/triton_table.py "sm80 attention 16 bits"  prints the rows that contain this and writes nothing
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

TABLE = Path(__file__).parent.parent / "docs" / "triton-kernels.txt"
ARCHITECTURES = ("sm90", "sm80", "sm100", "gfx942")
ROW = "{:7} {:34} {:26} {:11} {:>5} {:>6} {:>5} {:>5} {:>7}"
HEADER = ROW.format("arch", "case", "kernel", "tile", "warps", "stages", "regs", "stack", "shared")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rng() -> torch.Tensor:
    return empty(2, dtype=torch.int64)


def attention(dtype: torch.dtype, head_dim: int, everything: bool) -> None:
    """Plain and causal, or with a mask, a bias, lengths, dropout and a soft cap."""
    from pytransformer.kernels import attention, attention_bwd

    B, H, T = 2, 8, 1024
    q = empty(B, H, T, head_dim, dtype=dtype)
    mask = bias = lengths = None
    if everything:
        mask, bias = empty(B, H, T, T, dtype=torch.bool), empty(B, H, T, T, dtype=dtype)
        lengths = empty(B, dtype=torch.int64)
    masks = attention.masking(mask, bias, lengths, None, 0)
    softmax = attention.Softmax(0.1, 20.0, 0.1, rng()) if everything else attention.Softmax(0.1, 0.0, 0.0, None)
    out, lse = attention.attention_fwd(q, q, q, masks, softmax)
    *_, delta = attention_bwd.attention_bwd(q, q, q, q, out, lse, masks, softmax)
    if bias is not None:
        attention_bwd.attention_dbias(bias.shape, q, q, q, q, lse, delta, masks, softmax)


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
    """In chunks, with a soft cap and label smoothing."""
    from pytransformer.kernels import linear_cross_entropy

    x, weight = empty(4096, 768, dtype=dtype), empty(50304, 768, dtype=dtype)
    linear_cross_entropy.losses(
        x,
        weight,
        None,
        empty(4096, dtype=torch.int64),
        linear_cross_entropy.Loss(-100, 0.1, 1e-4, 30.0),
        empty(1, dtype=torch.float32),
        [True, True, False],
    )


def embedding(dtype: torch.dtype) -> None:
    """Tokens, positions and segments, with dropout."""
    from pytransformer.kernels import embedding

    tokens, weight = empty(16, 512, dtype=torch.int64), empty(30522, 768, dtype=dtype)
    positions = empty(512, 768, dtype=dtype).expand(16, 512, 768)
    y = embedding.embedding_fwd(tokens, weight, positions, tokens, empty(2, 768, dtype=dtype), rng(), 2.0, 0.1)
    embedding.table_gradient(y.view(-1, 768), tokens.flatten(), weight, rng(), 1.0, 0.1)
    embedding.position_gradient(y, rng(), 0.1)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every shape class of the configurations in 16 bits, and the widest in 32 bits."""
    bf16, f32 = torch.bfloat16, torch.float32
    for head_dim in (64, 128, 256):
        yield f"attention 16 bits D={head_dim} plain", lambda n=head_dim: attention(bf16, n, False)
        yield f"attention 16 bits D={head_dim} everything", lambda n=head_dim: attention(bf16, n, True)
        yield f"attention 32 bits D={head_dim} everything", lambda n=head_dim: attention(f32, n, True)
    for width in (256, 768, 4096, 8192, 16384):
        yield f"layer_norm 16 bits E={width}", lambda n=width: layer_norm(bf16, n)
    for activation, gated in (("gelu", False), ("silu", True)):
        yield f"ffn 16 bits {activation}{' gated' if gated else ''}", lambda a=activation, g=gated: ffn(bf16, a, g)
    yield "ffn 32 bits silu gated", lambda: ffn(f32, "silu", True)
    yield "linear_cross_entropy 16 bits", lambda: linear_cross_entropy(bf16)
    yield "embedding 16 bits", lambda: embedding(bf16)


def rows(arch: str, name: str, call: Callable[[], None], kernels: str = "") -> Iterator[str]:
    """The rows of one case; of the kernels whose name contains ``kernels``."""
    from pytransformer.kernels import _offline

    with _offline.recorded(arch) as launches:
        call()
    done = set()
    for launch in launches:
        if launch.name in done or kernels not in launch.name:
            continue
        done.add(launch.name)
        found = launch.compile(arch)
        options = launch.options["num_warps"], launch.options.get("num_stages", 3)
        figures = found.registers, found.stack, found.shared
        yield ROW.format(arch, name, launch.name, tile(launch.arguments), *options, *figures)


def tile(arguments: dict[str, object]) -> str:
    """The sizes that a configuration chose."""
    chosen = [n for n in arguments if n == "ROWS" or (n.startswith("BLOCK_") and n not in ("BLOCK_D", "BLOCK_DV"))]
    return "x".join(str(arguments[n]) for n in chosen)


def main(*patterns: str) -> None:
    """Writes the table; with patterns prints the rows that contain one of them instead."""
    found = [HEADER]
    print(HEADER)
    for arch in ARCHITECTURES:
        for name, call in cases():
            if not patterns or any(pattern in f"{arch} {name}" for pattern in patterns):
                for row in rows(arch, name, call):
                    print(row, flush=True)
                    found.append(row)
    if not patterns:
        TABLE.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
