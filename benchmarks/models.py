"""Whole models: the sentence encoder all-MiniLM-L6-v2 on real text, BERT-base, greedy translation, and
steps of training.

Inference is against plain torch with the same weights (``_bert``), training against the same modules of
``torch.nn``, in which no row hides behind a slow framework.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from pytransformer.benchmarks import _training, _translation, memory
from pytransformer.benchmarks._bert import BertWorkload
from pytransformer.benchmarks._case import AbsentError, Case, Problem, dtype_name
from pytransformer.benchmarks._models import BERT_BASE, TRANSFORMER_BASE
from pytransformer.benchmarks.attention import lengths

LAYERS = 12
TRAINED_LAYERS = 2  # a step of training costs three forwards; the layers are all alike

SENTENCES = (
    "The cat sat on the mat.",
    "A kettle that is watched does, in the end, boil like any other kettle.",
    "Rivers carry the mountains to the sea, grain by grain, and nobody hears it happen.",
    "Who left the window open?",
    "The committee met twice in spring, postponed its decision until the harvest was in, and then found that the "
    "question had answered itself.",
    "She tuned the old piano by ear.",
    "Bread needs flour, water, salt, time, and a warm corner of the kitchen.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "No.",
    "The last train to the coast leaves at nine, unless it is raining, in which case it leaves when the driver has "
    "finished his tea and found his umbrella.",
    "Prices rose by three percent over the year.",
    "An honest map admits what its maker did not know; the oldest ones filled those places with whales, and the best "
    "ones left them white.",
    "He repaired clocks for a living and was late for everything else.",
    "The vaccine halved the number of cases within two months.",
    "Snow fell all night, and in the morning the village was so quiet that the baker could hear his own bread crack "
    "as it cooled.",
    "Two plus two is four.",
)


def cases(device: str = "cpu") -> Iterator[Case]:
    """The sentence encoder; BERT-base whole and padded; steps of training, and their memory."""
    texts = [*SENTENCES, *(f"{a} {b}" for a, b in zip(SENTENCES, reversed(SENTENCES), strict=True))]
    if device == "cpu":
        yield Case("models", "fwd", "float32", f"MiniLM-L6, {len(texts)} texts", 0.0, 0.0, partial(minilm, texts),
                   {"texts": len(texts)}, short=True)  # fmt: skip
        yield _translation.case(32, 32, 32, targets={_translation.PEER: 3.0, "ctranslate2": 1.0})
    for dtype in (torch.float32, torch.bfloat16):
        yield bert_case(dtype, 8, 128, device=device)
        yield bert_case(dtype, 1, 512, device=device)
        yield bert_case(dtype, 8, 128, padded=True, device=device)
    for dtype, target in ((torch.float32, 1.1), (torch.bfloat16, 1.25)):
        for model in (BERT_BASE, TRANSFORMER_BASE):
            yield _training.case(dtype, model, TRAINED_LAYERS, 8, 128, device=device, targets={"torch": target})
            yield _training.case(dtype, model, TRAINED_LAYERS, 8, 128, padded=True, device=device,
                                 targets={"torch": 1.8})  # fmt: skip
        yield memory.encoder_layer(dtype, device)


def bert_case(dtype: torch.dtype, B: int, S: int, padded: bool = False, device: str = "cpu", **more: Any) -> Case:
    """BERT-base, twelve layers, random weights; padded to 56% of real tokens."""
    return Case(
        op="models",
        direction="fwd",
        dtype=dtype_name(dtype),
        shape=f"BERT-base {B}x{S}" + (" padding" if padded else ""),
        operations=0.0,  # both follow from the number of tokens: `build` fills them in
        bytes=0.0,
        build=partial(bert, dtype, B, S, padded, device),
        sizes={"B": B, "T": S, "layers": LAYERS},
        device=device,
        **more,
    )


def bert(dtype: torch.dtype, B: int, S: int, padded: bool, device: str) -> Problem:
    """A random batch through random weights."""
    from pytransformer.models.bert import Bert, BertConfig

    torch.manual_seed(0)
    model = Bert(BertConfig(num_hidden_layers=LAYERS), add_pooling_layer=False).to(device, dtype).eval()
    ids = torch.randint(1000, BERT_BASE.vocabulary, (B, S), device=device)
    real = torch.arange(S, device=device) < lengths(B, S)[:, None].to(device) if padded else torch.ones_like(ids)
    tokens = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": torch.zeros_like(ids)}
    return BertWorkload(model, _weights(model), tokens, BERT_BASE.heads, padded).problem()


def minilm(texts: list[str]) -> Problem:
    """Sentences of uneven length, padded. Raises ``AbsentError`` where the weights are missing."""
    try:
        from pytransformer.models.minilm import load_minilm

        encoder = load_minilm()
    except ImportError as error:  # the message says what to install
        raise AbsentError(str(error)) from error
    model = encoder.model
    tokens = dict(encoder.tokenize(texts))
    return BertWorkload(model, _weights(model), tokens, model.config.num_attention_heads).problem()


def _weights(model: Any) -> dict[str, Any]:
    return {k.removeprefix("bert."): v.detach() for k, v in model.to_hf_state_dict().items()}
