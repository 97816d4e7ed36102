"""Bytes that Triton kernels move, counted from their own loads and stores in the interpreter.

The floor of a memory-bound op is every input read once and every output written once (DESIGN.md, "Numbers that
bound each kernel"). A kernel that reads a stream twice, or a vector once for each row, is caught here.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import randn

from pytransformer import backends, ops

pytestmark = pytest.mark.interpreted


@contextmanager
def counted(monkeypatch):
    """Counts the bytes of every unmasked lane that is loaded or stored in the block."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    moved = {"loaded": 0, "stored": 0}
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def bytes_of(pointers, mask):
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *rest):
        moved["loaded"] += bytes_of(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        moved["stored"] += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Builder, "create_masked_load", counting_load)
        patch.setattr(Builder, "create_masked_store", counting_store)
        patch.setitem(backends.ORDER, "cpu", ("cpu", "triton", "reference"))
        yield moved


N = 512
SUM = {"residual": True, "input_bias": True}
# Options, and bytes an element, forward and backward, in 16 bits.
LAYER_NORM = {
    "plain": ({}, 4, 6),
    "post": ({**SUM, "dropout_p": 0.1}, 8, 8),
    "post_no_dropout": (SUM, 8, 6),
    "pre": ({**SUM, "dropout_p": 0.1, "prenorm": True}, 8, 10),
}


@pytest.mark.parametrize(("case", "width"), [*((case, 256) for case in LAYER_NORM), ("post", 250)])
def test_layer_norm_moves_no_more_than_it_must(monkeypatch, case, width):
    options, forward_floor, backward_floor = LAYER_NORM[case]
    options = dict(options)
    x, weight, bias = (
        randn(*shape, dtype=torch.float16).requires_grad_() for shape in ((N, width), (width,), (width,))
    )
    if options.pop("residual", False):
        options["residual"] = randn(N, width, dtype=torch.float16).requires_grad_()
        options["input_bias"] = randn(width, dtype=torch.float16).requires_grad_()
    with counted(monkeypatch) as forward:
        y = ops.layer_norm(x, weight, bias, seed=1, backend="triton", **options)
    with counted(monkeypatch) as backward:
        torch.autograd.backward(y, [torch.ones_like(t) for t in y] if isinstance(y, tuple) else torch.ones_like(y))
    for name, moved, floor in (("forward", forward, forward_floor), ("backward", backward, backward_floor)):
        per_element = sum(moved.values()) / (N * width)
        assert floor <= per_element <= 1.05 * floor, f"{name} moves {per_element:.2f} bytes an element, floor {floor}"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_embedding_moves_no_more_than_it_must(monkeypatch, dropout_p):
    B, T, V, width = 16, 32, 40, 256
    tokens = torch.randint(V, (B, T))
    weight, positions = randn(V, width, dtype=torch.float16).requires_grad_(), randn(T, width, dtype=torch.float16)
    with counted(monkeypatch) as forward:
        y = ops.embedding(tokens, weight, positions, dropout_p=dropout_p, seed=1, backend="triton")
    with counted(monkeypatch) as backward:
        (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    # A row of the table for each token, positions and outputs once; the gradient of the table likewise.
    floors = 4 * y.numel() + 2 * positions.numel(), 2 * y.numel() + 2 * weight.numel()
    for name, moved, floor in zip(("forward", "backward"), (forward, backward), floors, strict=True):
        assert floor <= sum(moved.values()) <= 1.05 * floor, f"{name} moves {sum(moved.values())} bytes, floor {floor}"
