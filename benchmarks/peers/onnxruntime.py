"""ONNX Runtime on the plain PyTorch of the row, exported once; weights are constants. float32: its CPU provider has
no bfloat16 products."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks._case import AbsentError
from pytransformer.benchmarks.peers._peer import Peer
from pytransformer.benchmarks.peers._plain import Plain, widened


def exported(workload: Any) -> Callable[..., Any]:
    import onnxruntime

    if workload.dtype != torch.float32:
        raise AbsentError(f"its CPU provider has no {str(workload.dtype).removeprefix('torch.')} products")
    plain, file = Plain(widened(workload)), io.BytesIO()
    names = plain.names
    torch.onnx.export(plain, plain.inputs, file, input_names=names, dynamo=False, opset_version=17)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    used = {x.name for x in session.get_inputs()}  # an input that changes nothing is not exported

    def run(**tensors: Any) -> Tensor:
        inputs = {name: x.numpy() for name, x in zip(names, plain.changing(tensors), strict=True) if name in used}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


PEERS = (Peer("onnxruntime", {"*": exported}, "onnxruntime", "onnxruntime", isolated=True, inference=True),)
