"""BERT: pre-training by masked words and next sentences, on Python's own reference manual.

A tokenizer of word pieces is trained first, then BERT: 15% of the tokens are predicted, of which 80% are masked, 10%
are another token and 10% stay; and a pair of sentences either follow each other or were drawn apart.

pip install 'pytransformer[examples]'
python examples/pretrain_bert.py
"""

import argparse
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import training

from pytransformer.models import BertConfig, BertForPreTraining

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
HEAD = 64  # tokens of a sentence at most


def documents(tiny: bool) -> list[list[str]]:
    """The manual's sections of two sentences or more, as lists of sentences."""
    names = sorted(topics)[:8] if tiny else sorted(topics)
    texts = (re.sub(r"[*=\-~]{3,}|\s+", " ", topics[name]) for name in names)
    split = ([s for s in re.split(r"(?<=[.:!?])\s", text) if len(s) > 20] for text in texts)
    return [sentences for sentences in split if len(sentences) > 1]


class Pairs:
    """Batches of sentence pairs with masked tokens; a batch depends on its random generator alone."""

    def __init__(self, encoded: list[list[list[int]]], vocab_size: int) -> None:
        self.documents, self.vocab_size = encoded, vocab_size

    def batch(self, rng: random.Random, size: int) -> dict[str, torch.Tensor]:
        rows = [self._pair(rng) for _ in range(size)]
        longest = max(len(ids) for ids, *_ in rows)
        names = ("input_ids", "token_type_ids", "labels")
        padding = dict(zip(names, (PAD, 0, -100), strict=True))
        columns = dict(zip(names, zip(*(row[:3] for row in rows), strict=True), strict=True))
        found = {
            name: torch.tensor([x + [padding[name]] * (longest - len(x)) for x in column])
            for name, column in columns.items()
        }
        found["attention_mask"] = found["input_ids"] != PAD
        found["next_sentence_label"] = torch.tensor([row[3] for row in rows])
        return found

    def _pair(self, rng: random.Random) -> tuple[list[int], list[int], list[int], int]:
        document = rng.choice(self.documents)
        i = rng.randrange(len(document) - 1)
        apart = rng.random() < 0.5
        second = rng.choice(rng.choice(self.documents)) if apart else document[i + 1]
        first, second = document[i][:HEAD], second[:HEAD]
        ids = [CLS, *first, SEP, *second, SEP]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        labels = [-100] * len(ids)
        places = [t for t, token in enumerate(ids) if token not in (CLS, SEP)]
        for t in rng.sample(places, max(1, round(0.15 * len(places)))):
            labels[t] = ids[t]
            choice = rng.random()
            ids[t] = MASK if choice < 0.8 else rng.randrange(len(SPECIAL), self.vocab_size) if choice < 0.9 else ids[t]
        return ids, types, labels, int(apart)


def tokenizer_of(texts: list[list[str]], args: argparse.Namespace) -> Tokenizer:
    """The tokenizer in the run's folder, trained if there is none: training it twice need not give the same one."""
    path = args.out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    trained = BertWordPieceTokenizer(lowercase=True)
    sentences = (s for document in texts for s in document)
    size = 300 if args.tiny else 4000
    trained.train_from_iterator(sentences, vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    args.out.mkdir(parents=True, exist_ok=True)
    trained.save(str(path))
    return Tokenizer.from_file(str(path))


def main() -> None:
    args = training.arguments("BERT on the sentences of Python's manual.", steps=1500).parse_args()
    texts = documents(args.tiny)
    tokenizer = tokenizer_of(texts, args)
    encoded = [[e.ids for e in tokenizer.encode_batch(s, add_special_tokens=False)] for s in texts]
    held_out = max(1, len(encoded) // 20)
    batch_size, width, layers = (4, 32, 1) if args.tiny else (16, 192, 4)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=2 * HEAD + 3,
    )
    torch.manual_seed(args.seed)
    model = BertForPreTraining(config)
    seen = Pairs(encoded[:-held_out], config.vocab_size)

    def loss_of(step: int) -> torch.Tensor:
        return model(**seen.batch(random.Random(f"{args.seed} {step}"), batch_size)).loss

    training.train(model, loss_of, args, lr=1e-3, warmup=100)
    evaluate(model.eval(), Pairs(encoded[-held_out:], config.vocab_size), batch_size)


def evaluate(model: BertForPreTraining, pairs: Pairs, batch_size: int) -> None:
    """How often each head is right on sections that were not trained on."""
    right, counted, related, total = 0, 0, 0, 0
    with torch.no_grad():
        for i in range(10):
            batch = pairs.batch(random.Random(-i - 1), batch_size)
            labels, follows = batch.pop("labels"), batch.pop("next_sentence_label")
            output = model(**batch)
            masked = labels != -100
            right += int((output.prediction_logits.argmax(-1) == labels)[masked].sum())
            counted += int(masked.sum())
            related += int((output.next_sentence_logits.argmax(-1) == follows).sum())
            total += len(follows)
    print(f"held-out sections: {right / counted:.0%} of masked tokens right, {related / total:.0%} of pairs")


if __name__ == "__main__":
    main()
