"""Transformer against transformers' BART and Marian: outputs, loss, gradients, decoding, checkpoints."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from modules import attention_mask, shake
from safetensors.torch import load_file, save_file

from pytransformer.generation import generate
from pytransformer.models import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("both_backends")

SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 3,
}
FORMS = {
    "bart": {"model_type": "bart"},
    "bart-scaled": {"model_type": "bart", "scale_embedding": True, "activation_function": "relu"},
    "marian": {"model_type": "marian", "scale_embedding": True, "activation_function": "swish"},
}


def hugging_face(form):
    """A random model whose biases and norms are not their initial 0 and 1."""
    torch.manual_seed(0)
    family = FORMS[form]["model_type"]
    config_class = transformers.BartConfig if family == "bart" else transformers.MarianConfig
    options = {k: v for k, v in {**SIZES, **FORMS[form]}.items() if k != "model_type"}
    config = config_class(**options, attn_implementation="eager")
    model_class = transformers.BartForConditionalGeneration if family == "bart" else transformers.MarianMTModel
    model = model_class(config).eval()
    shake(model, 0.2)
    with torch.no_grad():
        model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
    return model


def batch(pad):
    generator = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(4, 40, (3, n), generator=generator) for n in (9, 7))
    mask, target_mask = attention_mask(9, (3, 0, 7), pad), attention_mask(7, (0, 2, 6), pad)
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "decoder_input_ids": target.masked_fill(target_mask == 0, 1),
        "decoder_attention_mask": target_mask,
    }


def gradients(theirs, ours):
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    named = ours.to_hf_state_dict()
    return {n: (named[n], p.grad) for n, p in theirs.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pad", ["none", "right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_parity_of_outputs_and_gradients(tmp_path, form, pad):
    theirs = hugging_face(form)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    inputs = batch(pad)
    real, target = inputs["attention_mask"], inputs["decoder_attention_mask"]
    wanted = theirs(**inputs, output_attentions=True)
    with torch.no_grad():
        seen = ours(**inputs, output_attentions=True)
    assert len(seen.encoder_attentions) == len(seen.decoder_attentions) == len(seen.cross_attentions) == 2
    for kind, rows in (("encoder", real), ("decoder", target), ("cross", target)):
        for x, y in zip(getattr(seen, f"{kind}_attentions"), getattr(wanted, f"{kind}_attentions"), strict=True):
            torch.testing.assert_close(x * rows[:, None, :, None], y * rows[:, None, :, None], rtol=1e-4, atol=1e-5)
    found = ours(**inputs)
    torch.testing.assert_close(seen.logits, found.logits, rtol=1e-5, atol=1e-4)
    memory = wanted.encoder_last_hidden_state * real[..., None]
    torch.testing.assert_close(found.encoder_last_hidden_state * real[..., None], memory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.logits * target[..., None], wanted.logits * target[..., None], rtol=1e-4, atol=1e-4
    )
    weights = torch.linspace(-1, 1, found.logits.numel()).view_as(found.logits) * target[..., None]
    for output in (found, wanted):
        (output.logits * weights).sum().backward()
    for name, (grad, other) in gradients(theirs, ours).items():
        rows = slice(None)
        if "shared" in name:  # theirs holds the padding token's own row at its gradient from the output alone
            rows = torch.arange(40) != 1
        torch.testing.assert_close(grad[rows], other[rows], rtol=1e-3, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["bart", "marian"])
def test_loss_shifts_labels_as_transformers_does(tmp_path, form):
    theirs = hugging_face(form)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    inputs = batch("right")
    labels = inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    source = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    found = ours(**source, labels=labels)
    assert found.logits is None
    torch.testing.assert_close(found.loss, theirs(**source, labels=labels).loss, rtol=1e-5, atol=1e-5)


def test_label_smoothing_in_training_mode_alone():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES, label_smoothing=0.3))
    inputs = batch("none")
    labels = inputs["decoder_input_ids"]
    smoothed = model(inputs["input_ids"], labels=labels).loss
    start = torch.full((3, 1), 3)
    logits = model(inputs["input_ids"], decoder_input_ids=torch.cat([start, labels[:, :-1]], 1)).logits
    for smoothing, loss in ((0.3, smoothed), (0.0, model.eval()(inputs["input_ids"], labels=labels).loss)):
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["bart", "marian"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    ],
    ids=["greedy", "beam", "early", "never"],
)
@pytest.mark.parametrize("both_backends", ["auto"], indirect=True)
def test_decoding_equals_transformers(tmp_path, form, settings):
    theirs = hugging_face(form)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    inputs = batch("right")
    source = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    wanted = theirs.generate(**source, max_new_tokens=12, **settings)
    found = generate(ours, **source, max_new_tokens=12, **settings).sequences
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("both_backends", ["auto"], indirect=True)
def test_bad_words_of_the_config(tmp_path):
    """Marian's files forbid the padding token, which is the decoder's start, by a list in config.json."""
    theirs = hugging_face("marian")
    theirs.save_pretrained(tmp_path)
    source = {k: v for k, v in batch("right").items() if not k.startswith("decoder")}
    free = theirs.generate(**source, max_new_tokens=12)
    bad = sorted(set(free[:, 1:].flatten().tolist()) - {1, 2})[:3]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "bad_words_ids": [[i] for i in bad]}))
    ours = Transformer.from_pretrained(tmp_path)
    found = generate(ours, **source, max_new_tokens=12).sequences
    assert torch.equal(found, theirs.generate(**source, max_new_tokens=12, bad_words_ids=[[i] for i in bad]))
    assert not torch.equal(found, free)
    assert TransformerConfig.from_dict(json.loads(json.dumps(ours.config.to_dict()))) == ours.config
    with pytest.raises(ValueError, match="bad_words_ids must be lists of one token each"):
        TransformerConfig.from_dict({**config, "bad_words_ids": [[4, 5]]})


def test_cross_attention_is_projected_once():
    ours = Transformer(TransformerConfig(**SIZES)).eval()
    calls = []
    project = ours.decoder.layers[0].multihead_attn._project_memory
    ours.decoder.layers[0].multihead_attn._project_memory = lambda *args: calls.append(1) or project(*args)
    generate(ours, batch("none")["input_ids"], max_new_tokens=6, num_beams=3, eos_token_id=None)
    assert len(calls) == 1


@pytest.mark.parametrize("form", ["bart", "marian"])
def test_state_dict_round_trip(tmp_path, form):
    theirs = hugging_face(form)
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    ours = Transformer.from_pretrained(tmp_path)
    named = ours.to_hf_state_dict()
    wanted = theirs.state_dict()
    assert named.keys() == {k for k in wanted if form != "marian" or "x" not in k} | named.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(named[name], x, rtol=0, atol=1e-6 if "positions" in name else 0, msg=name)
    again = tmp_path / "again"
    again.mkdir()
    save_file(named, again / "model.safetensors")
    (again / "config.json").write_text(json.dumps(ours.config.to_dict()))
    loaded = Transformer.from_pretrained(again)
    for x, y in zip(loaded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(x, y)
    loaded = Transformer.from_pretrained(again, dtype=torch.bfloat16)
    assert loaded.encoder_positions.weight.dtype == torch.bfloat16


def test_broken_checkpoints_name_what_is_wrong(tmp_path):
    theirs = hugging_face("bart")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.decoder.layers.1.encoder_attn.k_proj.bias")
    weights["model.decoder.layers.2.fc1.bias"] = torch.zeros(32)
    weights["model.encoder.layers.0.fc1.weight"] = torch.zeros(40, 23)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as info:
        Transformer.from_pretrained(tmp_path)
    for words in (
        "missing model.decoder.layers.1.encoder_attn.k_proj.bias [24]",
        "surplus model.decoder.layers.2.fc1.bias [32]",
        "model.encoder.layers.0.fc1.weight must be floating point [40, 24], got torch.float32 [40, 23]",
    ):
        assert words in str(info.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "t5"}, "TransformerConfig: model_type must be 'bart' or 'marian', got 't5'"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings must be True, got False"),
        ({"decoder_vocab_size": 41}, "decoder_vocab_size must be 40, got 41"),
        ({"decoder_attention_heads": 5}, "decoder_attention_heads must divide d_model, got 5 and 24"),
        ({"position_encoding": "rotary"}, "position_encoding must be one of .*; got 'rotary'"),
        ({"pad_token_id": 40}, r"pad_token_id must lie in \[0, vocab_size = 40\), got 40"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig.from_dict({**SIZES, "model_type": "marian", **change})


def test_bad_inputs_name_field_and_values():
    model = Transformer(TransformerConfig(**SIZES)).eval()
    ids = torch.full((2, 5), 9)
    long = torch.full((2, 33), 9)
    for error, words, kwargs in (
        (IndexError, r"Transformer: input_ids must lie in \[0, vocab_size = 40\), got 45", {"input_ids": 5 * ids}),
        (IndexError, "decoder_input_ids must lie in .* got 45", {"decoder_input_ids": 5 * ids}),
        (IndexError, "labels must lie in .* got -9", {"labels": -ids}),
        (ValueError, "input_ids has 33 tokens a row after 0 .* max_position_embeddings is 32", {"input_ids": long}),
        (ValueError, r"attention_mask must have input_ids' shape \[2, 5\]", {"attention_mask": long}),
        (ValueError, r"labels must have decoder_input_ids' shape \[2, 5\]", {"labels": long}),
        (ValueError, "one of decoder_input_ids and labels", {"decoder_input_ids": None}),
        (TypeError, "input_ids must be int32 or int64", {"input_ids": ids.float()}),
    ):
        with pytest.raises(error, match=words):
            model(**{"input_ids": ids, "decoder_input_ids": ids, **kwargs})
    with pytest.raises(ValueError, match="need 33 positions"):
        generate(model, ids, max_new_tokens=33)
    with pytest.raises(ValueError, match="to_hf_state_dict wants model_type 'bart' or 'marian', got 'transformer'"):
        model.to_hf_state_dict()


def test_the_papers_sizes():
    """Table 3 of the paper: 65 and 213 million parameters, with a vocabulary of 37000."""
    for config, millions in ((TransformerConfig.base(37000), 65), (TransformerConfig.big(37000), 213)):
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(config).parameters())
        assert abs(count / 1e6 - millions) < 0.05 * millions


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("both_backends", ["auto"], indirect=True)
def test_learns_to_copy(norm_first):
    torch.manual_seed(0)
    config = TransformerConfig(
        **{**SIZES, "vocab_size": 12, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2},
        norm_first=norm_first,
    )
    model = Transformer(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        ids = torch.randint(4, 12, (16, 3))
        losses.append(model(ids, labels=torch.cat([ids, torch.full((16, 1), 2)], 1)).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
