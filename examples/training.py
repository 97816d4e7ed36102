"""What the training examples share: the loop, its progress bar, checkpoints that resume exactly, and the loss plot.

A batch is a function of the seed and the step alone, and a checkpoint holds the model, the optimizer, the schedule
and the state of torch's generator (dropout draws from it): a run that stops and resumes takes the same steps, with
the same losses, as one that does not stop.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def arguments(description: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs") / Path(description.split()[0].lower()), help="folder")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--stop", type=int, help="stop after that many steps, as if interrupted")
    parser.add_argument("--tiny", action="store_true", help="a toy size that runs in seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def train(
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    args: argparse.Namespace,
    lr: float,
    warmup: int,
    save_every: int = 500,
) -> list[float]:
    """AdamW with a linear warm-up and a cosine decay, from step 0 or from a checkpoint.

    Args:
        loss_of: the loss of a step.
        args: of ``arguments``.

    Returns:
        The loss of every step, those before a resumed checkpoint included.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warmup, args.steps))
    path, losses = args.out / "checkpoint.pt", []
    if args.resume:
        losses = _load(path, model, optimizer, schedule)
    model.train()
    end = min(args.steps, args.stop or args.steps)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("training", total=end, completed=len(losses), loss=losses[-1] if losses else math.nan)
        for step in range(len(losses), end):
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
            if step + 1 == end or (step + 1) % save_every == 0:
                _save(path, model, optimizer, schedule, losses)
                progress.console.print(f"step {step + 1}: loss {losses[-1]:.3f}, saved {path}")
    plot(losses, args.out / "loss.png")
    return losses


def plot(losses: list[float], path: Path) -> None:
    """The loss of every step, and its running mean, as a picture."""
    try:
        import matplotlib
    except ImportError:
        print("no loss plot: pip install 'pytransformer[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 50)
    means = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=0.8)
    axes.plot(range(window, len(losses) + 1), means, color="tab:blue")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(path: Path, model, optimizer, schedule, losses) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": torch.get_rng_state(),
        "losses": losses,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # an interrupted save leaves the checkpoint before it whole


def _load(path: Path, model, optimizer, schedule) -> list[float]:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["generator"])
    return state["losses"]
