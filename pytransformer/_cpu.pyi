"""The compiled module of CPU kernels: csrc/bindings. Outputs are allocated by the caller."""

from collections.abc import Sequence

from torch import Tensor

LARGE: int  # bytes

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_status() -> dict[str, bool]: ...
def peak_rate(paired: bool, seconds: float) -> float: ...
def empty(shape: Sequence[int], dtype: str) -> Tensor: ...
def release_large() -> int: ...
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
    rng: Tensor | None,
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
    rng: Tensor | None,
) -> None: ...
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
    rng: Tensor | None,
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
    rng: Tensor | None,
) -> None: ...
def ffn_fwd(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    activation: str,
    dropout_p: float,
    output: Tensor,
    hidden: Tensor | None,
    rng: Tensor | None,
) -> None: ...
def embedding_fwd(
    weight: Tensor,
    tokens: Tensor | None,
    scale: float,
    positions: Tensor | None,
    position_index: Tensor | None,
    segment_weight: Tensor | None,
    segments: Tensor | None,
    dropout_p: float,
    output: Tensor,
    rng: Tensor | None,
) -> None: ...
def embedding_bwd(
    grad_output: Tensor,
    tokens: Tensor | None,
    scale: float,
    position_index: Tensor | None,
    segments: Tensor | None,
    dropout_p: float,
    grad_weight: Tensor | None,
    grad_positions: Tensor | None,
    grad_segment_weight: Tensor | None,
    rng: Tensor | None,
) -> None: ...
def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, rng: None) -> None: ...
def linear_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    rng: None,
) -> None: ...
def linear_cross_entropy_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    loss: Tensor,
    lse: Tensor,
    grad_loss: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...
def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...
def ffn_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    hidden: Tensor,
    activation: str,
    dropout_p: float,
    grad_input: Tensor | None,
    grad_weight1: Tensor | None,
    grad_bias1: Tensor | None,
    grad_weight2: Tensor | None,
    grad_bias2: Tensor | None,
    grad_weight_gate: Tensor | None,
    grad_bias_gate: Tensor | None,
    rng: Tensor | None,
) -> None: ...
