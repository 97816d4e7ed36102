"""GPT: a character-level language model learns to write like Python's own reference manual.

The text comes with Python: pydoc_data, what help("for") prints.

pip install 'pytransformer[examples]'
python examples/train_gpt.py
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch

sys.path.insert(0, str(Path(__file__).parent))
import training

from pytransformer.generation import generate
from pytransformer.models import Gpt, GptConfig


def main() -> None:
    args = training.arguments("GPT on the characters of Python's manual.", steps=1000).parse_args()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if args.tiny:
        text = text[:20_000]
    characters = sorted(set(text))
    ids = {c: i for i, c in enumerate(characters)}
    data = torch.tensor([ids[c] for c in text])
    held_out = data[-len(data) // 20 :]  # the end of the manual is not trained on
    data = data[: -len(held_out)]

    length, batch_size, width, layers = (32, 4, 32, 1) if args.tiny else (128, 16, 192, 4)
    torch.manual_seed(args.seed)
    config = GptConfig(
        vocab_size=len(characters), n_positions=4 * length, n_embd=width, n_layer=layers, n_head=width // 32
    )
    model = Gpt(config)

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(len(data) - length, (batch_size,), generator=generator)
        batch = torch.stack([data[s : s + length] for s in starts.tolist()])
        return model(batch, labels=batch).loss

    training.train(model, loss_of, args, lr=1e-3, warmup=100)
    model.eval()
    windows = held_out[: len(held_out) // length * length].view(-1, length)[:200]
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    print(f"held-out loss: {loss:.3f} nats a character ({loss / 0.6931:.2f} bits)\n")
    prompt = torch.tensor([[ids[c] for c in "The statement "]])
    tokens = min(400, config.n_positions - prompt.shape[1])
    sample = generate(
        model, prompt, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_p=0.95, seed=args.seed
    )  # fmt: skip
    print("".join(characters[i] for i in sample.sequences[0].tolist()))


if __name__ == "__main__":
    main()
