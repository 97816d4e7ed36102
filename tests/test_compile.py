"""Whole models under ``torch.compile(fullgraph=True)`` and ``torch.export``: one graph, the results of eager mode.

What skips padding in eager mode looks at the mask's values; a traced graph computes the padding and says 0 there.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from modules import assert_close

from pytransformer import models, nn

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0  # more than the share of padding that eager mode skips

FIRST_CALL = """
import torch
from pytransformer import ops
weight, ones, matrix = torch.randn(5, 8), torch.ones(8), torch.randn(8, 8)
def function(tokens):
    x = ops.layer_norm(ops.embedding(tokens, weight), ones)
    return ops.ffn(ops.attention(x[:, None], x[:, None], x[:, None])[:, 0], matrix, None, matrix, None)
tokens = torch.tensor([[1, 2, 3]])
found = torch.compile(function, fullgraph=True, backend="eager")(tokens)
torch.testing.assert_close(found, function(tokens))
"""


def bert():
    config = models.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=24, max_position_embeddings=16)  # fmt: skip
    return models.Bert(config), {"input_ids": IDS, "attention_mask": MASK}


def gpt():
    config = models.GptConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return models.Gpt(config), {"input_ids": IDS, "attention_mask": MASK}


def transformer():
    config = models.TransformerConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
    )  # fmt: skip
    given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    return models.Transformer(config), {**given, "decoder_attention_mask": MASK[:, :5]}


class Stacks(torch.nn.Module):
    """``nn.Transformer`` with every padding mask named."""

    def __init__(self):
        super().__init__()
        self.stacks = nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True)

    def forward(self, x, hidden):
        causal = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        masks = dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"), hidden)
        return (self.stacks(x, x, tgt_mask=causal, tgt_is_causal=True, **masks),)


def stacks():
    return Stacks(), {"x": torch.randn(2, 9, 16), "hidden": MASK == 0}


@pytest.fixture(params=[bert, gpt, transformer, stacks], ids=lambda build: build.__name__)
def traced(request):
    torch.manual_seed(0)
    model, given = request.param()
    model.eval()
    with torch.no_grad():
        expected = model(**given)[0]
    return model, given, expected, MASK[:, : expected.shape[1]].bool()


def test_compiles_to_one_graph(traced):
    model, given, expected, real = traced
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(**given)[0]
    assert_close(found[real], expected[real])
    found[real].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_exports(traced):
    model, given, expected, real = traced
    with torch.no_grad():
        found = torch.export.export(model, (), given).module()(**given)[0]
    assert_close(found[real], expected[real])


def test_the_first_call_of_a_process_may_be_traced():
    """Several ops, none of whose kernels has been loaded before."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
