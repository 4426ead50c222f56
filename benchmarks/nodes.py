"""What it costs that shards lie on several nodes: the same sweep on one node with two cores and on two with one each.

    python benchmarks/nodes.py

Both are Ray nodes on this machine, each with an object store of its own, so that activations pass from store to store
over the loopback; a network between hosts comes on top. Prints one JSON line per figure: the sweep by parts on both,
what a trial costs where little is to compute, and how fast a batch of hidden states gets from shard to shard.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from raysweep.shards.wire import from_wire, to_wire

BUILTIN = "builtin:pystdlib"
LAYOUTS = {"one node": (2,), "two nodes": (1, 1)}  # cores of each node
STORE_BYTES = 1 << 30
LITTLE_TRIALS = 24
BATCHES = {  # hidden states of a batch: (samples, tokens, hidden size), of which model
    "embedded model": ((8, 128, 192), torch.float32),
    "Llama 3.1 8B": ((1, 2048, 4096), torch.bfloat16),
}
PASSES = 20


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


@contextmanager
def nodes(cores: Sequence[int]) -> Iterator[str]:
    """Ray nodes with so many cores each; yields the address of the first one."""
    cluster = Cluster()
    try:
        for count in cores:
            cluster.add_node(num_cpus=count, object_store_memory=STORE_BYTES, include_dashboard=False)
        yield cluster.address
    finally:
        cluster.shutdown()


def space_of(name: str, samples: int, windows: int, sweep: list[dict[str, Any]]) -> SearchSpace:
    entry = {
        "name": "test",
        "dataset": BUILTIN,
        "split": "test",
        "sequence_length": 128,
        "max_windows": windows,
    }
    return SearchSpace.from_dict(
        {
            "name": name,
            "model": {"path": BUILTIN},
            "calibration": {"dataset": BUILTIN, "num_samples": samples, "sequence_length": 128},
            "validation": {"samples": 0},
            "evaluation": {"perplexity": [entry]},
            "search": {"metric": "output_error_calibration"},
            "execution": {"shards": 2},
            "sweep": sweep,
        }
    )


SWEEP = space_of(
    "sweep",
    samples=32,
    windows=64,
    sweep=[
        {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": [0.5, 0.6]},
        {
            "recovery": "reconstruct",
            "criterion": ["magnitude", "wanda"],
            "sparsity": 0.6,
            "granularity": ["subblock", "block"],
            "learning_rate": [1e-3, 2e-3],
        },
    ],
)
LITTLE = space_of(
    "little",
    samples=1,
    windows=1,
    sweep=[
        {
            "recovery": "none",
            "criterion": "magnitude",
            "sparsity": [round(0.2 + 0.02 * number, 2) for number in range(LITTLE_TRIALS)],
        }
    ],
)


def seconds_of(space: SearchSpace, storage: Path, address: str) -> dict[str, float]:
    """Seconds of a launch by parts, as its trace has them; of the trials those from the first one's first call on."""
    rows = launch(space, storage=storage, address=address, trace=True)
    assert set(rows.status) == {"finished"}, rows.error.dropna().tolist()
    events = json.loads((storage / space.name / "trace.json").read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] == "X"]

    def spent(chosen: list[dict[str, Any]]) -> float:
        return (max(e["ts"] + e["dur"] for e in chosen) - min(e["ts"] for e in chosen)) / 1e6

    return {
        "dense_pass": spent([call for call in calls if call["name"].startswith("dense calibration")]),
        "trials": spent([call for call in calls if "trial" in call["args"]]),
        "busy": sum(call["dur"] for call in calls if "trial" in call["args"]) / 1e6,
    }


@ray.remote(num_cpus=0.5)
class End:
    """One end of the way: as a shard does, hidden states become an array, and a tensor again at the other end."""

    def leave(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return to_wire(torch.zeros(shape, dtype=dtype))

    def arrive(self, hidden: Any, dtype: torch.dtype) -> int:
        return from_wire(hidden, dtype).numel()


def seconds_to_pass(address: str, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Median seconds from the call that makes a batch to the end of the one that takes it, on other nodes if there are
    any; less what the same takes when nothing but a number passes."""
    ray.init(address=address, log_to_driver=False)
    try:
        places = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        ends = [
            End.options(scheduling_strategy=NodeAffinitySchedulingStrategy(place, soft=False)).remote()
            for place in (places[0], places[-1])
        ]

        def passed(size: tuple[int, ...]) -> float:
            begin = time.perf_counter()
            ray.get(ends[1].arrive.remote(ends[0].leave.remote(size, dtype), dtype))
            return time.perf_counter() - begin

        passed(shape)
        whole, least = ([passed(size) for _ in range(PASSES)] for size in (shape, (1,)))
        return statistics.median(whole) - statistics.median(least)
    finally:
        ray.shutdown()


def main() -> None:
    sweeps: dict[str, dict[str, float]] = {}
    little: dict[str, float] = {}
    passes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout, cores in LAYOUTS.items():
            storage = Path(folder, layout)
            with nodes(cores) as address:
                sweeps[layout] = seconds_of(SWEEP, storage, address)
                little[layout] = seconds_of(LITTLE, storage, address)["trials"] / (LITTLE_TRIALS + 1)
                passes[layout] = {model: seconds_to_pass(address, *batch) for model, batch in BATCHES.items()}
            report(layout, **{f"{part}_s": round(value, 2) for part, value in sweeps[layout].items()})
    one, two = LAYOUTS
    for part in ("dense_pass", "trials"):
        report(f"two nodes against one, {part}", ratio=round(sweeps[two][part] / sweeps[one][part], 3))
    report("seconds a trial with little to compute", **{each: round(little[each], 3) for each in LAYOUTS})
    for model, (shape, dtype) in BATCHES.items():
        mib = torch.empty(shape, dtype=dtype, device="meta").nbytes / 2**20
        report(
            f"a batch from shard to shard, {model}",
            mib=round(mib, 2),
            **{each: round(1e3 * passes[each][model], 2) for each in LAYOUTS},
            unit="ms",
        )


if __name__ == "__main__":
    main()
