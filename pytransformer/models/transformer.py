"""Transformer: the encoder-decoder of "Attention Is All You Need", and the models that have its form.

One class serves the paper's model and the checkpoints of BART and Marian, which differ in what stands around the
same layers: how positions are encoded, whether embeddings are scaled and normalised, where the norms stand. Source
and target share one table with the output projection (as in the paper, sec. 3.4), and the loss, with label smoothing,
is taken without storing logits. The layers are ``nn.TransformerEncoder`` and ``nn.TransformerDecoder``; decoding hands
the latter a cache.

Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3 and 5.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import masks, ops
from pytransformer.masks import Mask
from pytransformer.models import _hf
from pytransformer.models._attention import attention_weights
from pytransformer.models._checks import (
    ACTIVATIONS,
    check_same_shape,
    check_tokens,
)
from pytransformer.models.transformer_config import FAMILIES, SIDES, TransformerConfig
from pytransformer.nn import (
    Embedding,
    LayerNorm,
    PositionalEncoding,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from pytransformer.nn._linear import linear
from pytransformer.nn.cache import Cache
from pytransformer.nn.embedding import check_ids

_ATTENTIONS = ((".self_attn", ".self_attn"), (".multihead_attn", ".encoder_attn"))
# Which norm is which depends on the side: an encoder layer has two, a decoder layer three.
_NORMS = {
    "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
    "decoder": {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"},
}


class _SideNames(_hf.Names):
    def _rename(self, name: str) -> str:
        for ours, theirs in _NORMS.get(name.split(".")[0], {}).items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return super()._rename(name)


_NAMES = _SideNames(
    renamed=(
        ("model.shared.", "embedding."),
        ("model.encoder.layernorm_embedding.", "encoder_norm."),
        ("model.decoder.layernorm_embedding.", "decoder_norm."),
        ("model.encoder.embed_positions.", "encoder_positions."),
        ("model.decoder.embed_positions.", "decoder_positions."),
        ("model.encoder.layers.", "encoder.layers."),
        ("model.decoder.layers.", "decoder.layers."),
        (".encoder_attn.", ".multihead_attn."),
        (".fc1.", ".linear1."),
        (".fc2.", ".linear2."),
    ),
    packed=tuple(
        (f"{ours}.in_proj_{kind}", tuple(f"{theirs}.{x}_proj.{kind}" for x in "qkv"))
        for ours, theirs in _ATTENTIONS
        for kind in ("weight", "bias")
    ),
)
_TIED = {
    "lm_head.weight": "model.shared.weight",
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
}
_BART_OFFSET = 2  # its position tables begin with two rows that nothing reads


class TransformerOutput(NamedTuple):
    """What a ``Transformer`` returns.

    Attributes:
        last_hidden_state: of the decoder, [B,T,E].
        encoder_last_hidden_state: [B,S,E].
        logits: [B,T,V]; None where labels were given.
        loss: a scalar, where labels were given.
        encoder_attentions, decoder_attentions, cross_attentions: the attention weights of each layer, [B,H,S,S],
            [B,H,T,T] and [B,H,T,S] each, if asked for.
    """

    last_hidden_state: Tensor
    encoder_last_hidden_state: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class Transformer(nn.Module):
    """An encoder-decoder with one table for source, target and output.

    Args:
        config: the sizes.

    Weights start as in ``torch.nn.Transformer``: matrices Glorot-uniform; the table N(0, 1/E) where embeddings are
    scaled, else N(0, 0.02^2). Dropout follows the config in training mode.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        E, norm_first = config.d_model, config.norm_first
        self.embedding = Embedding(config.vocab_size, E, scale=math.sqrt(E) if config.scale_embedding else 1.0)
        rows = config.max_position_embeddings + self._position_offset
        kind = config.position_encoding
        self.encoder_positions, self.decoder_positions = (PositionalEncoding(E, rows, kind) for _ in range(2))
        norms = (LayerNorm(E) if config.normalize_embedding else None for _ in range(2))
        self.encoder_norm, self.decoder_norm = norms
        self.dropout = nn.Dropout(config.dropout)
        last = LayerNorm(E) if norm_first else None
        self.encoder = TransformerEncoder(
            _layer(TransformerEncoderLayer, config, "encoder"), config.encoder_layers, last
        )
        last = LayerNorm(E) if norm_first else None
        self.decoder = TransformerDecoder(
            _layer(TransformerDecoderLayer, config, "decoder"), config.decoder_layers, last
        )
        if config.final_logits_bias:
            self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        for stack in (self.encoder, self.decoder):
            for p in stack.parameters():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)
        nn.init.normal_(self.embedding.weight, std=E**-0.5 if config.scale_embedding else 0.02)

    @property
    def max_positions(self) -> int:
        """How long a source or a target may be."""
        return self.config.max_position_embeddings

    @property
    def _position_offset(self) -> int:
        return _BART_OFFSET if self.config.model_type == "bart" else 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool = False,
    ) -> TransformerOutput:
        """Reads sources and targets.

        Args:
            input_ids: sources, int32 or int64 [B,S].
            attention_mask: [B,S], true or nonzero for a real token; padding may stand anywhere.
            decoder_input_ids: targets, int32 or int64 [B,T]; from ``labels``, one place to the right behind
                ``decoder_start_token_id``, where None.
            decoder_attention_mask: [B,T], as ``attention_mask``; attention is causal besides.
            labels: integer [B,T], -100 where nothing is to be predicted: ``labels[t]`` is the token at t.
            output_attentions: also return the attention weights.

        Returns:
            A ``TransformerOutput``; with ``labels`` the loss in place of the logits, which are then never stored.

        Raises:
            TypeError, ValueError: an argument's dtype or shape is wrong, or a length exceeds the position table.
            IndexError: an id lies outside the vocabulary (on CPU, in eager mode).
        """
        name = type(self).__name__
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(f"{name}: one of decoder_input_ids and labels is wanted, got neither")
            decoder_input_ids = self._shifted(labels)
        for what, mask, ids_name, ids in (
            ("attention_mask", attention_mask, "input_ids", input_ids),
            ("decoder_attention_mask", decoder_attention_mask, "decoder_input_ids", decoder_input_ids),
            ("labels", labels, "decoder_input_ids", decoder_input_ids),
        ):
            if mask is not None:
                check_same_shape(name, what, mask, ids_name, ids)
        target_mask = masks.causal()
        if decoder_attention_mask is not None:
            target_mask = target_mask & masks.padding(decoder_attention_mask.bool())
        with attention_weights(self if output_attentions else None) as seen:
            memory = self.encode(input_ids, attention_mask)
            hidden = self.decode(decoder_input_ids, memory, target_mask, attention_mask)
        loss = None if labels is None else self._loss(hidden, labels)
        weights = _by_kind(seen) if output_attentions else (None, None, None)
        return TransformerOutput(hidden, memory, self.logits(hidden) if labels is None else None, loss, *weights)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The memory [B,S,E] of sources [B,S]; padding is not computed."""
        x = self._embed("input_ids", input_ids, self.encoder_positions, self.encoder_norm, None, 0)
        memory: Tensor = self.encoder(x, src_key_padding_mask=_hidden(attention_mask))
        return memory

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        mask: Mask | None = None,
        memory_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """The decoder's output [B,T,E] over targets [B,T], or their continuation where a cache holds what came before.

        Args:
            mask: of the scores [B,H,T,n + T], n tokens being in the cache; causal where None.
            memory_mask: [B,S], as ``attention_mask`` of the sources.
            position_ids: [B,T]; counted on from the cache where None.
        """
        past = 0 if cache is None else cache.layer(0).self_attention.length
        ids, positions = decoder_input_ids, self.decoder_positions
        x = self._embed("decoder_input_ids", ids, positions, self.decoder_norm, position_ids, past)
        mask = masks.causal("bottom_right") if mask is None else mask
        hidden = _hidden(memory_mask)
        out: Tensor = self.decoder(
            x, memory, tgt_mask=mask, tgt_is_causal=False, memory_key_padding_mask=hidden, cache=cache
        )  # fmt: skip
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [..., V] of the next token."""
        return linear(hidden, self.embedding.weight, self._logits_bias)

    @property
    def _logits_bias(self) -> Tensor | None:
        return self.final_logits_bias[0] if self.config.final_logits_bias else None  # type: ignore[index]

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        check_ids(
            type(self).__name__, "labels", labels.masked_fill(labels == -100, 0), "vocab_size", self.config.vocab_size
        )
        smoothing = self.config.label_smoothing if self.training else 0.0
        return ops.linear_cross_entropy(
            hidden, self.embedding.weight, labels, linear_bias=self._logits_bias, label_smoothing=smoothing
        )

    def _embed(
        self, name: str, ids: Tensor, positions: Any, norm: Any, position_ids: Tensor | None, past: int
    ) -> Tensor:
        owner, limit = type(self).__name__, self.max_positions
        check_tokens(owner, name, ids)
        check_ids(owner, name, ids, "vocab_size", self.config.vocab_size)
        if position_ids is None and past + ids.shape[1] > limit:
            raise ValueError(
                f"{owner}: {name} has {ids.shape[1]} tokens a row after {past} in the cache, and"
                f" max_position_embeddings is {limit}"
            )
        if position_ids is None:
            rows = positions.rows(ids.shape[1], past + self._position_offset)
        else:
            check_same_shape(owner, "position_ids", position_ids, name, ids)
            check_ids(owner, "position_ids", position_ids, "max_position_embeddings", limit)
            rows = F.embedding(position_ids + self._position_offset, positions.weight)
        x = self.embedding(ids, rows)
        out: Tensor = self.dropout(x if norm is None else norm(x))
        return out

    def _shifted(self, labels: Tensor) -> Tensor:
        """The targets that predict ``labels``: the start token, then all labels but the last."""
        owner, start, pad = type(self).__name__, self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"{owner}: decoder_input_ids are wanted where the config lacks a special token; it has"
                f" decoder_start_token_id = {start} and pad_token_id = {pad}"
            )
        check_tokens(owner, "labels", labels)
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == -100, pad)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Transformer:
        """Reads a Hugging Face directory of BART or Marian: config.json and safetensors, whole or in shards.

        Args:
            path: the directory.
            dtype, device: of the parameters.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: the directory lacks a file.
            ValueError: a file cannot be read, or the weights do not fit the config; every missing, surplus and
                misshapen key is named, and so is a table that is not tied.
            ImportError: ``safetensors`` is not installed.
        """
        config_dict, weights = _hf.read_directory(cls.__name__, path)
        config, source = TransformerConfig.from_dict(config_dict), os.fspath(path)
        weights = _hf.without_tied(cls.__name__, weights, _TIED, source)
        if config.position_encoding != "learned":  # old files hold the sinusoids
            weights = {name: x for name, x in weights.items() if "embed_positions" not in name}
        return _hf.load(lambda: cls(config), weights, _NAMES, source, dtype, device)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``BartForConditionalGeneration`` or ``MarianMTModel``: copies.

        Raises:
            ValueError: the model is neither.
        """
        if self.config.model_type not in FAMILIES:
            raise ValueError(
                f"{type(self).__name__}: to_hf_state_dict wants model_type 'bart' or 'marian', got"
                f" {self.config.model_type!r}"
            )
        theirs = _hf.from_own(self.state_dict(), _NAMES)
        theirs.update({copy: theirs[table].clone() for copy, table in _TIED.items()})
        if self.config.position_encoding != "learned":
            for side in SIDES:
                table: Any = getattr(self, f"{side}_positions").weight
                theirs[f"model.{side}.embed_positions.weight"] = table.detach().clone()
        return theirs


def _layer(kind: Any, config: TransformerConfig, side: str) -> Any:
    """A layer of one side, with the three rates of dropout that the config knows."""
    layer = kind(
        config.d_model,
        getattr(config, f"{side}_attention_heads"),
        getattr(config, f"{side}_ffn_dim"),
        config.dropout,
        ACTIVATIONS[config.activation_function],
        batch_first=True,
        norm_first=config.norm_first,
    )
    layer.dropout.p = config.activation_dropout
    for attention in (layer.self_attn, getattr(layer, "multihead_attn", None)):
        if attention is not None:
            attention.dropout = config.attention_dropout
    return layer


def _hidden(attention_mask: Tensor | None) -> Tensor | None:
    """A mask of real tokens as torch.nn's key padding mask, where True is padding."""
    return None if attention_mask is None else ~attention_mask.bool()


def _by_kind(seen: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Attention weights by module name as those of the encoder, the decoder and the cross-attention."""
    kinds = (("encoder.", "self_attn"), ("decoder.", "self_attn"), ("decoder.", "multihead_attn"))
    return tuple(tuple(w for n, w in seen.items() if n.startswith(a) and n.endswith(b)) for a, b in kinds)
