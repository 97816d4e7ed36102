"""Embedding and PositionalEncoding: what a Transformer reads.

The input of the original Transformer is ``dropout(sqrt(E) * W[tokens] + P[0..T))``. ``Embedding`` computes it in one
op from its table and the rows of a ``PositionalEncoding``; the latter is also a module of its own that adds its rows
to whatever it is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import ops

KINDS = ("interleaved", "halves", "learned")


class Embedding(nn.Embedding):
    """``out = dropout(scale * weight[tokens] + positions)``.

    Constructor, parameter, initial weights and ``state_dict`` are those of ``torch.nn.Embedding``, with two extras.
    The fused op serves; a ``padding_idx`` (whose row gets no gradient), ``max_norm``, ``scale_grad_by_freq`` and
    ``sparse`` are torch's own lookup, with scale, positions and dropout after it.

    Args:
        num_embeddings: V. embedding_dim: E.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as in ``torch.nn.Embedding``.
        scale: of the token embeddings; sqrt(E) in the original Transformer.
        dropout: probability of dropping an element of the sum, in training mode.

    Raises:
        ValueError: ``dropout`` lies outside [0, 1].

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.4.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        lookup = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        super().__init__(num_embeddings, embedding_dim, *lookup, _weight, _freeze, device, dtype)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__}: dropout must be a probability in [0, 1], got {dropout!r}")
        self.scale = scale
        self.dropout = dropout

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """Args:
            input: int32 or int64 [..., T], indices in [0, V).
            positions: [T,E] or anything that broadcasts to [..., T, E], added; see ``PositionalEncoding.rows``.

        Returns:
            [..., T, E] in the dtype of the table.

        Raises:
            TypeError, ValueError: an argument's dtype or shape is wrong.
            IndexError: a token lies outside [0, V) (on CPU, in eager mode).
        """
        check_ids(type(self).__name__, "input", input, "num_embeddings", self.num_embeddings)
        dropout_p = self.dropout if self.training else 0.0
        if self.padding_idx is None and self.max_norm is None and not self.scale_grad_by_freq and not self.sparse:
            return ops.embedding(input, self.weight, positions, scale=self.scale, dropout_p=dropout_p)
        out = super().forward(input) * self.scale
        return F.dropout(out if positions is None else out + positions, dropout_p)

    def tied_projection(self, bias: bool = False) -> nn.Linear:
        """A linear layer from E to V whose weight is this table: one parameter, under both names in a
        ``state_dict``, with the sum of both gradients.

        Source: Press, Wolf, "Using the Output Embedding to Improve Language Models", 2017.
        """
        with torch.device("meta"):  # the weight that it starts with is thrown away
            linear = nn.Linear(self.embedding_dim, self.num_embeddings, bias=False)
        linear.weight = self.weight
        if bias:
            linear.bias = nn.Parameter(self.weight.new_zeros(self.num_embeddings))
        return linear

    def extra_repr(self) -> str:
        extras = {"scale": (self.scale, 1.0), "dropout": (self.dropout, 0.0)}
        return super().extra_repr() + "".join(f", {k}={v}" for k, (v, usual) in extras.items() if v != usual)


class PositionalEncoding(nn.Module):
    """``out = dropout(x + P[offset .. offset + T))`` with a table P [max_length, E].

    With ``w_i = base^(-2i / E)``:

    * ``"interleaved"``: ``P[t, 2i] = sin(t w_i)``, ``P[t, 2i + 1] = cos(t w_i)``, as in the paper;
    * ``"halves"``: all sines, then all cosines, of the same frequencies, as in Marian;
    * ``"learned"``: a parameter ``weight``, which starts as N(0, 0.02^2).

    Args:
        d_model: E. max_length: positions of the table.
        kind: one of the three. dropout: probability of dropping an element of the sum, in training mode.
        base: of the frequencies. batch_first: inputs are [B,T,E] instead of [T,B,E].
        device, dtype: of the table. A sinusoidal one is no part of the ``state_dict``.

    Raises:
        ValueError: the kind is unknown, or a size is not positive.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.5; learned: Gehring et al., 2017.
    """

    def __init__(
        self,
        d_model: int,
        max_length: int = 5000,
        kind: str = "interleaved",
        dropout: float = 0.0,
        base: float = 10000.0,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if kind not in KINDS:
            raise ValueError(f"{name}: kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
        if d_model < 1 or max_length < 1:
            raise ValueError(f"{name}: d_model and max_length must be at least 1, got {d_model} and {max_length}")
        self.d_model, self.max_length, self.kind, self.base, self.batch_first = (
            d_model,
            max_length,
            kind,
            base,
            batch_first,
        )
        self.dropout = nn.Dropout(dropout)
        device = torch.get_default_device() if device is None else torch.device(device)
        if kind == "learned":
            self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        else:  # never on meta: a model that is made there has its parameters loaded, and this is not one of them
            device = torch.device("cpu") if device.type == "meta" else device
            self.register_buffer("weight", torch.empty(max_length, d_model, device=device, dtype=dtype), False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the table anew."""
        with torch.no_grad():
            if self.kind == "learned":
                nn.init.normal_(self.weight, std=0.02)
            else:
                self.weight.copy_(sinusoids(self.max_length, self.d_model, self.kind, self.base))

    def rows(self, length: int, offset: int = 0) -> Tensor:
        """The table's rows [length, E] from ``offset`` on.

        Raises:
            ValueError: the table ends before.
        """
        if length < 0 or offset < 0 or offset + length > self.max_length:
            raise ValueError(
                f"{type(self).__name__}: positions {offset} to {offset + length} do not fit a table of"
                f" max_length = {self.max_length}"
            )
        return self.weight[offset : offset + length]

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Args:
            x: [T,B,E], [B,T,E] with ``batch_first``, or [T,E]; floating point.
            offset: position of the first token; with a cache the number of tokens before.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: a shape is wrong, or the positions exceed the table.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            layout = "[B,T,E]" if self.batch_first else "[T,B,E]"
            raise ValueError(
                f"{type(self).__name__}: x must be {layout} or [T,E] with E = {self.d_model}, got {list(x.shape)}"
            )
        axis = 1 if x.dim() == 3 and self.batch_first else 0
        rows = self.rows(x.shape[axis], offset).to(x.dtype)
        out: Tensor = self.dropout(x + (rows if x.dim() == 2 or self.batch_first else rows[:, None]))
        return out

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_length={self.max_length}, kind={self.kind!r}"


def sinusoids(length: int, d_model: int, kind: str, base: float = 10000.0) -> Tensor:
    """The table [length, d_model] of a sinusoidal kind, computed in float64, returned in float32."""
    pairs = torch.arange(0, d_model, 2, dtype=torch.float64, device="cpu")
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * torch.exp(
        pairs * (-math.log(base) / d_model)
    )
    sines, cosines = angles.sin(), angles[:, : d_model // 2].cos()  # an odd size has one sine more
    if kind == "halves":
        return torch.cat([sines, cosines], 1).float()
    table = torch.empty(length, d_model, device="cpu")
    table[:, 0::2], table[:, 1::2] = sines, cosines
    return table


def check_ids(owner: str, name: str, ids: Tensor, table: str, size: int) -> None:
    """Are all indices in [0, size)? On CPU in eager mode only: elsewhere looking at them would stall the device.

    Raises:
        IndexError: one is not; it and its place are named.
    """
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= size:
        value = low if low < 0 else high
        place = (ids == value).nonzero()[0].tolist()
        raise IndexError(f"{owner}: {name} must lie in [0, {table} = {size}), got {value} at {place}")
