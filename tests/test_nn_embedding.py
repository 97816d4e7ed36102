"""Embedding, PositionalEncoding and LinearCrossEntropyLoss."""

import copy
import math

import pytest
import torch
from modules import B, E, L, S, assert_close, assert_parity, call, pair

from pytransformer import nn

V = 11


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"max_norm": 2.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding_is_torchs(options):
    theirs, ours = pair("Embedding", V, E, **options)
    tokens = torch.randint(0, V, (B, L))
    assert_parity(theirs, ours, call, input=tokens)
    assert isinstance(nn.Embedding.from_pretrained(torch.randn(V, E), padding_idx=1), nn.Embedding)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_with_scale_positions_and_dropout(padding_idx):
    ours = nn.Embedding(V, E, padding_idx, scale=4.0, dropout=0.25)
    positions = nn.PositionalEncoding(E, L).rows(L)
    tokens = torch.randint(0, V, (B, L))
    out = ours(tokens, positions)
    kept = out != 0
    assert 0.6 < kept.float().mean() < 0.9
    assert_close(out, torch.where(kept, (4 * ours.weight[tokens] + positions) / 0.75, 0))
    assert_close(ours.eval()(tokens, positions), 4 * ours.weight[tokens] + positions)


def test_one_table_serves_input_output_and_loss():
    table = nn.Embedding(V, E)
    head, loss = table.tied_projection(bias=True), nn.LinearCrossEntropyLoss.tied(table, label_smoothing=0.1)
    model = torch.nn.ModuleDict({"table": table, "head": head, "loss": loss})
    tokens, target = torch.randint(0, V, (B, L)), torch.randint(0, V, (B, L))
    target[0, :3] = -100
    hidden = table(tokens)
    plain = table.weight.detach().clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(
        (plain[tokens] @ plain.T).flatten(0, 1), target.flatten(), label_smoothing=0.1
    )
    found = loss(hidden, target)
    assert_close(found, wanted)
    found.backward()
    wanted.backward()
    assert_close(table.weight.grad, plain.grad)
    assert_close(head(hidden), hidden @ table.weight.T)
    assert_close(loss.logits(hidden), hidden @ table.weight.T)
    assert sum(p.numel() for p in model.parameters()) == V * E + V
    twin = copy.deepcopy(model)
    assert twin["table"].weight is twin["head"].weight is twin["loss"].linear.weight
    model.load_state_dict(model.state_dict())
    model.double()
    assert model["loss"].linear.weight is model["table"].weight


def test_loss_of_its_own_and_its_options():
    torch.manual_seed(3)
    linear = torch.nn.Linear(E, V)
    torch.manual_seed(3)
    ours = nn.LinearCrossEntropyLoss(E, V, bias=True, reduction="none", ignore_index=0, softcap=2.0)
    assert torch.equal(ours.linear.weight, linear.weight)
    x, target = torch.randn(B, L, E), torch.randint(0, V, (B, L))
    logits = 2 * torch.tanh(linear(x) / 2)
    assert_close(ours.logits(x), logits)
    wanted = torch.nn.functional.cross_entropy(logits.mT, target, ignore_index=0, reduction="none")
    assert_close(ours(x, target), wanted)


def test_sinusoids_are_those_of_the_paper():
    interleaved, halves = (nn.PositionalEncoding(E, 50, kind).rows(50) for kind in ("interleaved", "halves"))
    for t, i in ((0, 0), (1, 0), (7, 3), (49, 7)):
        angle = t / 10000 ** (2 * i / E)
        assert interleaved[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
        assert interleaved[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert torch.equal(halves, torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], 1))
    assert nn.PositionalEncoding(5, 3, "halves").rows(3).shape == (3, 5)
    assert nn.PositionalEncoding(5, 3).rows(3)[0].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("kind", ["interleaved", "halves", "learned"])
def test_positional_encoding_adds_its_rows(kind):
    encoding = nn.PositionalEncoding(E, 20, kind)
    x = torch.randn(B, L, E)
    wanted = x + encoding.weight[S : S + L]
    assert_close(encoding(x.transpose(0, 1), offset=S).transpose(0, 1), wanted)
    assert_close(encoding(x[1], offset=S), wanted[1])
    encoding = nn.PositionalEncoding(E, 20, kind, batch_first=True, dropout=0.5)
    assert list(encoding.state_dict()) == (["weight"] if kind == "learned" else [])
    assert_close(encoding.eval()(x), x + encoding.weight[:L])
    assert (encoding.train()(x) == 0).float().mean() > 0.3
    assert encoding.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_sinusoidal_table_survives_meta():
    with torch.device("meta"):
        encoding = nn.PositionalEncoding(E, 20)
    assert torch.equal(encoding.weight, nn.PositionalEncoding(E, 20).weight)


def test_bad_inputs_name_values():
    table, encoding = nn.Embedding(V, E), nn.PositionalEncoding(E, 20)
    tokens = torch.zeros(B, L, dtype=torch.int64)
    tokens[2, 4] = V
    x = torch.randn(B, L, E)
    for error, words, bad_call in (
        (IndexError, r"Embedding: input .* num_embeddings = 11\), got 11 at \[2, 4\]", lambda: table(tokens)),
        (IndexError, r"got -1 at \[0\]", lambda: table(torch.tensor([-1]))),
        (ValueError, r"dropout .* got 1.5", lambda: nn.Embedding(V, E, dropout=1.5)),
        (ValueError, "positions 15 to 22 .* max_length = 20", lambda: encoding(x.transpose(0, 1), offset=15)),
        (ValueError, r"E = 16, got \[3, 7, 15\]", lambda: encoding(x[..., 1:])),
        (ValueError, "'rotary'", lambda: nn.PositionalEncoding(E, kind="rotary")),
        (ValueError, "got 0 and 5000", lambda: nn.PositionalEncoding(0)),
    ):
        with pytest.raises(error, match=words):
            bad_call()
