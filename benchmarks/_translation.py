"""Greedy translation: the tokens of a batch of sources, by an encoder-decoder of the paper's base size.

The peer is transformers' ``generate`` on the same random weights (BART's form, which both sides read). No token
ends a sentence, so that every run writes the same number; the gate is that the tokens are equal.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import OURS, AbsentError, Case, Problem
from pytransformer.benchmarks._models import TRANSFORMER_BASE

PEER = "transformers"
LAYERS, VOCABULARY, PAD, START = 6, 8192, 1, 2


def case(B: int, source: int, target: int, **more: Any) -> Case:
    """``target`` tokens for each of B sources of ``source`` tokens."""
    E, F = TRANSFORMER_BASE.width, TRANSFORMER_BASE.hidden
    encoder, decoder = 4 * E * E + 2 * E * F, 6 * E * E + 2 * E * F  # weights that each token meets
    tokens = B * (source * (LAYERS * (encoder + 2 * E * E)) + target * (LAYERS * decoder + E * VOCABULARY))
    return Case(
        op="models",
        direction="fwd",
        dtype="float32",
        shape=f"greedy {B}x{source} to {target}",
        operations=2 * tokens,
        bytes=4 * target * (LAYERS * decoder + E * VOCABULARY),  # a step reads the decoder's weights
        build=partial(build, B, source, target),
        sizes={"B": B, "source": source, "target": target, "layers": LAYERS, "E": E, "V": VOCABULARY},
        **more,
    )


def build(B: int, source: int, target: int) -> Problem:
    """Both models with equal weights, and the sources."""
    if importlib.util.find_spec("transformers") is None:
        raise AbsentError("transformers is not installed (pip install transformers)")
    theirs = _hugging_face()
    ours = _ours(theirs)
    ids = torch.randint(4, VOCABULARY, (B, source), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def run_ours() -> Tensor:
        from pytransformer.generation import generate

        found: Tensor = generate(ours, ids, mask, max_new_tokens=target, eos_token_id=None).sequences
        return found

    def run_theirs() -> Tensor:
        found: Tensor = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=target, do_sample=False, num_beams=1, eos_token_id=None
        )
        return found

    kept: dict[str, Tensor] = {}

    def check(tokens: Tensor) -> list[Comparison]:
        if not kept:
            kept["expected"] = run_theirs().double()
        return [compare("tokens", tokens.double(), kept["expected"])]

    return Problem({OURS: run_ours, PEER: run_theirs}, check)


def _hugging_face() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    E, heads, F = TRANSFORMER_BASE.width, TRANSFORMER_BASE.heads, TRANSFORMER_BASE.hidden
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=E, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=F, decoder_ffn_dim=F, max_position_embeddings=256,
        activation_function="relu", init_std=0.1, pad_token_id=PAD, bos_token_id=0, eos_token_id=START,
        decoder_start_token_id=START, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def _ours(theirs: Any) -> Any:
    """The same model of ours, through the directory that both sides read."""
    import tempfile

    from pytransformer.models import Transformer

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return Transformer.from_pretrained(folder)
