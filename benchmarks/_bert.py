"""BERT as plain torch, and the workload of one batch: what ours and every peer are given.

The peer is written with ``F.scaled_dot_product_attention``, ``F.linear``, ``F.gelu`` and ``F.layer_norm``: what a
person has without this library, with no framework's overhead around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import OURS, PEER, Problem

EPS = 1e-12

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class BertWorkload:
    """One batch through one BERT: the last hidden state, without tokenisation.

    Attributes:
        model: a ``pytransformer.models.bert.Bert``.
        hf_weights: its weights by Hugging Face's names.
        tensors: ``input_ids``, ``attention_mask`` and ``token_type_ids``.
        heads: of each layer.
        padded: some tokens are not real; without, the peer is given no mask at all.
        traceable: engines that compile a graph may be given it.
    """

    model: Any
    hf_weights: Weights
    tensors: dict[str, Tensor]
    heads: int
    padded: bool = True

    op = "models"
    direction = "fwd"
    traceable = True
    weights = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.hf_weights["embeddings.word_embeddings.weight"].dtype

    def peer(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """In plain torch."""
        tokens = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        if self.padded:
            tokens["attention_mask"] = attention_mask
        return plain_bert(self.hf_weights, tokens, self.heads)

    def provider(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """``function`` of the tensors, as in inference."""

        def call() -> Any:
            with torch.no_grad():
                return function(**self.tensors)

        return call

    def problem(self) -> Problem:
        """Both providers and the check of every real token."""
        tokens = self.tensors if self.padded else {k: v for k, v in self.tensors.items() if k != "attention_mask"}
        ours = self.provider(lambda **_: self.model(**tokens)[0])
        work = operations(self.hf_weights, self._seen), moved(self.hf_weights, self._seen)
        return Problem(
            {OURS: ours, PEER: self.provider(self.peer)}, self.check, self, operations=work[0], bytes=work[1]
        )

    def check(self, output: Tensor) -> list[Comparison]:
        expected, measure = self._oracle
        return [compare("last hidden state", output[self._seen], expected, measure)]

    @property
    def _seen(self) -> Tensor:
        return self.tensors["attention_mask"].bool()

    @cached_property
    def _oracle(self) -> tuple[Tensor, Tensor]:
        wide = {k: v.double() for k, v in self.hf_weights.items()}
        with torch.no_grad():
            expected = plain_bert(wide, self.tensors, self.heads)
            return expected[self._seen], self.peer(**self.tensors)[self._seen]

    def save_hf(self, folder: Path) -> None:
        """A directory that transformers reads, with a vocabulary of made-up words; for converters that want one."""
        import transformers

        # Converters ask for the kind of positions, of which transformers 5 knows one and says none.
        config = transformers.BertConfig(**self.model.config.to_dict(), position_embedding_type="absolute")
        model = transformers.BertModel(config, add_pooling_layer=False)
        model.load_state_dict(dict(self.hf_weights), strict=False)
        model.save_pretrained(folder)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = special + [f"w{i}" for i in range(config.vocab_size - len(special))]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def plain_bert(weights: Weights, tokens: Mapping[str, Tensor], heads: int) -> Tensor:
    """BERT in plain torch, in the dtype of its weights; ``weights`` by Hugging Face's names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    table = "embeddings.{}_embeddings.weight".format
    ids = tokens["input_ids"]
    segments = tokens.get("token_type_ids", torch.zeros_like(ids))
    x = F.embedding(ids, weights[table("word")]) + weights[table("position")][: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + F.embedding(segments, weights[table("token_type")]))
    mask = tokens["attention_mask"].bool()[:, None, None, :] if "attention_mask" in tokens else None
    for index in range(layers(weights)):
        layer = f"encoder.layer.{index}"
        query, key, value = (split(linear(f"{layer}.attention.self.{part}", x)) for part in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(-2)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", seen))
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
    return x


def layers(weights: Weights) -> int:
    """How many layers the weights hold."""
    return sum(name.endswith(".intermediate.dense.weight") for name in weights)


def operations(weights: Weights, seen: Tensor) -> float:
    """Of the matrix products for the real tokens: a padded one needs none."""
    lengths = seen.sum(-1).double()
    matrices = sum(w.numel() for name, w in weights.items() if name.startswith("encoder.") and w.dim() == 2)
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    pairs = 4 * width * lengths.square().sum().item() * layers(weights)
    return 2 * matrices * lengths.sum().item() + pairs


def moved(weights: Weights, seen: Tensor) -> float:
    """Bytes: each layer's weights once, the embedded tokens in and the hidden states out."""
    table = weights["embeddings.word_embeddings.weight"]
    inner = sum(w.numel() for name, w in weights.items() if name.startswith("encoder."))
    return float(table.element_size() * (inner + 2 * table.shape[1] * int(seen.sum())))
