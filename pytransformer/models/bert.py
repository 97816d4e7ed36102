"""BERT: a trainable encoder on the fused ops, and its weights in Hugging Face's names.

The layers are ``nn.TransformerEncoderLayer`` in their post-norm form, which is BERT's layer: a packed query, key
and value projection, attention that skips padding, two fused dropout + residual + norm steps and an exact-gelu
feed-forward.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, sec. 3.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytransformer import masks, ops
from pytransformer.models import _hf
from pytransformer.models._attention import attention_weights
from pytransformer.models._checks import (
    ACTIVATIONS,
    check_activation,
    check_divides,
    check_fields,
    check_same_shape,
    check_tokens,
    check_wanted,
)
from pytransformer.nn import LayerNorm, TransformerEncoderLayer
from pytransformer.nn._packing import pack
from pytransformer.nn.embedding import check_ids
from pytransformer.nn.encoder import skippable_rows

NAMES = _hf.Names(
    renamed=(
        ("embeddings.LayerNorm.", "embeddings.norm."),
        ("encoder.layer.", "layers."),
        (".attention.output.dense.", ".self_attn.out_proj."),
        (".attention.output.LayerNorm.", ".norm1."),
        (".intermediate.dense.", ".linear1."),
        (".output.dense.", ".linear2."),
        (".output.LayerNorm.", ".norm2."),
        ("pooler.dense.", "pooler."),
    ),
    packed=tuple(
        (f".self_attn.in_proj_{kind}", tuple(f".attention.self.{name}.{kind}" for name in ("query", "key", "value")))
        for kind in ("weight", "bias")
    ),
)
# What a checkpoint may hold besides: heads, and a buffer that old versions stored.
_HEADS = ("cls.", "classifier.", "qa_outputs.")
_BUFFERS = ("embeddings.position_ids",)


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT, under the names of Hugging Face's config.json.

    Raises:
        ValueError: a size is not a positive integer, a probability lies outside [0, 1], the heads do not divide
            the hidden size, or the activation is unknown.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides(self, "num_attention_heads", "hidden_size")
        check_activation(self, "hidden_act")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> BertConfig:
        """The fields of a config.json; what does not change the computation is left aside.

        Raises:
            ValueError: the model is of another type, or of a form of BERT that this class is not.
        """
        wanted = {
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        }
        check_wanted(cls.__name__, config, wanted)
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model."""
        return {"model_type": "bert", "architectures": ["BertModel"], **asdict(self)}


