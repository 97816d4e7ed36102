"""Pictures of attention: head maps for papers and notebooks, and a token-to-token view for browsers.

    out = model(ids, output_attentions=True)
    viz.head_maps(out.attentions, tokens).savefig("heads.png")
    viz.token_view(out.attentions, tokens).save("attention.html")

Weights come from ``output_attentions=True`` of a model, or from ``models.attention_weights`` around any call of
``nn`` modules. Only one sequence of a batch is drawn. The HTML is one file without any reference to another: it opens
offline, and shows itself in a notebook.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = Sequence[Tensor] | Mapping[str, Tensor]


def head_maps(
    weights: Weights,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    batch_index: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Any:
    """A grid of attention maps: a row for each layer, a column for each head, queries down and keys across.

    Args:
        weights: the attention weights of each layer, [B,H,T,S]; or a dict from names to them.
        tokens: the T queries' texts, as tick labels. key_tokens: the S keys'; the queries' where None and T = S.
        batch_index: the sequence to draw.
        layers, heads: which to draw; all where None.

    Returns:
        A ``matplotlib.figure.Figure``. Every map has the same scale, from 0 (white) to 1 (dark).

    Raises:
        ImportError: matplotlib is not installed; the message has the command.
        TypeError, ValueError, IndexError: an argument's type, shape or value is wrong.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("viz.head_maps draws with matplotlib: pip install 'pytransformer[plots]'") from error
    names, stack, tokens, key_tokens = _prepared("head_maps", weights, tokens, key_tokens, batch_index)
    rows = _chosen("layers", layers, len(stack))
    columns = _chosen("heads", heads, min(x.shape[0] for x in stack))
    side = 1.2 + 0.16 * min(max(stack[0].shape[1:]), 24)
    figure = Figure(figsize=(side * len(columns) + 0.9, side * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    image: Any = None
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            ax = axes[i][j]
            image = ax.imshow(stack[row][column].numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
            if i == 0:
                ax.set_title(f"head {column}", fontsize=9)
            if j == 0:
                ax.set_ylabel(names[row], fontsize=9)
            _label(ax.yaxis, tokens if j == 0 else None)
            _label(ax.xaxis, key_tokens if i == len(rows) - 1 else None, rotation=90)
            for spine in ax.spines.values():
                spine.set_color("0.7")
    figure.colorbar(image, ax=axes, shrink=min(1.0, 2.0 / len(rows) / side + 0.4), label="attention weight")
    return figure


@dataclass(frozen=True)
class TokenView:
    """A page that shows, for the token under the pointer, what each head looks at.

    Attributes:
        html: the whole page.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page; returns where."""
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


def token_view(
    weights: Weights,
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    *,
    batch_index: int = 0,
    title: str = "attention",
) -> TokenView:
    """Queries on the left, keys on the right, a line for every weight, and controls for layer and heads.

    Args:
        weights: the attention weights of each layer, [B,H,T,S]; or a dict from names to them.
        tokens: the T queries' texts. key_tokens: the S keys'; the queries' where None.
        batch_index: the sequence to draw.
        title: of the page.

    Returns:
        A ``TokenView``: ``save`` it, or let a notebook show it.

    Raises:
        TypeError, ValueError, IndexError: an argument's type, shape or value is wrong.
    """
    names, stack, tokens, key_tokens = _prepared("token_view", weights, tokens, key_tokens, batch_index)
    data = {
        "names": names,
        "queries": tokens,
        "keys": key_tokens,
        # Three digits tell all that a line's opacity can, and keep the page small.
        "weights": [[[[round(w, 3) for w in row] for row in head] for head in x.tolist()] for x in stack],
    }
    page = resources.files("pytransformer").joinpath("viz.html").read_text(encoding="utf-8")
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TokenView(page.replace("{{title}}", html.escape(title)).replace("{{data}}", payload))


def _prepared(
    owner: str, weights: Weights, tokens: Any, key_tokens: Any, batch_index: int
) -> tuple[list[str], list[Tensor], Any, Any]:
    """The names of the layers, their weights [H,T,S] in float32 on the CPU, and the labels of both sides."""
    named = weights if isinstance(weights, Mapping) else {f"layer {i}": x for i, x in enumerate(weights)}
    if not named:
        raise ValueError(f"viz.{owner}: weights are empty; call the model with output_attentions=True")
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"viz.{owner}: weights of {name!r} must be a tensor [B,H,T,S], got {got}")
        if not -x.shape[0] <= batch_index < x.shape[0]:
            raise IndexError(f"viz.{owner}: batch_index must lie in the batch of {x.shape[0]}, got {batch_index}")
    stack = [x[batch_index].detach().float().cpu() for x in named.values()]
    T, S = stack[0].shape[1:]
    if key_tokens is None and T == S:
        key_tokens = tokens
    for what, labels, count in (("tokens", tokens, T), ("key_tokens", key_tokens, S)):
        if labels is None and what == "key_tokens" and tokens is not None:
            raise ValueError(f"viz.{owner}: key_tokens are wanted where queries ({T}) and keys ({S}) are not the same")
        if labels is not None and any(x.shape[1 + (what != "tokens")] != len(labels) for x in stack):
            raise ValueError(f"viz.{owner}: {what} must be {count} texts, one for each row, got {len(labels)}")
    if not all(torch.isfinite(x).all() for x in stack):
        raise ValueError(f"viz.{owner}: weights hold NaN or Inf, which no attention weight can be")
    return (
        list(named),
        stack,
        None if tokens is None else list(tokens),
        None if key_tokens is None else list(key_tokens),
    )


def _chosen(name: str, wanted: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if wanted is None else list(wanted)
    if not chosen or any(not 0 <= i < count for i in chosen):
        raise IndexError(f"viz.head_maps: {name} must lie in [0, {count}), got {wanted!r}")
    return chosen


def _label(axis: Any, labels: Sequence[str] | None, **style: Any) -> None:
    """Every token's text, or every few where there are too many to read; none hides the ticks."""
    if labels is None:
        axis.set_ticks([])
        return
    step = math.ceil(len(labels) / 40)
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=7, **style)
    axis.set_tick_params(length=0)
