"""Greedy translation: the tokens of a batch of sources, by an encoder-decoder of the paper's base size.

The peers are transformers' ``generate`` on the same random weights (BART's form, which all sides read), and CTranslate2
where it is installed. The token that ends a sentence is suppressed, so that every run writes the same number; the gate
is that the tokens are equal.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import OURS, AbsentError, Case, Problem
from pytransformer.benchmarks._models import TRANSFORMER_BASE

PEER = "transformers"
LAYERS, VOCABULARY, PAD, START = 6, 8192, 1, 2


@dataclass(frozen=True)
class TranslationWorkload:
    """What a peer is given: the sources, how many tokens to write, and the weights as a directory of Hugging Face's.

    Attributes:
        model: a ``pytransformer.models.Transformer``.
        sources: token ids.
        target: how many tokens to write.
        traceable: engines that compile a graph may be given it.
    """

    model: Any
    sources: Tensor
    target: int

    op = "translation"
    traceable = False  # a loop whose steps hang on the tokens before: no engine that compiles a graph takes it
    direction = "fwd"
    dtype = torch.float32

    def provider(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return function

    def save_hf(self, folder: Path) -> list[str]:
        """Writes model and vocabulary, of made-up words; returns these."""
        self.model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(normalize_before=False, normalize_embedding=True)  # converters ask; transformers 5 says neither
        (folder / "config.json").write_text(json.dumps(config))
        words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
        vocabulary = {word: i for i, word in enumerate(words)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        import transformers

        transformers.BartTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
        return words


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

        found: Tensor = generate(
            ours, ids, mask, max_new_tokens=target, eos_token_id=None, suppress_tokens=(START,)
        ).sequences
        return found

    def run_theirs() -> Tensor:
        found: Tensor = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=target,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            suppress_tokens=[START],
        )
        return found

    kept: dict[str, Tensor] = {}

    def check(tokens: Tensor) -> list[Comparison]:
        if not kept:
            kept["expected"] = run_theirs().double()
        return [compare("tokens", tokens.double(), kept["expected"])]

    return Problem({OURS: run_ours, PEER: run_theirs}, check, TranslationWorkload(theirs, ids, target))


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
