"""Pictures of attention: what is drawn is what was given, and a page needs nothing but itself."""

import builtins
import json
import re

import pytest
import torch

from pytransformer import nn, viz
from pytransformer.models import Gpt, GptConfig, attention_weights


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return [torch.softmax(3 * torch.randn(2, 3, 5, 5), -1) for _ in range(2)]


TOKENS = ["the", "cat", "</script>", "sat", "€ & <b>"]


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def test_head_maps_show_every_weight(weights):
    pytest.importorskip("matplotlib")
    figure = viz.head_maps(weights, TOKENS, batch_index=1)
    maps = [ax for ax in figure.axes if ax.images]
    assert len(maps) == 6
    for ax, wanted in zip(maps, [x[1, h] for x in weights for h in range(3)], strict=True):
        assert torch.equal(torch.tensor(ax.images[0].get_array()), wanted)
    assert [t.get_text() for t in maps[0].get_yticklabels()] == TOKENS
    assert [t.get_text() for t in maps[3].get_xticklabels()] == TOKENS
    assert maps[2].get_title() == "head 2"
    figure = viz.head_maps({"cross": torch.ones(1, 4, 3, 6)}, list("abc"), list("uvwxyz"), heads=[3, 1])
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["head 3", "head 1"]
    figure.canvas.draw()


def test_the_page_holds_the_weights_and_nothing_foreign(weights, tmp_path):
    view = viz.token_view(weights, TOKENS, title="A <title>")
    found = data_of(view.html)
    assert found["queries"] == found["keys"] == TOKENS
    assert found["names"] == ["layer 0", "layer 1"]
    for x, y in zip(found["weights"], weights, strict=True):
        torch.testing.assert_close(torch.tensor(x), y[0], rtol=0, atol=6e-4)
    assert "<title>A &lt;title&gt;</title>" in view.html
    assert not re.search(r"(src|href)\s*=|@import|https?://(?!www\.w3\.org/2000/svg)", view.html)
    assert view.html.count("</script>") == 2
    assert view.save(tmp_path / "view.html").read_text(encoding="utf-8") == view.html
    assert view._repr_html_().startswith("<iframe srcdoc=")


def test_weights_of_models_and_modules():
    torch.manual_seed(0)
    model = Gpt(GptConfig(vocab_size=20, n_positions=8, n_embd=12, n_layer=2, n_head=3)).eval()
    ids = torch.randint(0, 20, (1, 5))
    assert "layer 1" in viz.token_view(model(ids, output_attentions=True).attentions, list("abcde")).html
    layer = nn.TransformerDecoderLayer(12, 3, 16, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    tgt, memory = torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    with torch.no_grad():
        wanted = decoder(tgt, memory)
        with attention_weights(decoder) as seen:
            found = decoder(tgt, memory)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(decoder(tgt, memory), wanted)
    assert [(n, list(x.shape)) for n, x in seen.items()] == [
        ("layers.0.self_attn", [2, 3, 4, 4]),
        ("layers.0.multihead_attn", [2, 3, 4, 6]),
        ("layers.1.self_attn", [2, 3, 4, 4]),
        ("layers.1.multihead_attn", [2, 3, 4, 6]),
    ]
    torch.testing.assert_close(seen["layers.1.multihead_attn"].sum(-1), torch.ones(2, 3, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())


def test_bad_arguments(weights):
    for error, words, call in (
        (ValueError, r"viz\.token_view: tokens must be 5 texts, one for each row, got 2", (weights, ["a", "b"])),
        (
            ValueError,
            r"key_tokens are wanted where queries \(3\) and keys \(6\)",
            ([torch.ones(1, 1, 3, 6)], list("abc")),
        ),
        (ValueError, "weights are empty; call the model with output_attentions=True", ([], TOKENS)),
        (TypeError, r"weights of 'layer 0' must be a tensor \[B,H,T,S\], got \[5, 5\]", ([torch.ones(5, 5)], TOKENS)),
        (ValueError, "NaN or Inf", ([torch.full((1, 1, 5, 5), torch.nan)], TOKENS)),
    ):
        with pytest.raises(error, match=words):
            viz.token_view(*call)
    with pytest.raises(IndexError, match="batch_index must lie in the batch of 2, got 2"):
        viz.token_view(weights, TOKENS, batch_index=2)
    with pytest.raises(IndexError, match=r"heads must lie in \[0, 3\), got \[3\]"):
        viz.head_maps(weights, heads=[3])


def test_without_matplotlib(weights, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'pytransformer\[plots\]'"):
        viz.head_maps(weights)
    viz.token_view(weights, TOKENS)
