"""Whole models on real text: the sentence encoder all-MiniLM-L6-v2 against plain torch with the same weights.

The peer is BERT written with ``F.scaled_dot_product_attention``, ``F.linear``, ``F.gelu`` and ``F.layer_norm``:
what a person has without this library, with no framework's overhead around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import OURS, PEER, AbsentError, Case, Problem

HEADS, EPS = 12, 1e-12  # of all-MiniLM-L6-v2; its other sizes are those of its weights

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


def cases() -> Iterator[Case]:
    """One batch of sentences of uneven length, padded; in twos as well, so that lengths spread further."""
    texts = [*SENTENCES, *(f"{a} {b}" for a, b in zip(SENTENCES, reversed(SENTENCES), strict=True))]
    yield Case(
        op="models",
        direction="fwd",
        dtype="float32",
        shape=f"MiniLM-L6, {len(texts)} texts",
        operations=0.0,  # both follow from the number of tokens: `build` fills them in
        bytes=0.0,
        build=partial(build, texts),
    )


def build(texts: list[str]) -> Problem:
    """The encoder's last hidden state, without tokenisation. Raises ``AbsentError`` where the weights are missing."""
    encoder = _load()
    tokens = dict(encoder.tokenize(texts))
    weights = {k.removeprefix("bert."): v.detach() for k, v in encoder.model.to_hf_state_dict().items()}
    seen = tokens["attention_mask"].bool()
    ours = without_grad(lambda: last_hidden(encoder.model(**tokens)))
    peer = without_grad(partial(plain_bert, weights, tokens))
    wide = {k: v.double() for k, v in weights.items()}
    with torch.no_grad():
        expected, measure = plain_bert(wide, tokens)[seen], peer()[seen]

    def check(output: Tensor) -> list[Comparison]:
        return [compare("last hidden state", output[seen], expected, measure)]

    return Problem({OURS: ours, PEER: peer}, check, operations=operations(weights, seen), bytes=moved(weights, seen))


def _load() -> Any:
    try:
        from pytransformer.models.minilm import load_minilm

        return load_minilm()
    except ImportError as error:  # the message says what to install
        raise AbsentError(str(error)) from error


def without_grad(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` as in inference."""

    def call() -> Tensor:
        with torch.no_grad():
            return run()

    return call


def last_hidden(output: Any) -> Tensor:
    """The last hidden state of a model's output, in whichever form it comes."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return found


def plain_bert(weights: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> Tensor:
    """BERT in plain torch, in the dtype of its weights; ``weights`` by Hugging Face's names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    table = "embeddings.{}_embeddings.weight".format
    ids = tokens["input_ids"]
    segments = tokens.get("token_type_ids", torch.zeros_like(ids))
    x = F.embedding(ids, weights[table("word")]) + weights[table("position")][: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + F.embedding(segments, weights[table("token_type")]))
    mask = tokens["attention_mask"].bool()[:, None, None, :]
    for index in range(layers(weights)):
        layer = f"encoder.layer.{index}"
        query, key, value = (heads(linear(f"{layer}.attention.self.{part}", x)) for part in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(-2)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", seen))
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
    return x


def layers(weights: Mapping[str, Tensor]) -> int:
    """How many layers the weights hold."""
    return sum(name.endswith(".intermediate.dense.weight") for name in weights)


def operations(weights: Mapping[str, Tensor], seen: Tensor) -> float:
    """Of the matrix products for the real tokens: a padded one needs none."""
    lengths = seen.sum(-1).double()
    matrices = sum(w.numel() for name, w in weights.items() if name.startswith("encoder.") and w.dim() == 2)
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    pairs = 4 * width * lengths.square().sum().item() * layers(weights)
    return 2 * matrices * lengths.sum().item() + pairs


def moved(weights: Mapping[str, Tensor], seen: Tensor) -> float:
    """Bytes: each layer's weights once, the embedded tokens in and the hidden states out."""
    inner = sum(w.numel() for name, w in weights.items() if name.startswith("encoder."))
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    return 4.0 * (inner + 2 * width * int(seen.sum()))
