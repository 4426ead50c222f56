"""What a sweep costs beyond its arithmetic: 48 trials through Ray and Tune beside the bare loops of the same trials.

    python benchmarks/economy.py            4 criteria x 3 sparsities x pruned only, matrix, subblock and block
    python benchmarks/economy.py --quick    the same on a few samples, to try the script

Prints one JSON line per figure. The ratios are taken in one run on one machine: bare loops, sweep, plain scripts,
launches and bare starts of Ray and Tune.
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
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

CORES = len(os.sched_getaffinity(0))
START_LIMIT_S = 300.0
SETTLING_S = 10.0  # after which a cluster that was just started has its agents and first processes
CRITERIA = ["magnitude", "wanda", "ria", "sparsegpt"]
SPARSITIES = [0.5, 0.6, 0.7]
GRANULARITIES = ["matrix", "subblock", "block"]
BUILTIN = "builtin:pystdlib"
BLOCKS = 6  # that it has: the most shards


def space_dict(quick: bool, criteria: list[str], sparsities: list[float]) -> dict[str, Any]:
    """Every criterion and sparsity, pruned only and recovered at each granularity."""
    masks = {"criterion": criteria, "sparsity": sparsities}
    windows = {"sequence_length": 128 if quick else 256, "max_windows": 8 if quick else 32}
    return {
        "name": "economy",
        "model": {"path": BUILTIN, "dtype": "float32"},
        "calibration": {"dataset": BUILTIN, "num_samples": 8 if quick else 32, "sequence_length": 128},
        "validation": {"samples": 2 if quick else 8},
        "evaluation": {"perplexity": [{"name": "pystdlib", "dataset": BUILTIN} | windows]},
        "sweep": [
            {"recovery": "none"} | masks,
            {"recovery": "reconstruct", "granularity": GRANULARITIES, "learning_rate": 1.0e-3} | masks,
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
        (phase,) = model.phases
        dense, *others = phase.trials
        texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
        ready.wait(START_LIMIT_S)  # raises where another process ended before it came here
        start = time.perf_counter()
        set_up(group, plan.ranges, texts, GRANULARITIES, model.shape)
        run_trial(group, dense.trial, dense.trial_id, dense.number)
        once = time.perf_counter() - start
        for trial in others:
            run_trial(group, trial.trial, trial.trial_id, trial.number)
        seconds.put((once, time.perf_counter() - start - once))


def time_bare_loops(quick: bool) -> float:
    """Seconds of all trials spread evenly over the cores, timed in a process a core, all at the same time.

    What a sweep does once, the dense pass and the dense trial, counts once, as the mean of those processes.
    """
    context = multiprocessing.get_context("spawn")
    shares = [CRITERIA[core::CORES] for core in range(min(CORES, len(CRITERIA)))]
    ready, seconds = context.Barrier(len(shares)), context.Queue()
    processes = [
        context.Process(target=bare_loops, args=(space_dict(quick, share, SPARSITIES), ready, seconds))
        for share in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("the bare loops failed")
    found = [seconds.get() for _ in processes]
    return (sum(once for once, _ in found) / len(found) + sum(trials for _, trials in found)) / CORES


def plain_script(data: dict[str, Any], spared: Any) -> None:
    """One trial and nothing else, on all cores. Puts into `spared` the seconds of what such a script would not do: the
    evaluations of the dense and of the only pruned model that a row of ours has beside its own."""
    from raysweep.config.space import SearchSpace
    from raysweep.launching.runners import this_node
    from raysweep.shards.local import LocalGroup
    from raysweep.shards.plan import make_plan
    from raysweep.shards.setup import set_up, shard_specs
    from raysweep.shards.trial import only_pruned, run_trial
    from raysweep.sweep.planning import workload
    from raysweep.sweep.prepare import prepare

    model = prepare(SearchSpace.from_dict(data), "cpu")[0]
    plan = make_plan(model.shape, [this_node()], workload(model), model.dtype, shards=1, threads=CORES)
    (phase,) = model.phases
    dense, *others = phase.trials
    (own,) = [trial for trial in others if len(others) == 1 or not trial.trial.is_pruned_only]
    with LocalGroup(shard_specs(plan, model.source)) as group:
        texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
        granularities = [own.trial.granularity] if own.trial.granularity else []
        set_up(group, plan.ranges, texts, granularities, model.shape)
        start = time.perf_counter()
        run_trial(group, dense.trial, dense.trial_id, 0)
        beside = time.perf_counter() - start
        if not own.trial.is_pruned_only:
            start = time.perf_counter()
            pruned = run_trial(group, only_pruned(own.trial), "pruned", 1)
            beside += time.perf_counter() - start - pruned.columns["seconds_mask"]
        run_trial(group, own.trial, own.trial_id, 2)
    spared.put(beside)


def time_plain_script(quick: bool, granularity: str | None) -> float:
    """Seconds of a process from its start to its end, for Wanda at 60 %."""
    data = space_dict(quick, ["wanda"], [0.6])
    data["sweep"] = [data["sweep"][granularity is not None]]
    if granularity is not None:
        data["sweep"][0]["granularity"] = granularity
    context = multiprocessing.get_context("spawn")
    spared = context.Queue()
    start = time.perf_counter()
    process = context.Process(target=plain_script, args=(data, spared))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("a plain script failed")
    return time.perf_counter() - start - spared.get()


class Clock:
    """A display that shows nothing and notes when the group was ready and when the last row came."""

    def __init__(self) -> None:
        self.ready, self.last = 0.0, 0.0
        self.rows: list[float] = []

    def stage(self, text: str) -> None:
        if text.startswith("Dense pass") and not self.ready:
            self.ready = time.perf_counter()

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        """Nothing."""

    def row(self, row: dict[str, Any]) -> None:
        self.last = time.perf_counter()
        self.rows.append(self.last)

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


def time_sweep(quick: bool) -> dict[str, Any]:
    """The same trials through Ray and Tune: seconds from the group being ready to the last row."""
    from raysweep.config.space import SearchSpace
    from raysweep.launching.launch import launch

    space = SearchSpace.from_dict(space_dict(quick, CRITERIA, SPARSITIES))
    clock, busy = Clock(), list[bool]()
    with tempfile.TemporaryDirectory() as storage, core_use(busy):
        rows = launch(space, storage=storage, address="local", progress=clock)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    kinds = rows.granularity.fillna("none")[rows.recovery != "dense"]
    return {
        "trials": len(kinds),
        "seconds": clock.last - clock.ready,
        "busy_seconds": float(rows.device_seconds.sum()),
        "busy_by_kind": rows.device_seconds.groupby(kinds).mean().to_dict(),
        "every_core_busy": sum(busy) / max(1, len(busy)),
    }


def overhead_of_small_trials() -> float:
    """Seconds from row to row beyond what shards compute, for 48 trials with next to nothing to compute."""
    from raysweep.config.space import SearchSpace
    from raysweep.launching.launch import launch

    space = space_dict(True, ["magnitude"], [round(0.2 + 0.01 * k, 2) for k in range(48)])
    space["calibration"] |= {"num_samples": 2, "sequence_length": 16}
    space["validation"] = {"samples": 1}
    space["evaluation"]["perplexity"][0] |= {"sequence_length": 16, "max_windows": 1}
    space["sweep"] = space["sweep"][:1]
    clock = Clock()
    with tempfile.TemporaryDirectory() as storage:
        rows = launch(SearchSpace.from_dict(space), storage=storage, address="local", progress=clock)
    per_trial = float(rows.device_seconds[rows.recovery != "dense"].mean()) / CORES
    begin = len(clock.rows) // 4  # by then every process of a trial has started
    return (clock.rows[-1] - clock.rows[begin]) / (len(clock.rows) - 1 - begin) - per_trial


class Starts(NamedTuple):
    """Seconds until the first trial, by turns; each but the first of a model that this machine has read before."""

    first: float  # of a model never read
    own: list[float]  # where the launch starts a cluster of its own
    joined: list[float]  # where it joins one that runs on this machine
    bare: list[float]  # Ray and Tune alone, started


def starts(number: int) -> Starts:
    own, joined, bare = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as cache:
        first = seconds_to_first_trial(cache)
        for _ in range(number):
            bare.append(time_bare_start())
            own.append(seconds_to_first_trial(cache))
            with running_cluster() as address:
                joined.append(seconds_to_first_trial(cache, address))
    return Starts(first, own, joined, bare)


@contextmanager
def running_cluster() -> Iterator[str]:
    """The address of a cluster on this machine, of which no other launch knows, for the length of the context."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": True})
    try:
        time.sleep(SETTLING_S)
        yield cluster.address
    finally:
        cluster.shutdown()


