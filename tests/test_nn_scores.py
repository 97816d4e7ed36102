"""Cosine and additive attention against their formulas, and restricted self-attention."""

import pytest
import torch
import torch.nn.functional as F
from modules import B, E, H, L, S, assert_close, call, padding

from pytransformer import masks, nn

D = E // H


class Spelled(torch.nn.Module):
    """The formula, one term after the other, with another attention's parameters."""

    def __init__(self, other):
        super().__init__()
        self.load(other)

    def load(self, other):
        for name, p in other.named_parameters():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(p.detach().clone()))

    def heads(self, x, rows):
        x = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return x.view(*x.shape[:2], H, D).transpose(1, 2)

    def forward(self, query, memory, key_padding_mask):
        q = self.heads(query, slice(0, E))
        k, v = self.heads(memory, slice(E, 2 * E)), self.heads(memory, slice(2 * E, None))
        scores = self.scores(q, k).masked_fill(key_padding_mask[:, None, None], -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.linear(out, self.out_proj_weight, self.out_proj_bias), scores.softmax(-1)


class Cosine(Spelled):
    scale = None

    def scores(self, q, k):
        scale = self.log_scale.exp()[:, None, None] if self.scale is None else self.scale
        return scale * torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)


class Additive(Spelled):
    def scores(self, q, k):
        return (torch.tanh(q[:, :, :, None] + k[:, :, None]) * self.score_weight[:, None, None]).sum(-1)


@pytest.mark.parametrize(
    ("name", "options", "spelled"),
    [("CosineAttention", {}, Cosine), ("CosineAttention", {"scale": 3.0}, Cosine), ("AdditiveAttention", {}, Additive)],
    ids=str,
)
def test_scores_are_their_formulas(name, options, spelled):
    ours = getattr(nn, name)(E, H, batch_first=True, **options)
    theirs = spelled(ours)
    theirs.scale = options.get("scale")
    out, weights = ours(x := torch.randn(B, L, E), y := torch.randn(B, S, E), y, padding(), average_attn_weights=False)
    wanted = theirs(x, y, padding())
    assert_close(out, wanted[0])
    assert_close(weights, wanted[1])
    out.sum().backward()
    wanted[0].sum().backward()
    for parameter, p in ours.named_parameters():
        assert_close(p.grad, getattr(theirs, parameter.replace(".", "_")).grad, parameter)


@pytest.mark.parametrize("name", ["CosineAttention", "AdditiveAttention"])
def test_they_take_the_place_of_a_layers_attention(name):
    layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    layer.self_attn = getattr(nn, name)(E, H, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(B, L, E)
    out = encoder(x, src_key_padding_mask=padding(L))
    again = encoder(x, src_key_padding_mask=padding(L), skip_padding=False)
    assert_close(out, again.masked_fill(padding(L)[..., None], 0))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    query = torch.randn(L, E)
    assert layer.self_attn(query, query, query)[0].shape == (L, E)


@pytest.mark.parametrize("radius", [0, 2])
def test_restricted_self_attention_is_a_window(radius):
    """A query sees ``radius`` keys to either side: what a band of True in torch's mask says."""
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    distance = (torch.arange(L) - torch.arange(L)[:, None]).abs()
    spelled = torch.nn.MultiheadAttention(E, H, batch_first=True)
    spelled.load_state_dict(attention.state_dict())
    restricted = {attention: masks.window(radius), spelled: distance > radius}
    found = [
        call(m, *[torch.linspace(-1, 1, L * E).view(1, L, E)] * 3, attn_mask=mask)[0] for m, mask in restricted.items()
    ]
    assert_close(*found)