class BertOutput(NamedTuple):
    """What a ``Bert`` returns.

    Attributes:
        last_hidden_state: [B,T,E].
        pooler_output: [B,E], or None without a pooler.
        hidden_states: the embeddings and each layer's output, [B,T,E] each, if asked for.
        attentions: the attention weights of each layer, [B,H,T,T] each, if asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertEmbeddings(nn.Module):
    """``dropout(LN(word[input_ids] + position[0..T) + token_type[token_type_ids]))``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        E = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, E)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, E)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, E)
        self.norm = LayerNorm(E, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        types: Tensor | None = self.token_type_embeddings.weight
        if token_type_ids is None:  # every token is of type 0: a row to add to [T,E] and not to [B,T,E]
            positions, types = positions + self.token_type_embeddings.weight[0], None
        x = ops.embedding(
            input_ids, self.word_embeddings.weight, positions, segments=token_type_ids, segment_weight=types
        )
        out: Tensor = self.dropout(self.norm(x))
        return out


class Bert(nn.Module):
    """BERT's encoder, with its pooler.

    Args:
        config: the sizes.
        add_pooling_layer: have ``pooler_output = tanh(W last_hidden_state[:, 0] + b)``.

    Weights start as N(0, ``initializer_range``^2), biases as 0. Dropout follows the config in training mode.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            nn.init.normal_(layer.self_attn.in_proj_weight, std=config.initializer_range)  # type: ignore[union-attr,arg-type]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BertOutput:
        """Encodes a batch of token sequences.

        Args:
            input_ids: int32 or int64 [B,T], T at most ``max_position_embeddings``.
            attention_mask: [B,T], bool or numbers, true or nonzero for a real token; padding may stand anywhere,
                is not computed (see ``nn.TransformerEncoder``) and gives hidden states of 0. A position counts
                from the start of the row, padding included, as in ``transformers``.
            token_type_ids: int32 or int64 [B,T]; all 0 where None.
            output_hidden_states: also return every layer's input and the last one's output.
            output_attentions: also return every layer's attention weights.

        Returns:
            A ``BertOutput``.

        Raises:
            TypeError, ValueError: an argument's dtype or shape is wrong, or T exceeds the position table.
            IndexError: an id lies outside its table (on CPU, in eager mode).
        """
        self._check(input_ids, attention_mask, token_type_ids)
        x = self.embeddings(input_ids, token_type_ids)
        with attention_weights(self if output_attentions else None) as seen:
            states = self._encode(x, attention_mask, output_hidden_states)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(states[-1][:, 0]))
        weights = tuple(seen.values()) if output_attentions else None
        return BertOutput(states[-1], pooled, tuple(states) if output_hidden_states else None, weights)

    def _encode(self, x: Tensor, attention_mask: Tensor | None, every_state: bool) -> list[Tensor]:
        """The last hidden state, after all others if wanted; 0 at padding, which is not computed where possible."""
        mask: Any = None
        rows = computed = None
        if attention_mask is not None:
            real = attention_mask.bool()
            mask, computed = masks.padding(real), real.clone()
            if self.pooler is not None:
                computed[:, 0] = True  # the pooler reads it, padding or not
            rows = skippable_rows(self.layers, computed, x)
        if rows is not None:
            mask, x = pack(rows, rows, mask), rows.gather(x)
        states = [x]
        for layer in self.layers:
            x = layer(x, src_mask=mask)
            states = [*states, x] if every_state else [x]
        if rows is not None:
            return [rows.scatter(state) for state in states]
        if computed is not None:
            return [state.masked_fill(~computed[..., None], 0) for state in states]
        return states

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        add_pooling_layer: bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Bert:
        """Reads a Hugging Face directory: config.json and model.safetensors. Needs ``safetensors`` alone.

        Args:
            path: the directory.
            add_pooling_layer: None has a pooler exactly where the file has its weights.
            dtype, device: of the parameters.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: the directory lacks one of the two files.
            ValueError: a file cannot be read, or the weights do not fit the config; every missing, surplus and
                misshapen key is named. Heads over BERT and position_ids are left aside.
            ImportError: ``safetensors`` is not installed.
        """
        config_dict, weights = _hf.read_directory(cls.__name__, path)
        config, weights = BertConfig.from_dict(config_dict), canonical(weights)
        has_pooler = any(name.startswith("pooler.") for name in weights)
        pooler = has_pooler if add_pooling_layer is None else add_pooling_layer
        if not pooler:
            weights = {name: x for name, x in weights.items() if not name.startswith("pooler.")}
        return _hf.load(lambda: cls(config, pooler), weights, NAMES, os.fspath(path), dtype, device)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``transformers.BertModel``: copies, contiguous, detached."""
        return _hf.from_own(self.state_dict(), NAMES)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> None:
        name, config = type(self).__name__, self.config
        check_tokens(name, "input_ids", input_ids)
        if input_ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"{name}: input_ids has {input_ids.shape[1]} tokens a row, and max_position_embeddings is"
                f" {config.max_position_embeddings}"
            )
        for what, x in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if x is not None:
                check_same_shape(name, what, x, "input_ids", input_ids)
        check_ids(name, "input_ids", input_ids, "vocab_size", config.vocab_size)
        if token_type_ids is not None:
            check_tokens(name, "token_type_ids", token_type_ids)
            check_ids(name, "token_type_ids", token_type_ids, "type_vocab_size", config.type_vocab_size)


def canonical(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``BertModel``'s own names: without the prefix and the heads of other checkpoints."""
    bare = {name.removeprefix("bert."): x for name, x in weights.items() if not name.startswith(_HEADS)}
    return modern_names(bare)


def modern_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the buffers and the spellings of old files."""
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): x
        for name, x in weights.items()
        if not name.endswith(_BUFFERS)
    }


def _layer(config: BertConfig) -> TransformerEncoderLayer:
    """BERT drops out both branches and the attention weights, but not the hidden of the feed-forward."""
    layer = TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        activation=ACTIVATIONS[config.hidden_act],
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
    )
    layer.self_attn.dropout = config.attention_probs_dropout_prob
    layer.dropout.p = 0.0
    return layer
