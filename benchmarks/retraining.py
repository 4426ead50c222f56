"""What retraining costs beside local reconstruction, and what a retraining costs beyond its own steps.

    python benchmarks/retraining.py                      four retrainings of the embedded model: overhead of each
    python benchmarks/retraining.py --shape 1b           one retraining and one reconstruction by subblock of a model of
                                                         Llama 3.2 1B's shape (random weights), on every GPU
    python benchmarks/retraining.py --shape 1b --zero-stage 3 --devices 0

Prints one JSON line per figure. Everything goes through one launch over Ray, Tune and Train.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from raysweep.launching.progress import Silent
from raysweep.model.builtin import resolve_model_path
from raysweep.results.folders import RETRAINING
from raysweep.shards.retrained import DONE, Retrained

MASK = {"criterion": "wanda", "sparsity": 0.6}
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}


class Clock(Silent):
    """Notes when the stages of a launch begin, and what the retrainings took before their folders go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stages, self.found = folder, list[tuple[str, float]](), list[Retrained]()

    def stage(self, text: str) -> None:
        self.stages.append((text, time.perf_counter()))
        done = sorted((self.folder / RETRAINING).glob(f"*/{DONE}"))
        if len(done) > len(self.found):
            self.found = [Retrained.read(file.parent) for file in done]

    @property
    def retraining_seconds(self) -> float:
        """From the end of the first shards to the beginning of the second ones."""
        start = next(
            moment for text, moment in self.stages if text.startswith("Starting") and "retraining" in text
        )
        return (
            next(moment for text, moment in self.stages if text.startswith("Loading") and moment > start)
            - start
        )


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def embedded(storage: Path) -> SearchSpace:
    """Four retrainings that differ in their learning rate only."""
    builtin = "builtin:pystdlib"
    return SearchSpace.from_dict(
        {
            "name": "retraining",
            "model": {"path": builtin},
            "calibration": {"dataset": builtin, "num_samples": 48, "sequence_length": 128},
            "sweep": [{"recovery": "retrain", **MASK, "learning_rate": [1e-4, 2e-4, 3e-4, 4e-4]}],
        }
    )


def save_random_model(shape: dict[str, Any], storage: Path) -> None:
    """storage/model: a Llama of that shape in bfloat16, with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(
        "cuda" if torch.cuda.is_available() else "cpu"
    ):  # a billion random numbers: minutes on a CPU
        LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.bfloat16)).save_pretrained(storage / "model")
    torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    for file in Path(resolve_model_path("builtin:pystdlib")).glob("tokenizer*"):
        shutil.copy(file, storage / "model")


def random_tokens(vocabulary: int, samples: int, length: int, storage: Path) -> None:
    """storage/tokens.parquet: samples of token ids."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = np.random.default_rng(0).integers(0, vocabulary, (samples, length))
    pq.write_table(pa.table({"input_ids": list(ids)}), storage / "tokens.parquet")


def shaped(storage: Path, shape: str, stage: int, samples: int, length: int) -> SearchSpace:
    """A model with random weights and random tokens: of interest is what it costs."""
    save_random_model(SHAPES[shape], storage)
    random_tokens(SHAPES[shape]["vocab_size"], samples, length, storage)
    data = str(storage / "tokens.parquet")
    steps = {"batch_size": 8, "epochs": 1}
    entry = {"name": "random", "dataset": data, "sequence_length": length, "max_windows": 8}
    return SearchSpace.from_dict(
        {
            "name": "retraining",
            "model": {"path": str(storage / "model"), "dtype": "bfloat16"},
            "calibration": {"dataset": data, "num_samples": samples, "sequence_length": length},
            "validation": {"samples": 0},
            "evaluation": {"perplexity": [entry]},
            "search": {"metric": "output_error_calibration"},
            "sweep": [
                {
                    "recovery": "reconstruct",
                    **MASK,
                    "granularity": "subblock",
                    "learning_rate": 1e-4,
                    **steps,
                },
                {"recovery": "retrain", **MASK, "learning_rate": 1e-5, "zero_stage": stage, **steps},
            ],
        }
    )


def overhead(clock: Clock) -> None:
    training = sum(found.wall_seconds for found in clock.found)
    trials = len(clock.found)
    report(
        "what retrainings cost beyond their steps, on the clock",
        retrainings=trials,
        workers=clock.found[0].workers,
        seconds=round(clock.retraining_seconds, 1),
        of_steps=round(training, 1),
        overhead_of_each=round((clock.retraining_seconds - training) / trials, 1),
        of_which_model_and_engine=round(sum(found.start_seconds for found in clock.found) / trials, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--devices", help="GPUs to use, as CUDA_VISIBLE_DEVICES takes them; default all")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    if options.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.devices
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        if options.shape:
            space = shaped(storage, options.shape, options.zero_stage, options.samples, options.length)
        else:
            space = embedded(storage)
        clock = Clock(storage / space.name)
        rows = launch(space, storage=storage, address="local", progress=clock)
    for row in rows[rows.recovery.isin(("reconstruct", "retrain"))].to_dict("records"):
        report(
            f"{row['recovery']} {row['granularity'] or ''}".strip(),
            status=row["status"],
            error=row["error"],
            device=row["device_name"],
            devices=row["devices"],
            seconds_by_phase={
                phase: round(row[f"seconds_{phase}"], 1)
                for phase in ("statistics", "mask", "recovery", "evaluation", "total")
            },
            standalone_seconds=round(row["device_seconds_standalone"], 1),
            peak_recovery_gib=round(row["peak_recovery_bytes"] / 2**30, 3),
            training_petaflops=round(row["training_flops"] / 1e15, 4),
            tokens=row["tokens_trained"],
        )
    for (stage, begin), (_, end) in pairwise(clock.stages):
        report("on the clock", stage=stage, seconds=round(end - begin, 1))
    overhead(clock)


if __name__ == "__main__":
    main()
