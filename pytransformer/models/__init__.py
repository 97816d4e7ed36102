"""Whole models over the fused modules, loading Hugging Face weights without ``transformers``."""

from pytransformer.models.bert import Bert, BertConfig, BertOutput
from pytransformer.models.gpt import Gpt, GptConfig, GptOutput
from pytransformer.models.minilm import SentenceEncoder, load_minilm

__all__ = [
    "Bert",
    "BertConfig",
    "BertOutput",
    "Gpt",
    "GptConfig",
    "GptOutput",
    "SentenceEncoder",
    "load_minilm",
]
