"""Trains builtin:pystdlib on one device: ever longer runs until the held-out loss stops falling.

    python benchmarks/builtin_model/train.py --output .builtin-data/trained --limit-s 500

Each run is a whole schedule (warm-up, then linear to zero) from a fresh start. Runs of a series grow longer
until one does not lower the validation loss; the next series (more dropout) begins at the length that was
best. The best weights so far are on disk at any moment, and no run is begun that the time limit would cut.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from network import LanguageModel
from torch import Tensor

BETAS = (0.9, 0.95)
LENGTH = 512  # tokens of a window, the model's longest
WARMUP_FRACTION = 0.04
EVALUATIONS = 8  # points of a run's validation curve


@dataclass(frozen=True)
class Settings:
    """What one run is made of; lengths in tokens, `batch` in windows."""

    epochs: int
    dropout: float
    learning_rate: float
    weight_decay: float
    batch: int
    length: int
    seed: int = 0


def load_tokens(folder: Path, split: str, device: str) -> Tensor:
    """The token stream of a split, on the device."""
    return torch.from_numpy(np.fromfile(folder / f"{split}.bin", dtype=np.uint16).astype(np.int64)).to(device)


def epoch_starts(tokens: int, length: int, generator: torch.Generator) -> Tensor:
    """Starts of windows that cover the stream once from a random offset, in random order."""
    offset = int(torch.randint(length, (), generator=generator))
    starts = torch.arange(offset, tokens - length, length)
    return starts[torch.randperm(len(starts), generator=generator)]


def batches(tokens: Tensor, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of all full batches of a run, epoch after epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    span = torch.arange(settings.length + 1, device=tokens.device)
    for _ in range(settings.epochs):
        starts = epoch_starts(len(tokens), settings.length, generator).to(tokens.device)
        for chunk in starts.split(settings.batch):
            if len(chunk) == settings.batch:
                window = tokens[chunk[:, None] + span]
                yield window[:, :-1], window[:, 1:]


def steps_of(tokens: int, settings: Settings) -> int:
    """Steps of a run: the fewest that any random offset gives, times the epochs."""
    return (tokens // settings.length - 1) // settings.batch * settings.epochs


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then linear to zero."""
    warmup = max(1, int(steps * WARMUP_FRACTION))
    return peak * min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup)))


@torch.no_grad()
def validation_loss(model: torch.nn.Module, tokens: Tensor, settings: Settings) -> float:
    """Mean nats per token over consecutive windows that cover the stream, all windows of full length."""
    starts = torch.arange(0, len(tokens) - settings.length, settings.length, device=tokens.device)
    starts = starts[: len(starts) // settings.batch * settings.batch]
    span = torch.arange(settings.length + 1, device=tokens.device)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    model.eval()
    for chunk in starts.split(settings.batch):
        window = tokens[chunk[:, None] + span]
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            total += model(window[:, :-1], window[:, 1:]).double().sum()
    model.train()
    return float(total) / (len(starts) * settings.length)


def optimizer_of(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=True)


def run(
    model: torch.nn.Module, train: Tensor, held_out: Tensor, settings: Settings
) -> list[dict[str, float]]:
    """One whole schedule on a (compiled) model that was reset; returns its validation curve."""
    optimizer = optimizer_of(model, settings)
    steps = steps_of(len(train), settings)
    due = {steps * (point + 1) // EVALUATIONS for point in range(EVALUATIONS)}
    curve, began, recent = [], time.monotonic(), []
    for step, (input_BT, target_BT) in enumerate(batches(train, settings)):
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, settings.learning_rate)
        with torch.autocast(train.device.type, dtype=torch.bfloat16):
            loss = model(input_BT, target_BT).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.detach()]
        if step + 1 in due:
            point = {
                "step": step + 1,
                "epoch": round(settings.epochs * (step + 1) / steps, 3),
                "train_loss": round(float(torch.stack(recent).mean()), 5),
                "validation_loss": round(validation_loss(model, held_out, settings), 5),
                "seconds": round(time.monotonic() - began, 1),
            }
            curve.append(point)
            print(json.dumps({**asdict(settings), **point}), flush=True)
    return curve


@dataclass
class Record:
    """Every run so far and the best weights, both written as soon as they are known."""

    output: Path
    runs: list[dict[str, object]]
    best: float = float("inf")

    def add(self, model: LanguageModel, settings: Settings, curve: list[dict[str, float]]) -> float:
        """Files a run; returns its last validation loss."""
        loss = curve[-1]["validation_loss"]
        self.runs.append({"settings": asdict(settings), "validation_loss": loss, "curve": curve})
        if loss < self.best:
            self.best = loss
            state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
            torch.save(state, self.output / "partial.pt")
            (self.output / "partial.pt").replace(self.output / "best.pt")
        document = {"device": device_name(), "torch": torch.__version__, "best": self.best, "runs": self.runs}
        (self.output / "curve.json").write_text(json.dumps(document, indent=1) + "\n")
        return loss


def device_name() -> str:
    """The name of the device that trained."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def search(arguments: argparse.Namespace) -> None:
    """Goes through the series of runs within the time limit."""
    began = time.monotonic()
    train, held_out = (
        load_tokens(arguments.data, split, arguments.device) for split in ("train", "validation")
    )
    if arguments.tokens:
        train, held_out = train[: arguments.tokens], held_out[: arguments.tokens]
    record = Record(arguments.output, [])
    lengths, epoch_s = arguments.epochs, 0.0
    for dropout in arguments.dropout:
        model = LanguageModel(dropout).to(arguments.device)
        compiled = torch.compile(model)
        previous, best_epochs = float("inf"), lengths[0]
        for epochs in lengths:
            if time.monotonic() - began + epoch_s * epochs > arguments.limit_s:
                print(f"left out: dropout {dropout}, {epochs} epochs, past the time limit", flush=True)
                break
            torch.manual_seed(0)
            model.reset()
            settings = Settings(
                epochs, dropout, arguments.learning_rate, arguments.weight_decay, arguments.batch, LENGTH
            )
            curve = run(compiled, train, held_out, settings)
            loss = record.add(model, settings, curve)
            epoch_s = curve[-1]["seconds"] / epochs
            if loss >= previous:
                break
            previous, best_epochs = loss, epochs
        lengths = [epochs for epochs in arguments.epochs if epochs >= best_epochs]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".builtin-data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, nargs="+", default=[6, 12, 20, 32, 48, 72, 100])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=0, help="use only this many tokens (to try the script)")
    parser.add_argument("--limit-s", type=float, default=500.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    search(arguments)


if __name__ == "__main__":
    main()
