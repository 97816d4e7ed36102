"""GPT: a decoder-only language model on the fused ops, in the shape of GPT-2.

A block is pre-norm: ``x = x + attention(norm1(x))``, ``x = x + ffn(norm2(x))``. Each addition is fused with the norm
that follows it, across the border of two blocks, so the residual stream is read and written once for every norm.
The logits are products with the token table itself; training never stores them, ``ops.linear_cross_entropy`` takes
the table. Decoding hands the keys and values of earlier tokens over in a cache.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, sec. 2.3.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import masks, ops
from pytransformer.masks import Mask
from pytransformer.models import _hf
from pytransformer.models._checks import (
    ACTIVATIONS,
    check_activation,
    check_divides,
    check_fields,
    check_same_shape,
    check_tokens,
    check_wanted,
)
from pytransformer.nn import LayerNorm
from pytransformer.nn._linear import apply_linear, linear
from pytransformer.nn.cache import Cache, SelfAttentionCache
from pytransformer.nn.embedding import check_ids
from pytransformer.nn.layer_norm import add_prenorm

_NAMES = _hf.Names(
    renamed=(
        ("transformer.wte.", "token_embeddings."),
        ("transformer.wpe.", "position_embeddings."),
        ("transformer.h.", "layers."),
        ("transformer.ln_f.", "norm."),
        (".ln_1.", ".norm1."),
        (".ln_2.", ".norm2."),
        (".attn.c_attn.", ".self_attn.in_proj."),
        (".attn.c_proj.", ".self_attn.out_proj."),
        (".mlp.c_fc.", ".linear1."),
        (".mlp.c_proj.", ".linear2."),
    ),
    transposed=("in_proj.weight", "out_proj.weight", "linear1.weight", "linear2.weight"),
)
_TIED = {"lm_head.weight": "transformer.wte.weight"}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old versions stored


@dataclass(frozen=True)
class GptConfig:
    """The sizes of a GPT, under the names of Hugging Face's config.json for GPT-2.

    Raises:
        ValueError: a size is not a positive integer, a probability lies outside [0, 1], the heads do not divide
            the embedding size, a special token is not in the vocabulary, or the activation is unknown.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides(self, "n_head", "n_embd")
        check_activation(self, "activation_function")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> GptConfig:
        """The fields of a config.json; what does not change the computation is left aside.

        Raises:
            ValueError: the model is of another type, or of a form of GPT-2 that this class is not.
        """
        wanted = {"model_type": "gpt2", "add_cross_attention": False, "tie_word_embeddings": True}
        check_wanted(cls.__name__, config, wanted)
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model."""
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self)}


class GptOutput(NamedTuple):
    """What a ``Gpt`` returns.

    Attributes:
        last_hidden_state: [B,T,E], after the last norm.
        logits: [B,T,V], or of the last positions alone; None where labels were given.
        loss: a scalar, where labels were given.
        hidden_states: the input of each block and ``last_hidden_state``, [B,T,E] each, if asked for.
        attentions: the attention weights of each block, [B,H,T,S] each, if asked for.
    """

    last_hidden_state: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class GptAttention(nn.Module):
    """Self-attention with one packed projection, over the tokens of the call and those of a cache."""

    def __init__(self, config: GptConfig, index: int) -> None:
        super().__init__()
        E = config.n_embd
        self.num_heads, self.dropout = config.n_head, config.attn_pdrop
        self.in_proj, self.out_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        scale = 1 / math.sqrt(E // config.n_head) if config.scale_attn_weights else 1.0
        self.scale = scale / (index + 1 if config.scale_attn_by_inverse_layer_idx else 1)

    def forward(
        self, x: Tensor, mask: Mask, cache: SelfAttentionCache | None, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        B, T, E = x.shape
        q, k, v = apply_linear(self.in_proj, x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout_p = self.dropout if self.training else 0.0
        found = ops.attention(q, k, v, mask, dropout_p, scale=self.scale, return_weights=return_weights)
        out, weights = found if return_weights else (found, None)
        return apply_linear(self.out_proj, out.transpose(1, 2).reshape(B, T, E)), weights


class GptBlock(nn.Module):
    """The parameters of one block. ``Gpt`` runs its parts, so that additions fuse with the norms after them."""

    def __init__(self, config: GptConfig, index: int) -> None:
        super().__init__()
        E, F_ = config.n_embd, config.n_inner or 4 * config.n_embd
        self.norm1, self.norm2 = (LayerNorm(E, config.layer_norm_epsilon) for _ in range(2))
        self.self_attn = GptAttention(config, index)
        self.linear1, self.linear2 = nn.Linear(E, F_), nn.Linear(F_, E)
        self.activation = ACTIVATIONS[config.activation_function]

    def feed_forward(self, x: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        return ops.ffn(x, first.weight, first.bias, second.weight, second.bias, self.activation)


class Gpt(nn.Module):
    """A GPT-2 with its language-modelling head, tied to the token embeddings.

    Args:
        config: the sizes.

    Weights start as GPT-2's: N(0, ``initializer_range``^2), the projections into the residual stream divided by
    sqrt(2 ``n_layer``), biases 0. Dropout follows the config in training mode.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embeddings = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(GptBlock(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_stream = name.endswith(("out_proj", "linear2"))
                std = config.initializer_range / (math.sqrt(2 * config.n_layer) if into_stream else 1)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def max_positions(self) -> int:
        """How long a sequence may be."""
        return self.config.n_positions

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> GptOutput:
        """Reads a batch of token sequences, or their continuation where a cache holds what came before.

        Args:
            input_ids: int32 or int64 [B,T].
            attention_mask: [B,S] with S the cached tokens and T together, bool or numbers, true or nonzero for a
                real token; padding may stand anywhere. Or a ``Mask`` of the scores [B,H,T,S], which then is the
                whole rule: the causal one is not added.
            position_ids: int32 or int64 [B,T]; the cached tokens counted on, padding included, where None, as in
                ``transformers``. Left-padded prompts want ``generation.positions_of(attention_mask)``.
            labels: integer [B,T], -100 where nothing is to be predicted; shifted here, as in ``transformers``:
                the loss is the mean over n of ``-log p(labels[n+1])`` at n.
            cache: a ``pytransformer.generation.Cache``, which this call extends; without gradients.
            logits_to_keep: compute the logits of that many last positions alone; 0 for all.
            output_hidden_states, output_attentions: also return them.

        Returns:
            A ``GptOutput``; with ``labels`` the loss in place of the logits, which are then never stored.

        Raises:
            TypeError, ValueError: an argument's dtype or shape is wrong, or a position exceeds the table.
            IndexError: an id lies outside its table (on CPU, in eager mode).
        """
        past = 0 if cache is None else cache.layer(0).self_attention.length
        self._check(input_ids, attention_mask, position_ids, labels, past)
        mask = self._mask(input_ids, attention_mask, past)
        table = self.position_embeddings.weight
        T = input_ids.shape[1]
        positions = table[past : past + T] if position_ids is None else F.embedding(position_ids, table)
        x = self.dropout(ops.embedding(input_ids, self.token_embeddings.weight, positions))
        x, streams, weights = self._run(x, mask, cache, output_attentions)
        loss = logits = None
        if labels is None:
            logits = linear(x[:, -logits_to_keep:], self.token_embeddings.weight)
        else:
            target = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = ops.linear_cross_entropy(x, self.token_embeddings.weight, target)
        states = (*streams, x) if output_hidden_states else None
        return GptOutput(x, logits, loss, states, tuple(weights) if output_attentions else None)

    def _run(
        self, x: Tensor, mask: Mask, cache: Cache | None, output_attentions: bool
    ) -> tuple[Tensor, list[Tensor], list[Any]]:
        """All blocks and the last norm: the output, the stream before each block, the weights of each block."""
        dropout_p = self.config.resid_pdrop if self.training else 0.0
        blocks: Any = self.layers
        norms = [*(block.norm1 for block in blocks), self.norm]
        normed, streams, weights = norms[0](x), [], []
        for i, (block, next_norm) in enumerate(zip(blocks, norms[1:], strict=True)):
            streams.append(x)
            layer_cache = None if cache is None else cache.layer(i).self_attention
            branch, seen = block.self_attn(normed, mask, layer_cache, output_attentions)
            weights.append(seen)
            normed, x = add_prenorm(block.norm2, branch, x, dropout_p)
            normed, x = add_prenorm(next_norm, block.feed_forward(normed), x, dropout_p)
        return normed, streams, weights

    @staticmethod
    def _mask(input_ids: Tensor, attention_mask: Tensor | Mask | None, past: int) -> Mask:
        if isinstance(attention_mask, Mask):
            return attention_mask
        # The last query stands at the last key; one query alone sees every key, and needs no band.
        mask = masks.causal("bottom_right") if input_ids.shape[1] > 1 else Mask()
        return mask if attention_mask is None else mask & masks.padding(attention_mask.bool())

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Gpt:
        """Reads a Hugging Face directory: config.json and safetensors, whole or in shards. Needs ``safetensors`` alone.

        Args:
            path: the directory.
            dtype, device: of the parameters.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: the directory lacks a file.
            ValueError: a file cannot be read, or the weights do not fit the config; every missing, surplus and
                misshapen key is named, and so is a head that is not tied.
            ImportError: ``safetensors`` is not installed.
        """
        config_dict, weights = _hf.read_directory(cls.__name__, path)
        config, source = GptConfig.from_dict(config_dict), os.fspath(path)
        weights = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": x
            for name, x in weights.items()
            if not name.endswith(_BUFFERS)
        }
        weights = _hf.without_tied(cls.__name__, weights, _TIED, source)
        return _hf.load(lambda: cls(config), weights, _NAMES, source, dtype, device)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``transformers.GPT2LMHeadModel``: copies, contiguous, detached."""
        theirs = _hf.from_own(self.state_dict(), _NAMES)
        return {**theirs, **{copy: theirs[table].clone() for copy, table in _TIED.items()}}

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        past: int,
    ) -> None:
        name, config = type(self).__name__, self.config
        check_tokens(name, "input_ids", input_ids)
        B, T = input_ids.shape
        if position_ids is None and past + T > config.n_positions:
            raise ValueError(
                f"{name}: input_ids has {T} tokens a row after {past} in the cache, and n_positions is"
                f" {config.n_positions}"
            )
        if isinstance(attention_mask, Tensor) and tuple(attention_mask.shape) != (B, past + T):
            raise ValueError(f"{name}: attention_mask must be {[B, past + T]}, got {list(attention_mask.shape)}")
        for what, x in (("position_ids", position_ids), ("labels", labels)):
            if x is not None:
                check_tokens(name, what, x)
                check_same_shape(name, what, x, "input_ids", input_ids)
        check_ids(name, "input_ids", input_ids, "vocab_size", config.vocab_size)
        if position_ids is not None:
            check_ids(name, "position_ids", position_ids, "n_positions", config.n_positions)
        if labels is not None:
            check_ids(name, "labels", labels.masked_fill(labels == -100, 0), "vocab_size", config.vocab_size)
