"""Intel's OpenVINO on the plain PyTorch of the row, converted once; weights are constants that it may pack.

In bfloat16 it is given float32 tensors and told to multiply in bfloat16, which is how its users run it; on a
processor without bfloat16 instructions it then computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.peers._peer import Peer
from pytransformer.benchmarks.peers._plain import Plain, widened


def converted(workload: Any) -> Callable[..., Any]:
    import openvino

    plain = Plain(widened(workload))
    model = openvino.convert_model(plain, example_input=plain.inputs)
    precision = "bf16" if workload.dtype == torch.bfloat16 else "f32"
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
             "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}  # fmt: skip
    request = openvino.compile_model(model, "CPU", hints).create_infer_request()

    def run(**tensors: Any) -> Tensor:
        inputs = [x.numpy() for x in plain.changing(tensors)]
        return torch.from_numpy(request.infer(inputs)[0]).to(workload.dtype)

    return run


PEERS = (Peer("openvino", {"*": converted}, "openvino", "openvino", isolated=True, inference=True),)
