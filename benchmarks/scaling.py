"""What a second shard is worth: the same trials over Ray with one shard and with two, each on a device of its own.

    python benchmarks/scaling.py                 the embedded model, a core a shard
    python benchmarks/scaling.py --shape 8b      eight blocks of Llama 3.1 8B's shape (random weights), a GPU a shard

Prints one JSON line per figure. Timed is the last trial of a launch, for which masks, statistics and errors before
recovery are there: its recovery on the clock, from the first unit's beginning to the last one's end as the launch's
trace has them, and the whole trial, with an evaluation that is short beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from retraining import random_tokens, save_random_model

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch

BUILTIN = "builtin:pystdlib"
SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}


def space_of(storage: Path, shape: str, shards: int) -> SearchSpace:
    trial = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.6, "granularity": "subblock"}
    common = {
        "name": f"scaling-{shards}",
        "validation": {"samples": 0},
        "search": {"metric": "output_error_calibration"},
        "execution": {"shards": shards, "concurrent_trials": 1, "threads_per_worker": 1},
    }
    if shape == "embedded":
        entry = {
            "name": "short",
            "dataset": BUILTIN,
            "split": "test",
            "sequence_length": 128,
            "max_windows": 4,
        }
        return SearchSpace.from_dict(
            common
            | {
                "model": {"path": BUILTIN},
                "calibration": {"dataset": BUILTIN, "num_samples": 48, "sequence_length": 128},
                "evaluation": {"perplexity": [entry]},
                "sweep": [trial | {"epochs": 3, "learning_rate": [1e-3, 2e-3]}],
            }
        )
    data = str(storage / "tokens.parquet")
    entry = {"name": "random", "dataset": data, "sequence_length": 2048, "max_windows": 4}
    return SearchSpace.from_dict(
        common
        | {
            "model": {"path": str(storage / "model"), "dtype": "bfloat16"},
            "calibration": {"dataset": data, "num_samples": 64, "sequence_length": 2048},
            "evaluation": {"perplexity": [entry]},
            "sweep": [trial | {"epochs": 2, "batch_size": 8, "learning_rate": [1e-5, 2e-5, 3e-5]}],
        }
    )


def measured(storage: Path, shape: str, shards: int) -> dict[str, Any]:
    space = space_of(storage, shape, shards)
    rows = launch(space, storage=storage, address="local", trace=True)
    row = rows[rows.recovery == "reconstruct"].sort_values("started_at").iloc[-1]
    assert row.status == "finished", row.error
    found = {
        "shards": shards,
        "seconds": round(row.seconds_total, 2),
        "recovery": round(recovery_on_the_clock(storage / space.name / "trace.json"), 2),
        "busy_recovery": round(row.seconds_recovery, 2),
        "perplexity": row.perplexity,
        "device": row.device_name,
    }
    print(json.dumps({"figure": "the last trial"} | found), flush=True)
    return found


def recovery_on_the_clock(trace: Path) -> float:
    """Seconds from the beginning of the last trial's first unit to the end of its last one, over all shards."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "recover"]
    last = max(events, key=lambda event: event["ts"])["args"]["trial"]
    mine = [event for event in events if event["args"]["trial"] == last]
    return (max(e["ts"] + e["dur"] for e in mine) - min(e["ts"] for e in mine)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("embedded", "8b"), default="embedded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        if options.shape == "8b":
            save_random_model(SHAPE_8B, storage)
            random_tokens(SHAPE_8B["vocab_size"], 64, 2048, storage)
        one, two = (measured(storage, options.shape, shards) for shards in (1, 2))
    for what in ("recovery", "seconds"):
        name = {"recovery": "recovery", "seconds": "whole trial"}[what]
        ratio = round(one[what] / two[what], 2)
        print(json.dumps({"figure": f"two shards against one, {name}", "ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()
