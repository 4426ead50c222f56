"""Plans against reality: small sweeps planned and then launched, each in processes of its own.

    python benchmarks/plan_reality.py                  the embedded model on this machine's cores
    python benchmarks/plan_reality.py --gpu            models with random weights on a CUDA machine
    python benchmarks/plan_reality.py --only NAME ...  some of them;  --list names them

Prints a JSON line each: seconds on the clock, from `raysweep launch` to its shards' end; busy seconds of shards for
trials, which other programs on the machine lengthen less; the highest memory of a shard's process and of its GPU. Each
as planned and as measured, with their ratio (measured over planned), and the machine's load before; then the lowest
and the highest ratio of each. What a plan needs of the probe is measured by the plan, anew for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from retraining import random_tokens, save_random_model

BUILTIN = "builtin:pystdlib"
RECOVERY = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.6, "learning_rate": 1e-3}
PRUNED = {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": 0.6}
Groups = list[dict[str, Any]]


def embedded(
    name: str, sweep: Groups, samples: int = 48, length: int = 128, **execution: Any
) -> dict[str, Any]:
    entry = {
        "name": "test",
        "dataset": BUILTIN,
        "split": "test",
        "sequence_length": length,
        "max_windows": 32,
    }
    return {
        "name": name,
        "model": {"path": BUILTIN, "dtype": "float32"},
        "calibration": {"dataset": BUILTIN, "num_samples": samples, "sequence_length": length},
        "validation": {"samples": 16},
        "evaluation": {"perplexity": [entry]},
        "sweep": sweep,
        "execution": execution,
    }


def on_cpus() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """By name a space, and options of the launch."""
    rates = {"learning_rate": [1e-3, 2e-3]}
    units = {"granularity": ["matrix", "subblock", "block"]}
    exact = {name: value for name, value in RECOVERY.items() if name != "learning_rate"}
    exact |= {"optimizer": "exact", "granularity": "matrix"}
    streams = {"input_stream": "pruned", "statistics_stream": "recovered"}
    spaces = {
        "pruned": embedded("pruned", [PRUNED]),
        "quickstart": embedded(
            "quickstart", [PRUNED, RECOVERY | units | {"criterion": ["magnitude", "wanda"]}]
        ),
        "matrix": embedded("matrix", [RECOVERY | rates | {"granularity": "matrix"}]),
        "subblock": embedded("subblock", [RECOVERY | rates | {"granularity": "subblock"}]),
        "block": embedded("block", [RECOVERY | rates | {"granularity": "block", "epochs": 3}]),
        "window": embedded("window", [RECOVERY | rates | {"granularity": "window:2"}]),
        "model": embedded("model", [RECOVERY | {"granularity": "model"}]),
        "exact": embedded("exact", [exact]),
        "sparsegpt": embedded(
            "sparsegpt", [PRUNED | {"criterion": "sparsegpt", "sparsity": [0.5, 0.6, 0.7]}]
        ),
        "streams": embedded("streams", [RECOVERY | streams | {"granularity": ["subblock", "block"]}]),
        "long": embedded("long", [RECOVERY | rates | {"granularity": "block"}], samples=32, length=512),
        "one-shard": embedded("one-shard", [RECOVERY | units], shards=1),
        "two-threads": embedded("two-threads", [RECOVERY | units], shards=1, threads_per_worker=2),
    }
    on_disk = {"weight_store": "disk", "activation_store": "disk"}
    anew = on_disk | {"statistics_store": "anew", "boundaries": 2}
    spaces |= {
        "disk": embedded("disk", [RECOVERY | units], **on_disk, statistics_store="disk"),
        "anew": embedded("anew", [RECOVERY | rates | {"granularity": "block"}], **anew),
    }
    chosen = {name: (space, []) for name, space in spaces.items()}
    for name in ("quickstart", "block", "exact", "streams", "disk"):
        space = spaces[name] | {"name": f"{name}-alone"}
        chosen[f"{name}-alone"] = (space, ["--in-process"])
    return chosen


SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8},
}
COMMON = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def on_gpus(storage: Path) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """The same on models with random weights, which `make_model` makes there."""
    data = storage / "tokens.parquet"
    chosen = {}
    for shape in SHAPES:
        for kind, sweep in {
            "pruned": [PRUNED],
            "matrix": [RECOVERY | {"granularity": "matrix"}],
            "subblock": [
                RECOVERY | {"granularity": "subblock", "learning_rate": [1e-5, 2e-5], "batch_size": 8}
            ],
            "block": [RECOVERY | {"granularity": "block", "learning_rate": [1e-5, 2e-5], "batch_size": 8}],
            "window": [RECOVERY | {"granularity": "window:2", "learning_rate": 1e-5, "batch_size": 8}],
            "sparsegpt": [PRUNED | {"criterion": "sparsegpt"}],
        }.items():
            name = f"{shape}-{kind}"
            entry = {"name": "random", "dataset": str(data), "sequence_length": 2048, "max_windows": 16}
            space = {
                "name": name,
                "model": {"path": str(storage / shape / "model"), "dtype": "bfloat16"},
                "calibration": {"dataset": str(data), "num_samples": 64, "sequence_length": 2048},
                "validation": {"samples": 0},
                "evaluation": {"perplexity": [entry]},
                "search": {"metric": "output_error_calibration"},
                "sweep": sweep,
                "execution": {"keep": "none"},
            }
            chosen[name] = (space, [])
    return chosen


def make_model(shape: str, storage: Path) -> None:
    """What the spaces of that shape name: the model, once, and its data."""
    if not (storage / shape).exists():
        random_tokens(COMMON["vocab_size"], samples=96, length=2048, storage=storage)
        (storage / shape).mkdir()
        save_random_model(COMMON | SHAPES[shape], storage / shape)


def compared(space: dict[str, Any], options: list[str], storage: Path) -> dict[str, Any]:
    """What was planned and what was measured."""
    file = storage / f"{space['name']}.json"  # JSON is YAML
    file.write_text(json.dumps(space), encoding="utf-8")
    begun, load = time.monotonic(), os.getloadavg()[0]
    plan = json.loads(_raysweep(storage, "plan", str(file), "--json", "--probe-again"))
    planning = time.monotonic() - begun
    begun = time.monotonic()
    rows = json.loads(
        _raysweep(storage, "launch", str(file), "--json", *(options or ["--address", "local"]))
    )["rows"]
    wall = time.monotonic() - begun
    took = json.loads((storage / space["name"] / "plan.json").read_text(encoding="utf-8"))
    figures = {
        "name": space["name"],
        "planned_s": plan["seconds_in_process" if options else "seconds"],
        "measured_s": took["seconds"],
        "wall_s": wall,
        "planning_s": planning,
        "planned_busy_s": plan["models"][0]["seconds"]["trials_busy"],
        "measured_busy_s": sum(row["device_seconds"] for row in rows),
        "load": load,
    }
    figures["ratio_s"] = figures["measured_s"] / figures["planned_s"]
    figures["ratio_busy"] = figures["measured_busy_s"] / figures["planned_busy_s"]
    for where in ("host", "device"):
        if took[where] is not None:
            figures[f"planned_{where}_mib"] = took[where]["planned"] / (1 << 20)
            figures[f"measured_{where}_mib"] = took[where]["measured"] / (1 << 20)
            figures[f"ratio_{where}"] = took[where]["measured"] / took[where]["planned"]
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def _raysweep(storage: Path, *arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "raysweep", *arguments, "--storage", str(storage)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(f"raysweep {' '.join(arguments)} ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
    return ran.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the list for a CUDA machine")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spaces = on_gpus(Path(folder)) if chosen.gpu else on_cpus()
        if chosen.list:
            print(*spaces, sep="\n")
            return
        found = []
        for name in chosen.only or spaces:
            if chosen.gpu:
                make_model(name.partition("-")[0], Path(folder))
            found.append(compared(*spaces[name], Path(folder)))
            print(json.dumps(found[-1]), flush=True)
        ratios = [key for key in found[0] if key.startswith("ratio")]
        worst = {key: [min(one[key] for one in found), max(one[key] for one in found)] for key in ratios}
        print(json.dumps({"lowest and highest ratio": worst}))


if __name__ == "__main__":
    main()
