"""The compiled CUDA module: csrc/bindings. Outputs and workspaces are allocated by the caller."""

from typing import Any

from torch import Tensor

# (device, stream, rng, workspace, counters): pytransformer/backends/cuda/_arguments.py
Call = tuple[int, int, Tensor | None, Tensor | None, Tensor]

def report_devices() -> dict[str, Any]: ...
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
