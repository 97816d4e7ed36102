"""attention_weights: what every attention of a model looked at during a call, without a second model.

A fused attention computes no weights unless it is asked to; then it recomputes them from the log-sum-exp that it
returns anyway. A layer does not ask, so hooks ask in its place: they change the arguments of each attention's call and
pick up the second thing it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pytransformer.nn import MultiheadAttention


@contextmanager
def attention_weights(model: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """Collects the attention weights of every ``nn.MultiheadAttention`` of ``model`` that is called in the block::

        with attention_weights(model) as seen:
            model(x)
        seen["encoder.layers.0.self_attn"]  # [B,H,T,S]

    Args:
        model: any module; None collects nothing.

    Yields:
        A dict from module names to weights [B,H,T,S], after dropout; of a module called twice, those of the last
        call. Under recorded gradients the reference serves these calls (see ``ops.attention``).
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[1]

        return hook

    for name, module in () if model is None else model.named_modules():
        if isinstance(module, MultiheadAttention):
            handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(module.register_forward_hook(keep(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
