"""Large models through small memory: random weights of true shapes, swept by the command with stores of several kinds.

Every figure is one JSON line. Perplexities of random weights mean nothing; errors, seconds and bytes do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

SHAPES = {
    "8b": {  # Llama-3.1-8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {  # Llama-3.1-70B
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "wide": {  # a CPU's fill: 2 GiB of float32 weights in 16 blocks
        "vocab_size": 4096,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}

RESIDENT = {"weight_store": "device", "activation_store": "device", "statistics_store": "device"}
ON_HOST = {"weight_store": "host", "activation_store": "host", "statistics_store": "host"}


def make_model(folder: Path, shape: str, blocks: int, dtype: str) -> None:
    """A Llama of random weights, written block by block: no more than one is in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from raysweep.model.builtin import resolve_model_path

    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=blocks, max_position_embeddings=8192, rope_theta=5e5, dtype=dtype
    )
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in Path(resolve_model_path("builtin:pystdlib")).glob("tokenizer*"):
        shutil.copy(file, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = getattr(torch, dtype), dict[str, str]()
    hidden, ffn, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(kind).cpu()

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    torch.manual_seed(0)
    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": matrix(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=kind),
            "lm_head.weight": matrix(vocabulary, hidden),
        },
    )
    for block in range(blocks):
        linears = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        tensors = {f"{name}.weight": matrix(*size) for name, size in linears.items()}
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        tensors |= {name: torch.ones(hidden, dtype=kind) for name in norms}
        write(f"block-{block:02}.safetensors", {f"model.layers.{block}.{n}": t for n, t in tensors.items()})
    total = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(total))


TRIALS: dict[str, dict[str, Any]] = {
    "subblock": {"recovery": "reconstruct", "granularity": "subblock", "learning_rate": 1.0e-5, "epochs": 1},
    "exact": {"recovery": "reconstruct", "granularity": "matrix", "optimizer": "exact"},
    "sparsegpt": {"recovery": "none", "criterion": "sparsegpt"},
}


def space_of(name: str, model: Path, kinds: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """A trial of each kind, one after another."""
    entry = {"dataset": "builtin:pystdlib", "split": "test", "sequence_length": options.tokens}
    return {
        "name": name,
        "model": {"path": str(model), "dtype": options.dtype},
        "calibration": {
            "dataset": "builtin:pystdlib",
            "num_samples": options.samples,
            "sequence_length": options.tokens,
        },
        "validation": {"samples": 8},
        "evaluation": {"perplexity": [entry | {"name": "test", "max_windows": 16}]},
        "sweep": [{"criterion": "wanda", "pattern": "2:4"} | TRIALS[kind] for kind in kinds],
        "execution": {
            "keep": "none",
            "shards": 1,
            "concurrent_trials": 1,
            "compile": options.compile,
            "boundaries": options.boundaries,
        },
    }


def run(folder: Path, space: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Launches a space; figures of every row, with the seconds and the peaks of the whole launch."""
    file = folder / f"{space['name']}.yaml"
    file.write_text(yaml.safe_dump(space))
    begin, storage = [sys.executable, "-m", "raysweep"], ["--storage", str(folder / "results")]
    if options.plan:
        subprocess.run([*begin, "plan", str(file), *storage], stdout=subprocess.DEVNULL, check=True)
    command = [*begin, "launch", str(file), *storage]
    command += ["--trace"] if options.trace else []
    command += ["--in-process"] if options.in_process else ["--address", "local"]
    began, at = time.monotonic(), time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, check=False
    )
    launch = {"launch_seconds": round(time.monotonic() - began, 1)}
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr, flush=True)
        return [launch | {"status": f"exit status {done.returncode}"}]
    import raysweep

    reality = json.loads((folder / "results" / space["name"] / "plan.json").read_text())
    for where in ("host", "device"):
        if reality[where] is not None:
            for kind in ("measured", "planned"):
                launch[f"{kind}_{where}_gib"] = round(reality[where][kind] / 2**30, 2)
    if reality["planned_seconds"] is not None:
        launch |= {"measured_s": reality["seconds"], "planned_s": reality["planned_seconds"]}
    if options.trace:
        launch |= phases(folder / "results" / space["name"] / "trace.json", at)
    rows = raysweep.load_results(folder / "results" / space["name"])
    names = ("criterion", "granularity", "optimizer", "status", "seconds_total", "seconds_mask")
    names += ("seconds_recovery", "seconds_evaluation", "output_error_calibration", "perplexity")
    return [
        launch | {name: row[name] for name in names if row[name] == row[name]}
        for row in rows.to_dict("records")
        if row["recovery"] != "dense"
    ]


def phases(trace: Path, began: float) -> dict[str, float]:
    """Seconds of a launch, which began then, until it read weights, and of what it did from there on."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    mine = [event for event in events if event["pid"] == events[0]["pid"]]  # of the launch
    found = {"before_loading_s": mine[0]["ts"] / 1e6 - began}
    for name in ("Loading", "Dense", "trials"):
        found[f"{name.lower()}_s"] = sum(event["dur"] for event in mine if event["cat"] == name) / 1e6
    return {name: round(seconds, 1) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for models and results; needs room for them")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", choices=TRIALS, default=["subblock"])
    parser.add_argument("--stores", nargs="+", choices=["resident", "host"], default=["resident", "host"])
    parser.add_argument("--compile", default="auto")
    parser.add_argument(
        "--boundaries", type=lambda text: int(text) if text.isdigit() else text, default="auto"
    )
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument(
        "--plan", action="store_true", help="plan before, so that the seconds are planned too"
    )
    parser.add_argument(
        "--trace", action="store_true", help="leave what the shard did when in the sweeps' folders"
    )
    options = parser.parse_args()
    for blocks in options.blocks:
        model = options.folder / f"{options.shape}-{blocks}"
        if not model.exists():
            make_model(model, options.shape, blocks, options.dtype)
        for store in options.stores:
            space = space_of(f"{model.name}-{store}", model, options.kinds, options)
            space["execution"] |= RESIDENT if store == "resident" else ON_HOST
            for found in run(options.folder, space, options):
                figure = {"shape": options.shape, "blocks": blocks, "store": store} | found
                print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
