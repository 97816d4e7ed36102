"""CTranslate2: whole models only, converted from a Hugging Face directory. Its encoder, which computes no padding; its
greedy translation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
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
        return torch.from_numpy(numpy.asarray(engine.forward_batch(tokens).last_hidden_state))

    return run


def translator(workload: Any) -> Callable[..., Any]:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        words = workload.save_hf(Path(folder, "hf"))
        target = Path(folder, "ct2")
        ctranslate2.converters.TransformersConverter(str(Path(folder, "hf"))).convert(str(target))
        engine = ctranslate2.Translator(str(target), device="cpu", compute_type="float32", inter_threads=1,
                                        intra_threads=torch.get_num_threads())  # fmt: skip
    sources = [[words[i] for i in row] for row in workload.sources.tolist()]
    ids, count = {word: i for i, word in enumerate(words)}, workload.target
    start = workload.model.config.decoder_start_token_id

    def run() -> Tensor:
        found = engine.translate_batch(sources, beam_size=1, max_decoding_length=count, min_decoding_length=count)
        return torch.tensor([[start, *(ids[word] for word in each.hypotheses[0])] for each in found])

    return run


ADAPTERS = {"models": encoder, "translation": translator}
PEERS = (Peer("ctranslate2", ADAPTERS, "ctranslate2", "ctranslate2", isolated=True, inference=True),)
