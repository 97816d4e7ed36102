"""Decoding: greedy, sampling and beam search over key/value caches, for decoder-only and encoder-decoder models.

    from pytransformer.generation import generate
    out = generate(model, prompts, max_new_tokens=64, num_beams=4)

For the same weights and settings the tokens are those of transformers' ``generate``.
"""

from pytransformer.generation._decoders import positions_of
from pytransformer.generation.cache import Cache
from pytransformer.generation.generate import Generation, generate

__all__ = ["Cache", "Generation", "generate", "positions_of"]
