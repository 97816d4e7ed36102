"""CTranslate2's encoder: whole models only, converted from a Hugging Face directory; padding is not computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks._case import AbsentError
from pytransformer.benchmarks.peers._peer import Peer


def encoder(workload: Any) -> Callable[..., Any]:
    import ctranslate2

    if workload.dtype != torch.float32:
        raise AbsentError("its CPU products are of float32 and int8")
    with tempfile.TemporaryDirectory() as folder:
        workload.save_hf(Path(folder, "hf"))
        target = Path(folder, "ct2")
        ctranslate2.converters.TransformersConverter(str(Path(folder, "hf"))).convert(str(target))
        engine = ctranslate2.Encoder(str(target), device="cpu", compute_type="float32", inter_threads=1,
                                     intra_threads=torch.get_num_threads())  # fmt: skip
    lengths = workload.tensors["attention_mask"].sum(-1).tolist()
    tokens = [row[:n] for row, n in zip(workload.tensors["input_ids"].tolist(), lengths, strict=True)]

    def run(**tensors: Tensor) -> Tensor:
        return torch.from_numpy(engine.forward_batch(tokens).last_hidden_state.numpy())

    return run


PEERS = (Peer("ctranslate2", {"models": encoder}, "ctranslate2", "ctranslate2", isolated=True, inference=True),)
