"""The training examples, small: they run from a fresh process, resume to the same losses, and draw their loss."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"train_translation": "num2words", "train_gpt": "rich", "pretrain_bert": "tokenizers"}


REPORTS = {"train_translation": "greedy: ", "train_gpt": "held-out loss: ", "pretrain_bert": "held-out sections: "}


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def run(name, folder, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--steps", "4", "--out", str(folder), *options])
    example(name).main()
    return capsys.readouterr().out


def losses(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["losses"]


@pytest.mark.parametrize("name", NEEDS)
def test_resumes_to_the_same_losses(name, tmp_path, monkeypatch, capsys):
    for package in (NEEDS[name], "rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    run(name, tmp_path / "parts", monkeypatch, capsys, "--stop", "2")
    first = losses(tmp_path / "parts")
    assert len(first) == 2
    parts = run(name, tmp_path / "parts", monkeypatch, capsys, "--resume")
    resumed = losses(tmp_path / "parts")
    assert resumed[:2] == first
    (tmp_path / "whole").mkdir()
    for tokenizer in (tmp_path / "parts").glob("tokenizer.json"):  # which belongs to a run
        shutil.copy(tokenizer, tmp_path / "whole")
    whole = run(name, tmp_path / "whole", monkeypatch, capsys)
    assert losses(tmp_path / "whole") == resumed
    assert len(resumed) == 4
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 5000
    report = whole.partition(REPORTS[name])[2]
    assert report
    assert report == parts.partition(REPORTS[name])[2]


def test_runs_in_a_fresh_process(tmp_path):
    """As a reader runs it, with nothing of the repository on the path."""
    pytest.importorskip("num2words")
    command = [sys.executable, "-P", str(EXAMPLES / "train_translation.py")]
    command += ["--tiny", "--steps", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "greedy: " in done.stdout
    assert "4 beams: " in done.stdout


def test_translation_texts_survive_the_vocabulary():
    pytest.importorskip("num2words")
    translation = example("train_translation")
    numbers = [0, 7, 71, 80, 99, 200, 881, 21_180, 999_999]
    texts = [f(n) for n in numbers for f in (translation.english, translation.french)]
    vocabulary = translation.Vocabulary(texts)
    ids = vocabulary.encode(texts, end=True)
    assert [vocabulary.decode(row) for row in ids.tolist()] == texts
    unseen = [n for n in range(2000) if translation.is_unseen(n)]
    assert 100 < len(unseen) < 300
    assert min(unseen) >= 100


def test_bert_masks_fifteen_percent():
    pytest.importorskip("tokenizers")
    import random

    bert = example("pretrain_bert")
    pairs = bert.Pairs([[[10 + d] * 40, [30 + d] * 40] for d in range(8)], 100)
    batch = pairs.batch(random.Random(0), 64)
    labels, ids = batch["labels"], batch["input_ids"]
    masked = labels != -100
    assert masked.sum(1).tolist() == [12] * 64
    share = (ids == bert.MASK)[masked].float().mean()
    assert 0.75 < share < 0.85
    assert 0.3 < batch["next_sentence_label"].float().mean() < 0.7
    follows = batch["next_sentence_label"] == 0
    first = torch.where(labels == -100, ids, labels)
    assert (first[follows][:, 42] - first[follows][:, 1] == 20).all()
    assert batch["token_type_ids"].sum(1).tolist() == [41] * 64
