"""TransformerConfig: the sizes and forms of an encoder-decoder, and what the families of checkpoints fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pytransformer.models._checks import check_activation, check_divides, check_fields, check_wanted
from pytransformer.nn.embedding import KINDS

SIDES = ("encoder", "decoder")
_BOTH = {"final_logits_bias": True, "scale_embedding": False, "label_smoothing": 0.0, "activation_function": "gelu"}
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": {"position_encoding": "learned", "normalize_embedding": True, **_BOTH},
    "marian": {"position_encoding": "halves", **_BOTH},
}


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of an encoder-decoder, under the names of Hugging Face's config.json for BART and Marian.

    The defaults are the paper's base model. What the two families fix without saying so has a field of its own:

    Attributes:
        position_encoding: ``"interleaved"`` (the paper), ``"halves"`` (Marian) or ``"learned"`` (BART).
        normalize_embedding: a norm after the embeddings (BART).
        norm_first: norms before the blocks instead of after, and one more behind each stack.
        final_logits_bias: a constant is added to the logits (both).
        label_smoothing: of the loss.
        suppress_tokens: never generated; the ``bad_words_ids`` of Marian's files.
        model_type: ``"transformer"``, ``"bart"`` or ``"marian"``: whose names ``to_dict`` writes.

    Raises:
        ValueError: a size is not a positive integer, a probability lies outside [0, 1], the heads do not divide
            the model's size, a special token is not in the vocabulary, or a choice is unknown.
    """

    vocab_size: int = 37000
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    max_position_embeddings: int = 1024
    scale_embedding: bool = True
    position_encoding: str = "interleaved"
    normalize_embedding: bool = False
    norm_first: bool = False
    final_logits_bias: bool = False
    label_smoothing: float = 0.1
    model_type: str = "transformer"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            check_divides(self, heads, "d_model")
        check_activation(self, "activation_function")
        for name, known in (("position_encoding", KINDS), ("model_type", ("transformer", *FAMILIES))):
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise ValueError(f"{type(self).__name__}: {name} must be one of {choices}; got {getattr(self, name)!r}")

    @classmethod
    def base(cls, vocab_size: int, **changes: Any) -> TransformerConfig:
        """The paper's base model (table 3): 6 + 6 layers, E 512, H 8, F 2048."""
        return replace(cls(vocab_size), **changes)

    @classmethod
    def big(cls, vocab_size: int, **changes: Any) -> TransformerConfig:
        """The paper's big model (table 3): 6 + 6 layers, E 1024, H 16, F 4096, dropout 0.3."""
        heads = {f"{side}_attention_heads": 16 for side in SIDES}
        sizes = {"d_model": 1024, "dropout": 0.3, **heads, **{f"{side}_ffn_dim": 4096 for side in SIDES}}
        return cls(**{"vocab_size": vocab_size, **sizes, **changes})

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TransformerConfig:
        """The fields of a config.json of BART or Marian; what does not change the computation is left aside.

        Raises:
            ValueError: the model is of another type, or of a form of these that this class is not.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{cls.__name__}: model_type must be 'bart' or 'marian', got {family!r}")
        wanted = {
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "share_encoder_decoder_embeddings": True,
            "decoder_vocab_size": config.get("vocab_size"),
            "normalize_before": False,
        }
        check_wanted(cls.__name__, config, wanted)
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        words = config.get("bad_words_ids") or []
        if not all(isinstance(word, list) and len(word) == 1 for word in words):
            raise ValueError(f"{cls.__name__}: bad_words_ids must be lists of one token each, got {words!r}")
        known["suppress_tokens"] = tuple(config.get("suppress_tokens") or (word[0] for word in words))
        return cls(**{**FAMILIES[family], **known})

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model."""
        family = self.model_type.capitalize()
        head = {"bart": "ForConditionalGeneration", "marian": "MTModel"}.get(self.model_type, "")
        return {"architectures": [f"{family}{head}"], "is_encoder_decoder": True, **asdict(self)}
