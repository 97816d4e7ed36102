"""Transformer: torch's encoder-decoder on the fused encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.masks import Mask
from pytransformer.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pytransformer.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from pytransformer.nn.ffn import Activation
from pytransformer.nn.layer_norm import LayerNorm


class Transformer(nn.Transformer):
    """``out = decoder(tgt, encoder(src))``, both with a final norm.

    Constructor, parameters, initial weights and ``state_dict`` are those of ``torch.nn.Transformer``. Embeddings,
    positions and the projection to a vocabulary are not part of it; ``pytransformer.models.Transformer`` has them.

    Args:
        d_model: E. nhead: H, a divisor of E. num_encoder_layers, num_decoder_layers: of each stack.
        dim_feedforward: F. dropout: probability, in training mode. activation: see ``TransformerEncoderLayer``.
        custom_encoder, custom_decoder: modules in place of the stacks.
        layer_norm_eps: added to the variance. batch_first: [B,L,E] instead of [L,B,E].
        norm_first: pre-norm. bias: give projections and norms biases. device, dtype: of the parameters.

    Raises:
        ValueError: the activation's name is unknown.

    Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.1.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        kwargs: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)

        if custom_encoder is None:  # in torch's order, so that one seed gives the same initial weights
            encoder_layer = TransformerEncoderLayer(*sizes, **kwargs)
            norm = LayerNorm(d_model, layer_norm_eps, **kwargs)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm)
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, **kwargs)
            norm = LayerNorm(d_model, layer_norm_eps, **kwargs)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm)
        self.encoder, self.decoder = custom_encoder, custom_decoder
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | Mask | None = None,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Args:
            src: [S,B,E], [B,S,E] with ``batch_first``, or [S,E] unbatched; floating point.
            tgt: the same with length T.
            src_mask, tgt_mask, memory_mask: [S,S], [T,T] and [T,S], or [B*H,...] of these, bool (True = masked
                out) or floating point (added); or a ``pytransformer.masks.Mask`` (True = attend).
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: [B,S], [B,T] and [B,S], without B
                when unbatched: bool (True = padding) or floating point (added). As in torch, the memory is not
                masked by ``src_key_padding_mask``; pass it for both, and padding in ``src`` is not computed.
            src_is_causal, tgt_is_causal, memory_is_causal: in addition to the mask, which must be given, no query
                sees a key after its position. With None a causal mask is recognised.

        Returns:
            The shape and layout of ``tgt``.

        Raises:
            TypeError, ValueError: an argument's type, dtype or shape is wrong.
            RuntimeError: a causal hint without its mask.
        """
        self._check(src, tgt)
        # A memory that is read at padded positions too must have been computed there.
        whole = memory_key_padding_mask is None and isinstance(self.encoder, TransformerEncoder)
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
            **({"skip_padding": False} if whole else {}),
        )
        out: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return out

    def _check(self, src: Tensor, tgt: Tensor) -> None:
        axis = 0 if self.batch_first else 1
        same_batch = src.dim() == tgt.dim() == 2 or (src.dim() == tgt.dim() == 3 and src.shape[axis] == tgt.shape[axis])
        if not same_batch or src.shape[-1] != self.d_model or tgt.shape[-1] != self.d_model:
            raise ValueError(
                f"{type(self).__name__}: src and tgt must have one batch and size d_model = {self.d_model} last, got"
                f" {list(src.shape)} and {list(tgt.shape)} with batch_first={self.batch_first}"
            )
