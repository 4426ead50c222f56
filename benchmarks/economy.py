"""What a sweep costs beyond its arithmetic: wall-clock against the bare loops of the same trials on all cores.

    python benchmarks/economy.py            16 trials at quickstart size, one calibration set, then three
    python benchmarks/economy.py --quick    the same on a few samples, to try the script

Prints one JSON line per figure. The ratios are taken in one run on one machine: bare loops, then the sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
START_LIMIT_S = 300.0
SPARSITIES = [0.4, 0.5, 0.6, 0.7]
QUICK = {
    "calibration": {"num_samples": 8, "sequence_length": 128},
    "validation": {"samples": 2},
    "max_windows": 8,
}


def space_dict(quick: bool, criteria: list[str], sparsities: list[float], seeds: list[int]) -> dict[str, Any]:
    """Pruned-only and subblock trials of every criterion and sparsity, at the size of the quickstart."""
    masks = {"criterion": criteria, "sparsity": sparsities}
    length = QUICK["calibration"]["sequence_length"] if quick else 256
    windows = {"sequence_length": length, "max_windows": QUICK["max_windows"] if quick else 64}
    return {
        "name": "economy",
        "model": {"path": "builtin:pystdlib", "dtype": "float32"},
        "calibration": {"dataset": "builtin:pystdlib", "seed": seeds}
        | (QUICK["calibration"] if quick else {}),
        "validation": QUICK["validation"] if quick else {},
        "evaluation": {"perplexity": [{"name": "pystdlib", "dataset": "builtin:pystdlib"} | windows]},
        "sweep": [
            {"recovery": "none"} | masks,
            {"recovery": "reconstruct", "granularity": "subblock", "learning_rate": 1.0e-3} | masks,
        ],
    }


def bare_loops(data: dict[str, Any], ready: Any, seconds: Any) -> None:
    """One process with one thread: the trials' own loops, nothing around them. Puts its seconds into `seconds`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from raysweep.config.space import SearchSpace
    from raysweep.launching.runners import this_node
    from raysweep.shards.local import LocalGroup
    from raysweep.shards.plan import make_plan
    from raysweep.shards.setup import set_up, shard_specs
    from raysweep.shards.trial import run_trial
    from raysweep.sweep.planning import workload
    from raysweep.sweep.prepare import prepare

    model = prepare(SearchSpace.from_dict(data), "cpu")[0]
    plan = make_plan(model.shape, [this_node()], workload(model), model.dtype, shards=1)
    with LocalGroup(shard_specs(plan, model.source)) as group:
        ready.wait(START_LIMIT_S)  # raises where another process ended before it came here
        start = time.perf_counter()
        for phase in model.phases:
            texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
            set_up(group, plan.ranges, texts, ["subblock"], model.shape)
            for trial in phase.trials:
                run_trial(group, trial.trial, trial.trial_id, trial.number)
        seconds.put(time.perf_counter() - start)


