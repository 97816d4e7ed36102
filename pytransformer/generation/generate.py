"""generate: the one door to decoding. It fills in the model's special tokens, checks, and starts a search."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.generation._beam import beam_search
from pytransformer.generation._decoders import Decoder, DecoderOnly, EncoderDecoder
from pytransformer.generation._search import search
from pytransformer.generation._settings import Settings
from pytransformer.models._checks import check_same_shape, check_tokens


class Generation(NamedTuple):
    """What ``generate`` returns.

    Attributes:
        sequences: int64 [N,L], N = B ``num_return_sequences``; a decoder-only model's start with the prompt, an
            encoder-decoder's with the start token; padded behind a sequence's end.
        scores: float32 [N], sum of log p / length^length_penalty; of a beam search alone, else None.
    """

    sequences: Tensor
    scores: Tensor | None = None


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    seed: int | torch.Generator | None = None,
    **special_tokens: Any,
) -> Generation:
    """Continues prompts (decoder-only models), or writes the targets of sources (encoder-decoder models).

    Args:
        model: a ``models.Gpt`` or ``models.Transformer``, in evaluation mode.
        input_ids: int32 or int64 [B,T]: prompts, left-padded where ragged; or sources, padded anywhere.
        attention_mask: [B,T], true or nonzero for a real token; None where nothing is padded.
        max_new_tokens: the most tokens to add.
        num_beams: K of beam search; 1 for greedy decoding or sampling.
        num_return_sequences: sequences per prompt: at most K, or any number of samples.
        do_sample: sample each token, shaped by ``temperature``, ``top_k`` and ``top_p`` in this order.
        length_penalty: beams end with the score sum of log p / length^length_penalty; above 0 favours long ones.
        early_stopping: of beam search: True, False or ``"never"``, as in ``transformers``.
        seed: of the sampling; None draws from torch's default generator.
        special_tokens: ``eos_token_id`` (one or several), ``pad_token_id``, ``decoder_start_token_id``,
            ``forced_bos_token_id``, ``forced_eos_token_id``, ``suppress_tokens``; the config's where not given.

    Returns:
        A ``Generation``.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is in training mode, prompts are not left-padded, or
            prompt and new tokens exceed the position table.
        IndexError: an id lies outside the vocabulary (on CPU).

    Source: see ``pytransformer.generation._beam`` and ``_settings``.
    """
    tokens = _special_tokens(model.config, special_tokens)
    start = tokens.pop("decoder_start_token_id")
    settings = Settings(
        vocab_size=model.config.vocab_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        **tokens,
    )
    copies = num_return_sequences if do_sample else 1
    decoder = _decoder(model, input_ids, attention_mask, start, max_new_tokens, copies)
    if num_beams > 1:
        return Generation(*beam_search(decoder, settings))
    generator = seed if isinstance(seed, torch.Generator) else None
    if isinstance(seed, int):
        generator = torch.Generator(input_ids.device).manual_seed(seed)
    return Generation(search(decoder, settings, generator))


def _special_tokens(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The special tokens under ``Settings``' names: those given, else the config's."""
    names = ("eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    for name in given:
        if name not in (*names, "suppress_tokens"):
            raise TypeError(f"generate: no argument is called {name!r}; special tokens are {', '.join(names)}")
    found = {name: given.get(name, getattr(config, name, None)) for name in names}
    eos = found.pop("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if found["pad_token_id"] is None:  # without an end nothing is ever padded
        found["pad_token_id"] = ends[0] if ends else 0
    suppressed = given.get("suppress_tokens", getattr(config, "suppress_tokens", ()))
    return {**found, "eos_token_ids": ends, "suppress_tokens": tuple(suppressed)}


def _decoder(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, start: int | None, new_tokens: int, copies: int
) -> Decoder:
    """The model with its prompts, each ``copies`` times."""
    check_tokens("generate", "input_ids", input_ids)
    if model.training:
        raise ValueError("generate: model must be in evaluation mode, got one in training mode; call model.eval()")
    keep = None
    if attention_mask is not None:
        check_same_shape("generate", "attention_mask", attention_mask, "input_ids", input_ids)
        keep = attention_mask.bool().repeat_interleave(copies, 0)
    ids = input_ids.long().repeat_interleave(copies, 0)
    if hasattr(model, "encode"):
        if start is None:
            raise ValueError("generate: decoder_start_token_id is neither given nor in the model's config")
        _check_room(model, 1, new_tokens)
        return EncoderDecoder(model, ids, keep, start)
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    if not keep[:, -1].all():
        row = int((~keep[:, -1]).nonzero()[0])
        raise ValueError(f"generate: prompts must be left-padded, and row {row} ends in padding")
    _check_room(model, int(keep.sum(1).max()), new_tokens)
    return DecoderOnly(model, ids, keep)


def _check_room(model: Any, prompt: int, new_tokens: int) -> None:
    limit = model.max_positions
    if limit is not None and prompt + new_tokens - 1 > limit:  # the last token is not read again
        raise ValueError(
            f"generate: {prompt} prompt tokens and max_new_tokens = {new_tokens} need {prompt + new_tokens - 1}"
            f" positions, and the model has {limit}"
        )
