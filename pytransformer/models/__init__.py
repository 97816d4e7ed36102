"""Whole models over the fused modules, loading Hugging Face weights without ``transformers``."""

from pytransformer.models._attention import attention_weights
from pytransformer.models.bert import Bert, BertConfig, BertOutput
from pytransformer.models.bert_pretraining import BertForPreTraining, BertPreTrainingOutput
from pytransformer.models.gpt import Gpt, GptConfig, GptOutput
from pytransformer.models.minilm import SentenceEncoder, load_minilm
from pytransformer.models.transformer import Transformer, TransformerOutput
from pytransformer.models.transformer_config import TransformerConfig

__all__ = [
    "Bert",
    "BertConfig",
    "BertForPreTraining",
    "BertOutput",
    "BertPreTrainingOutput",
    "Gpt",
    "GptConfig",
    "GptOutput",
    "SentenceEncoder",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "attention_weights",
    "load_minilm",
]