def time_bare_loops(quick: bool, seeds: list[int]) -> float:
    """Seconds of the slowest of one process per core, each with its share of the masks, all at the same time."""
    context = multiprocessing.get_context("spawn")
    shares = [SPARSITIES[core::CORES] for core in range(CORES)]
    ready, seconds = context.Barrier(CORES), context.Queue()
    processes = [
        context.Process(
            target=bare_loops, args=(space_dict(quick, ["magnitude", "wanda"], share, seeds), ready, seconds)
        )
        for share in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("the bare loops failed")
    return max(seconds.get() for _ in processes)


class Clock:
    """A display that shows nothing and notes when the group was ready and when the last row came."""

    def __init__(self) -> None:
        self.ready, self.last = 0.0, 0.0

    def stage(self, text: str) -> None:
        if text.startswith("Dense pass") and not self.ready:
            self.ready = time.perf_counter()

    def begin(self, planned: int, finished: int, dashboard: str | None, others: int) -> None:
        """Nothing: the dense pass is part of the cost."""

    def row(self, row: dict[str, Any]) -> None:
        self.last = time.perf_counter()

    def end(self) -> None:
        """Nothing."""


@contextmanager
def core_use(samples: list[bool], interval_s: float = 0.2) -> Iterator[None]:
    """Notes, five times a second, whether every core was busy for at least nine tenths of the time."""
    stop = threading.Event()

    def watch() -> None:
        before = _core_times()
        while not stop.wait(interval_s):
            after = _core_times()
            shares = [(i1 - i0) / max(1, t1 - t0) for (i0, t0), (i1, t1) in zip(before, after, strict=True)]
            samples.append(max(shares) < 0.1)
            before = after

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _core_times() -> list[tuple[int, int]]:
    """(idle, total) ticks of every core that this process may use."""
    allowed = os.sched_getaffinity(0)
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line[:3] == "cpu"]
    cores = {
        int(fields[0][3:]): [int(field) for field in fields[1:]] for fields in lines if fields[0] != "cpu"
    }
    return [(ticks[3] + ticks[4], sum(ticks)) for core, ticks in cores.items() if core in allowed]


def time_sweep(quick: bool, seeds: list[int]) -> dict[str, float]:
    """The same trials through Ray and Tune: seconds from the group being ready to the last row."""
    from raysweep.config.space import SearchSpace
    from raysweep.launching.launch import launch

    space = SearchSpace.from_dict(space_dict(quick, ["magnitude", "wanda"], SPARSITIES, seeds))
    clock, busy = Clock(), list[bool]()
    with tempfile.TemporaryDirectory() as storage, core_use(busy):
        rows = launch(space, storage=storage, address="local", progress=clock)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    return {
        "trials": len(rows) - 1,
        "seconds": clock.last - clock.ready,
        "busy_seconds": float(rows.device_seconds.sum()),
        "every_core_busy": sum(busy) / max(1, len(busy)),
    }


def time_single_launch(quick: bool, group: int) -> float:
    """Seconds of one command that runs one trial: group 0 is pruned only, 1 is subblock."""
    data = space_dict(quick, ["wanda"], [0.6], [0])
    data["sweep"] = [data["sweep"][group]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "single.yaml"
        file.write_text(json.dumps(data))  # JSON is YAML
        command = [
            sys.executable,
            "-m",
            "raysweep",
            "launch",
            str(file),
            "--storage",
            folder,
            "--address",
            "local",
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start


def report(figure: str, value: float, **more: Any) -> None:
    print(json.dumps({"figure": figure, "value": round(value, 3)} | more), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, to try the script")
    parser.add_argument("--one", action="store_true", help="one calibration set only, and no single launches")
    options = parser.parse_args()
    for seeds in ([0],) if options.one else ([0], [0, 1, 2]):
        bare = time_bare_loops(options.quick, seeds)
        sweep = time_sweep(options.quick, seeds)
        suffix = f"{len(seeds)} calibration set{'s' * (len(seeds) > 1)}"
        report(
            f"sweep over bare loops, {suffix}",
            sweep["seconds"] / bare,
            bare_s=round(bare, 1),
            sweep_s=round(sweep["seconds"], 1),
        )
        overhead = (sweep["seconds"] - bare) / sweep["trials"]
        report(f"overhead per trial in seconds, {suffix}", overhead, trials=sweep["trials"])
        report(f"busy share of the shards, {suffix}", sweep["busy_seconds"] / (sweep["seconds"] * CORES))
        report(f"share of the launch with every core busy, {suffix}", sweep["every_core_busy"])
        if len(seeds) == 1 and not options.one:
            singles = 8 * (time_single_launch(options.quick, 0) + time_single_launch(options.quick, 1))
            report(
                "16 single launches over the sweep", singles / sweep["seconds"], singles_s=round(singles, 1)
            )


if __name__ == "__main__":
    main()
