"""Gpt against transformers' GPT2LMHeadModel: outputs, loss, gradients, checkpoints."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from modules import attention_mask, shake
from safetensors.torch import load_file, save_file

from pytransformer import masks
from pytransformer.models import Gpt, GptConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("both_backends")

SIZES = {
    "vocab_size": 50,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def hugging_face(**changes):
    """A random GPT2LMHeadModel whose biases and norms are not their initial 0 and 1."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SIZES, **changes}, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    return shake(model)


def batch(pad):
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = attention_mask(9, (3, 0, 7), pad)
    return {"input_ids": ids * mask, "attention_mask": mask}


def gradients(theirs, ours):
    """Our gradients under their names, beside theirs."""
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    named = ours.to_hf_state_dict()
    return {n: (named[n], p.grad) for n, p in theirs.named_parameters()}


FORMS = [
    {},
    {"activation_function": "relu", "n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
]


@pytest.mark.parametrize("pad", ["none", "right", "left"])
@pytest.mark.parametrize("form", FORMS, ids=["gpt2", "relu", "scaled"])
def test_parity_of_outputs_loss_and_gradients(tmp_path, pad, form):
    theirs = hugging_face(**form)
    theirs.save_pretrained(tmp_path)
    ours = Gpt.from_pretrained(tmp_path)
    inputs = batch(pad)
    real = inputs["attention_mask"][..., None]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if pad == "left":  # what padding predicts is arbitrary
        labels[0, 3] = labels[2, 7] = -100
    wanted = theirs(**inputs, labels=labels, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        found = ours(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(found.logits * real, wanted.logits * real, rtol=1e-5, atol=2e-5)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    for x, y in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(x * real, y * real, rtol=1e-5, atol=2e-5)
    rows = inputs["attention_mask"][:, None, :, None]
    for x, y in zip(found.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(x * rows, y * rows, rtol=1e-5, atol=1e-5)
    found = ours(**inputs, labels=labels)
    assert found.logits is None
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    for name, (grad, other) in gradients(theirs, ours).items():
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_positions_and_masks_of_the_call(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    ours = Gpt.from_pretrained(tmp_path)
    ids = batch("none")["input_ids"]
    positions = torch.stack([torch.arange(9), torch.arange(9).flip(0), torch.arange(9) + 7])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits, rtol=1e-5, atol=2e-5
        )
        whole = ours(ids).logits
        torch.testing.assert_close(ours(ids, masks.causal()).logits, whole)
        assert (ours(ids, masks.Mask()).logits - whole).abs().max() > 1e-2
        torch.testing.assert_close(ours(ids.int(), logits_to_keep=2).logits, whole[:, -2:])


def test_state_dict_round_trip(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = Gpt.from_pretrained(tmp_path)
    named = ours.to_hf_state_dict()
    assert named.keys() == theirs.state_dict().keys()
    for name, x in theirs.state_dict().items():
        assert torch.equal(named[name], x), name
    hugging_face().load_state_dict(named)
    again = tmp_path / "again"
    again.mkdir()
    save_file(named, again / "model.safetensors")
    (again / "config.json").write_text(json.dumps(ours.config.to_dict()))
    for x, y in zip(Gpt.from_pretrained(again).parameters(), ours.parameters(), strict=True):
        assert torch.equal(x, y)


def test_the_checkpoint_of_old(tmp_path):
    """No prefix, no head, and the causal masks among the weights."""
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    wanted = Gpt.from_pretrained(tmp_path)(**batch("none")).logits
    weights = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(Gpt.from_pretrained(tmp_path)(**batch("none")).logits, wanted)
    assert Gpt.from_pretrained(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_broken_checkpoints_name_what_is_wrong(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    weights = dict(good)
    weights.pop("transformer.h.1.mlp.c_fc.bias")
    weights["transformer.h.2.ln_1.bias"] = torch.zeros(24)
    weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as info:
        Gpt.from_pretrained(tmp_path)
    for words in (
        "missing transformer.h.1.mlp.c_fc.bias [96]",
        "surplus transformer.h.2.ln_1.bias [24]",
        "transformer.h.0.attn.c_attn.weight must be floating point [24, 72], got torch.float32 [72, 24]",
    ):
        assert words in str(info.value)
    save_file({**good, "lm_head.weight": torch.zeros(50, 24)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* must be transformer\.wte\.weight"):
        Gpt.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    shard = sorted(tmp_path.glob("model-0*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="has no model-0"):
        Gpt.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json cannot be read: KeyError\('weight_map'\)"):
        Gpt.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gptj"}, "GptConfig: model_type must be 'gpt2', got 'gptj'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"n_head": 5}, "n_head must divide n_embd, got 5 and 24"),
        ({"n_inner": 0}, "n_inner must be a positive integer, got 0"),
        ({"eos_token_id": 50}, r"eos_token_id must lie in \[0, vocab_size = 50\), got 50"),
        ({"scale_attn_weights": 1}, "scale_attn_weights must be True or False, got 1"),
        ({"attn_pdrop": -0.5}, r"attn_pdrop must be a number in \[0, 1\], got -0.5"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        GptConfig.from_dict({**SIZES, **change})


def test_bad_inputs_name_field_and_values():
    model = Gpt(GptConfig(**SIZES)).eval()
    ids = torch.ones(2, 5, dtype=torch.long)
    for error, words, kwargs in (
        (IndexError, r"Gpt: input_ids must lie in \[0, vocab_size = 50\), got 51 at \[0, 0\]", {"input_ids": 51 * ids}),
        (IndexError, r"labels must lie in \[0, vocab_size = 50\), got -7", {"input_ids": ids, "labels": -7 * ids}),
        (IndexError, r"position_ids .* n_positions = 16\), got 20", {"input_ids": ids, "position_ids": 20 * ids}),
        (ValueError, "17 tokens a row after 0 in the cache", {"input_ids": torch.ones(1, 17, dtype=torch.long)}),
        (ValueError, r"attention_mask must be \[2, 5\]", {"input_ids": ids, "attention_mask": ids[:, 1:]}),
        (ValueError, r"labels must have input_ids' shape \[2, 5\]", {"input_ids": ids, "labels": ids[:, 1:]}),
        (TypeError, "input_ids must be int32 or int64", {"input_ids": ids.float()}),
    ):
        with pytest.raises(error, match=words):
            model(**kwargs)


def test_trains_with_dropout():
    torch.manual_seed(0)
    model = Gpt(GptConfig(**{**SIZES, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}))
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_initial_weights_are_gpt2s():
    model = Gpt(GptConfig(n_embd=256, n_layer=8, n_head=4, vocab_size=100))
    for name, p in model.named_parameters():
        if name.endswith(("in_proj.weight", "linear1.weight", "embeddings.weight")):
            assert abs(p.std().item() / 0.02 - 1) < 0.05, name
        if name.endswith(("out_proj.weight", "linear2.weight")):
            assert abs(p.std().item() / 0.005 - 1) < 0.05, name
