"""The compiled CUDA module: csrc/bindings. Outputs and workspaces are allocated by the caller."""

from typing import Any

from torch import Tensor

# (device, stream, rng, workspace, counters): pytransformer/backends/cuda/_arguments.py
Call = tuple[int, int, Tensor | None, Tensor | None, Tensor]

def report_devices() -> dict[str, Any]: ...
def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    call: Call,
) -> None: ...
def attention_bwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
    call: Call,
) -> None: ...
def attention_workspace(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, backward: bool
) -> int: ...
def layer_norm_fwd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rms: bool,
    output: Tensor,
    sum: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    call: Call,
) -> None: ...
def layer_norm_bwd(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    rms: bool,
    grad_residual: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_input_bias: Tensor | None,
    call: Call,
) -> None: ...