def bare_start(began: Any, shards: int, at_once: int) -> None:
    """Ray and Tune as any script would start them, with as many actors that import what models need, and as many trials
    at once, as a launch has. Puts the time at which the first one begins, in seconds since 1970."""
    import ray
    from ray import tune

    class Bare:
        def ready(self) -> None:
            import torch  # noqa: F401
            from transformers import LlamaForCausalLM  # noqa: F401

    def trial(config: dict[str, Any]) -> None:
        tune.report({"began": time.time()})

    ray.init(address="local", log_to_driver=False, logging_level="WARNING")
    actor_class: Any = ray.remote(num_cpus=0.9)(Bare)
    actors = [actor_class.remote() for _ in range(shards)]
    ray.get([actor.ready.remote() for actor in actors])
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 0.01}),
            tune_config=tune.TuneConfig(num_samples=at_once, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        )
        results = tuner.fit()
    began.put(min(result.metrics["began"] for result in results))
    ray.shutdown()


def time_bare_start() -> float:
    """Seconds from the start of a process to the first of `bare_start`'s trials."""
    from raysweep.shards.plan import TRIALS_IN_FLIGHT

    context = multiprocessing.get_context("spawn")
    began = context.Queue()
    start = time.time()
    process = context.Process(target=bare_start, args=(began, min(CORES, BLOCKS), TRIALS_IN_FLIGHT))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the bare start failed")
    return float(began.get()) - start


