"""BertForPreTraining: BERT with the two heads that it is pre-trained by.

The masked-language-model head ranks the vocabulary at the positions that were masked; its output matrix is the word
table. The next-sentence head says of a pair whether the second sentence follows the first. Only the masked positions,
15% as a rule, pass the first head in training, and their logits are never stored.

Source: Devlin et al., "BERT", 2019, sec. 3.1.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import ops
from pytransformer.models import _hf
from pytransformer.models._checks import ACTIVATIONS, check_same_shape
from pytransformer.models.bert import NAMES, Bert, BertConfig, modern_names
from pytransformer.nn import LayerNorm
from pytransformer.nn.embedding import check_ids
from pytransformer.nn.ffn import activation_function

_NAMES = _hf.Names(
    renamed=(
        *NAMES.renamed,
        ("cls.predictions.transform.dense.", "transform."),
        ("cls.predictions.transform.LayerNorm.", "transform_norm."),
        ("cls.predictions.bias", "prediction_bias"),
        ("cls.seq_relationship.", "next_sentence."),
    ),
    packed=NAMES.packed,
)
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_IGNORED = -100


class BertPreTrainingOutput(NamedTuple):
    """What a ``BertForPreTraining`` returns.

    Attributes:
        last_hidden_state: [B,T,E].
        next_sentence_logits: [B,2]; class 0 says that the second sentence follows the first.
        prediction_logits: [B,T,V]; None where ``labels`` were given.
        loss: the sum of the heads' mean losses, where their labels were given.
    """

    last_hidden_state: Tensor
    next_sentence_logits: Tensor
    prediction_logits: Tensor | None = None
    loss: Tensor | None = None


class BertForPreTraining(nn.Module):
    """``mlm = LN(act(W h + b)) E^T + c`` over the word table E, ``nsp = W' pooled + b'``.

    Args:
        config: the sizes.

    Attributes:
        bert: the ``Bert``, which can be used and saved alone.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        E = config.hidden_size
        self.config = config
        self.bert = Bert(config)
        self.transform = nn.Linear(E, E)
        self.transform_norm = LayerNorm(E, config.layer_norm_eps)
        self.prediction_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.next_sentence = nn.Linear(E, 2)
        for linear in (self.transform, self.next_sentence):
            nn.init.normal_(linear.weight, std=config.initializer_range)
            nn.init.zeros_(linear.bias)
        self._activation = activation_function(ACTIVATIONS[config.hidden_act])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> BertPreTrainingOutput:
        """Reads a batch of sentence pairs.

        Args:
            input_ids, attention_mask, token_type_ids: as for ``Bert``.
            labels: integer [B,T], the masked tokens, -100 where none was masked.
            next_sentence_label: integer [B]: 0 where the second sentence follows the first, else 1.

        Returns:
            A ``BertPreTrainingOutput``.

        Raises:
            TypeError, ValueError: an argument's dtype or shape is wrong.
            IndexError: an id lies outside its table (on CPU, in eager mode).
        """
        hidden, pooled, *_ = self.bert(input_ids, attention_mask, token_type_ids)
        relationship = self.next_sentence(pooled)
        losses = []
        if labels is not None:
            losses.append(self._prediction_loss(hidden, labels, input_ids))
        if next_sentence_label is not None:
            if tuple(next_sentence_label.shape) != (input_ids.shape[0],):
                raise ValueError(
                    f"{type(self).__name__}: next_sentence_label must be [B] = [{input_ids.shape[0]}], got"
                    f" {list(next_sentence_label.shape)}"
                )
            losses.append(F.cross_entropy(relationship.float(), next_sentence_label))
        table = self.bert.embeddings.word_embeddings.weight
        logits = F.linear(self._transformed(hidden), table, self.prediction_bias) if labels is None else None
        return BertPreTrainingOutput(hidden, relationship, logits, sum(losses) if losses else None)  # type: ignore[arg-type]

    def _transformed(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.transform_norm(self._activation(self.transform(hidden)))
        return out

    def _prediction_loss(self, hidden: Tensor, labels: Tensor, input_ids: Tensor) -> Tensor:
        name, table = type(self).__name__, self.bert.embeddings.word_embeddings.weight
        check_same_shape(name, "labels", labels, "input_ids", input_ids)
        masked = labels != _IGNORED
        check_ids(name, "labels", labels.masked_fill(~masked, 0), "vocab_size", self.config.vocab_size)
        if not torch.compiler.is_compiling():  # a compiled graph has no shapes that depend on values
            hidden, labels = hidden[masked], labels[masked]
        return ops.linear_cross_entropy(self._transformed(hidden), table, labels, linear_bias=self.prediction_bias)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> BertForPreTraining:
        """Reads a Hugging Face directory of a BERT with both heads; as ``Bert.from_pretrained``.

        Raises:
            FileNotFoundError: the directory lacks a file.
            ValueError: a file cannot be read, or the weights do not fit the config; every missing, surplus and
                misshapen key is named, and so is a head that is not tied to the word table.
            ImportError: ``safetensors`` is not installed.
        """
        config_dict, weights = _hf.read_directory(cls.__name__, path)
        config, source = BertConfig.from_dict(config_dict), os.fspath(path)
        weights = {
            f"bert.{n}" if n.startswith(("embeddings.", "encoder.", "pooler.")) else n: x for n, x in weights.items()
        }
        weights = _hf.without_tied(cls.__name__, modern_names(weights), _TIED, source)
        return _hf.load(lambda: cls(config), weights, _NAMES, source, dtype, device)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``transformers.BertForPreTraining``: copies, contiguous, detached."""
        theirs = _hf.from_own(self.state_dict(), _NAMES)
        return {**theirs, **{copy: theirs[table].clone() for copy, table in _TIED.items()}}
