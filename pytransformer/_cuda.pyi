"""The compiled CUDA module: csrc/bindings. Outputs and workspaces are allocated by the caller."""

from typing import Any

from torch import Tensor

# (device, stream, rng, workspace, counters): pytransformer/backends/cuda/_arguments.py
Call = tuple[int, int, Tensor | None, Tensor | None, Tensor | None]

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
    block_table: Tensor | None,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    at_end: bool,
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
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    at_end: bool,
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    block_table: Tensor | None,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    dropout_p: float,
    lse: Tensor | None,
) -> int: ...
def multiprocessors(device: int) -> int: ...
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
def ffn_activation_fwd(
    hidden: Tensor,
    gate: Tensor | None,
    activation: str,
    dropout_p: float,
    activated: Tensor,
    call: Call,
) -> None: ...
def ffn_activation_bwd(
    grad_activated: Tensor,
    hidden: Tensor,
    gate: Tensor | None,
    activation: str,
    dropout_p: float,
    activated: Tensor,
    grad_hidden: Tensor,
    grad_gate: Tensor | None,
    grad_bias: Tensor | None,
    grad_bias_gate: Tensor | None,
    call: Call,
) -> None: ...
def embedding_fwd(
    weight: Tensor,
    tokens: Tensor,
    scale: float,
    positions: Tensor | None,
    position_index: Tensor | None,
    segment_weight: Tensor | None,
    segments: Tensor | None,
    dropout_p: float,
    output: Tensor,
    call: Call,
) -> None: ...
def embedding_table_bwd(
    grad_output: Tensor,
    order: Tensor | None,
    ends: Tensor | None,
    scale: float,
    dropout_p: float,
    grad: Tensor,
    call: Call,
) -> None: ...
def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    row_scale: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    call: Call,
) -> None: ...