def seconds_to_first_trial(cache: str, address: str = "local") -> float:
    """From the typed command to the first trial at work in its process, which its row tells afterwards.

    cache: folder of what this machine knows
    address: of the cluster to join; `local` for one of the launch's own
    """
    from raysweep.results.reader import trial_rows

    with tempfile.TemporaryDirectory() as storage:
        command = ["launch", "quickstart", "--storage", storage, "--address", address]
        begin, deadline = datetime.now(UTC), time.monotonic() + START_LIMIT_S
        launched = subprocess.Popen(
            [sys.executable, "-m", "raysweep", *command],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"RAYSWEEP_CACHE": cache},
        )
        try:
            while not (rows := trial_rows(Path(storage) / "quickstart")):
                if launched.poll() is not None or time.monotonic() > deadline:
                    sys.exit("no trial of the quickstart came to an end")
                time.sleep(0.5)
        finally:
            launched.terminate()
            launched.wait()
    return min((row["started_at"] - begin).total_seconds() for row in rows.values())


def _rounded(seconds: list[float]) -> list[float]:
    return sorted(round(value, 1) for value in seconds)


def report(figure: str, value: float, **more: Any) -> None:
    print(json.dumps({"figure": figure, "value": round(value, 3)} | more), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, to try the script")
    quick = parser.parse_args().quick
    before = time_bare_loops(quick)
    sweep = time_sweep(quick)
    after = time_bare_loops(quick)  # a machine that others use as well is now faster, now slower
    seconds, bare = sweep["seconds"], (before + after) / 2
    around = {"bare_before_s": round(before, 1), "bare_after_s": round(after, 1)}
    report("sweep over bare loops", seconds / bare, **around, sweep_s=round(seconds, 1))
    report("seconds per trial beyond bare loops", (seconds - bare) / sweep["trials"], trials=sweep["trials"])
    report("overhead per trial in seconds, where little is to compute", overhead_of_small_trials())
    started = starts(1 if quick else 5)
    figure = "seconds from launch to the first trial"
    report(
        figure, median(started.own), all=_rounded(started.own), of_a_model_never_read=round(started.first, 1)
    )
    report(f"{figure}, on a local cluster that runs", median(started.joined), all=_rounded(started.joined))
    ratios = [ours / theirs for ours, theirs in zip(started.own, started.bare, strict=True)]
    report(
        "launch to first trial over a bare start of Ray and Tune",
        median(ratios),
        bare_s=_rounded(started.bare),
    )
    report("busy share of the shards", sweep["busy_seconds"] / (seconds * CORES))
    report("share of the launch with every core busy", sweep["every_core_busy"])
    for kind, busy in sweep["busy_by_kind"].items():
        plain = time_plain_script(quick, None if kind == "none" else kind)
        in_sweep = busy * seconds / sweep["busy_seconds"]  # its share of the sweep's time on the clock
        report(
            f"plain script over the sweep, {kind}",
            plain / in_sweep,
            plain_s=round(plain, 1),
            sweep_s=round(in_sweep, 2),
        )


if __name__ == "__main__":
    main()
