"""Ends processes of a sweep at random and checks that nothing is lost: drivers, raylets, shards, retraining workers.

    python benchmarks/kills.py                      100 kills: 40 drivers, 20 raylets, 30 shards, 10 retraining workers
    python benchmarks/kills.py --kills 10 --seed 3  fewer, in the same proportions

The sweep of `kills.yaml` runs undisturbed first. Then it is launched again and again into another storage, a process of
it is killed some seconds later, and so on; when it is finished before the kills are, it begins anew. In the end every
trial has one finished row with bitwise the numbers of the undisturbed run, and no more was computed again than shards
had in hand: on average a unit or a batch of each at most. Prints one JSON line per figure: kills by kind, seconds from
a kill to the next progress, units (optimiser steps) and evaluation batches (tokens) that were computed again.
Needs Linux, and ends only what it has started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

HERE = Path(__file__).resolve().parent
SHARES = {"driver": 0.4, "raylet": 0.2, "shard": 0.3, "retraining worker": 0.1}
MARKS = {"raylet": "raylet/raylet", "retraining worker": "ray::RayTrainWorker"}
LAUNCH_LIMIT_S, PATIENCE_S = 600.0, 25.0
MOST_LAUNCHES = 100
SHARDS = 2
NOT_FOUND_S = 90.0  # for a kind of process to turn up; then another kind is killed


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


class Sweep:
    """Launches of one sweep into one storage, each a process of its own."""

    def __init__(self, space: Path, storage: Path) -> None:
        self.space, self.storage = space, storage
        self.journal = storage / "journal.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.launches = 0
        storage.mkdir(parents=True, exist_ok=True)

    @property
    def folder(self) -> Path:
        return self.storage / "kills"

    def start(self) -> None:
        paths = [str(HERE / "journal"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "RAYSWEEP_JOURNAL": str(self.journal),
        }
        command = [sys.executable, "-m", "raysweep", "launch", str(self.space), "--address", "local"]
        command += ["--name", "kills", "--storage", str(self.storage), "--json"]
        self.launches += 1
        with open(self.storage / f"launch-{self.launches}.txt", "wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=output, start_new_session=True
            )

    def status(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(LAUNCH_LIMIT_S)

    def lines(self) -> list[list[str]]:
        """kind, trial, unit or batch, number, process"""
        if not self.journal.exists():
            return []
        return [line.split(" ") for line in self.journal.read_text().splitlines()]

    def rows(self) -> int:
        return len(list((self.folder / "trials").glob("*.parquet")))

    def find(self, kind: str) -> list[psutil.Process]:
        """Living processes of that kind that belong to the launch that runs."""
        if self.process is None or not psutil.pid_exists(self.process.pid):
            return []
        driver = psutil.Process(self.process.pid)
        if kind == "driver":
            return [driver]
        shards = {line[-1] for line in self.lines() if line[0] == "shard"}  # their titles say what they do
        found = []
        for each in driver.children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(each.cmdline())
                if str(each.pid) in shards if kind == "shard" else MARKS[kind] in title:
                    found.append(each)
        return found

    def end(self) -> None:
        """Whatever comes in between, nothing of it runs on."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(LAUNCH_LIMIT_S)


def numbers(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and units without cost and provenance, in a fixed order."""
    from raysweep.results.reader import load_results, load_units
    from raysweep.results.schema import NOT_NUMBERS

    trials, units = load_results(folder), load_units(folder)
    assert (trials.status == "finished").all(), trials.error.dropna().tolist()
    assert trials.trial_id.is_unique
    kept = [frame.drop(columns=list(NOT_NUMBERS), errors="ignore") for frame in (trials, units)]
    return (
        kept[0].sort_values("trial_id", ignore_index=True),
        kept[1].sort_values(["trial_id", "kind", "unit"], ignore_index=True),
    )


def kinds(kills: int, chance: random.Random) -> list[str]:
    """So many kinds of processes in a random order, in the proportions of SHARES."""
    chosen = [kind for kind, share in SHARES.items() for _ in range(round(share * kills))]
    chosen += ["driver"] * (kills - len(chosen))
    chance.shuffle(chosen)
    return chosen[:kills]


def kill(sweep: Sweep, kind: str, chance: random.Random) -> list[psutil.Process] | None:
    """Waits a while, then kills a process of that kind as soon as there is one; returns the shards that there were
    before, None where it could not."""
    time.sleep(chance.uniform(1.0, PATIENCE_S))
    deadline = time.monotonic() + NOT_FOUND_S
    while sweep.status() is None and time.monotonic() < deadline:
        shards = sweep.find("shard")
        if found := sweep.find(kind):
            with suppress(psutil.NoSuchProcess):
                chance.choice(sorted(found, key=lambda process: process.pid)).kill()
                return shards
        time.sleep(0.1)
    return None


def seconds_to_progress(sweep: Sweep, shards: list[psutil.Process]) -> float:
    """From now until a new shard begins a unit or takes a batch, in this launch or, where that has ended, in the next.

    shards: that lived before the kill; those of a dead driver go on for a moment
    """
    begin, known = time.monotonic(), len(sweep.lines())
    old = {str(shard.pid) for shard in shards}
    while (
        all(line[-1] in old or line[0] == "shard" for line in sweep.lines()[known:]) and sweep.status() != 0
    ):
        if time.monotonic() - begin > LAUNCH_LIMIT_S:
            sys.exit("the sweep does not go on")
        if sweep.status() is not None:
            sweep.start()
        time.sleep(0.1)
    return time.monotonic() - begin


def computed_again(lines: list[list[str]], what: str) -> tuple[int, int, int]:
    """Units or batches that were begun again; what that was in steps or tokens, had each come to its end; and how many
    of them had come to it before."""
    begun = Counter((trial, name) for kind, trial, name, *_ in lines if kind == f"begin-{what}")
    ended = [((trial, name), int(number)) for kind, trial, name, number, _ in lines if kind == f"end-{what}"]
    size, times = dict(ended), Counter(each for each, _ in ended)
    again = {each: times_begun - 1 for each, times_begun in begun.items() if times_begun > 1}
    finished_again = sum(number - 1 for number in times.values())
    return (
        sum(again.values()),
        sum(size.get(each, 0) * number for each, number in again.items()),
        finished_again,
    )


def disturbed(sweep: Sweep, waiting: list[str], chance: random.Random, waits: dict[str, list[float]]) -> None:
    """Launches the sweep until it is finished, and kills what `waiting` names meanwhile, which it takes from there."""
    sweep.start()
    while waiting and sweep.status() is None:
        kind = waiting[0]
        shards = kill(sweep, kind, chance)
        if shards is not None:
            waiting.pop(0)
            seconds = seconds_to_progress(sweep, shards)
            waits.setdefault(kind, []).append(seconds)
            number = sum(map(len, waits.values()))
            report("kill", kind=kind, number=number, progress_s=round(seconds, 1), rows=sweep.rows())
        elif sweep.status() is None:
            chance.shuffle(waiting)  # no process of that kind is coming
    while (status := sweep.wait()) != 0:
        if status == 2 or sweep.launches > MOST_LAUNCHES:
            sys.exit((sweep.storage / f"launch-{sweep.launches}.txt").read_text())
        sweep.start()


def check(sweep: Sweep, expected: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """That a finished sweep has the numbers of the undisturbed one, and has left nothing behind."""
    for found, wanted in zip(numbers(sweep.folder), expected, strict=True):
        pd.testing.assert_frame_equal(found, wanted, check_exact=True)
    left = [path.name for path in sweep.folder.iterdir() if path.name in ("unfinished", "retraining")]
    left += [path.name for path in sweep.folder.rglob("*.tmp")]
    left += [path.name for path in sweep.folder.glob("*.lock")]
    if left:
        sys.exit(f"left behind: {left}")


def report_round(sweep: Sweep, number: int, kills: int) -> None:
    """Says what a finished sweep had computed again, and ends the script where that was more than was in hand."""
    lines = sweep.lines()
    units, steps, finished_units = computed_again(lines, "unit")
    batches, tokens, finished_batches = computed_again(lines, "batch")
    report(
        f"round {number}: all rows there, numbers bitwise equal",
        kills=kills,
        launches=sweep.launches,
        units_again=units,
        steps_again=steps,
        finished_units_again=finished_units,
        batches_again=batches,
        tokens_again=tokens,
        finished_batches_again=finished_batches,
    )
    if max(units, batches) > SHARDS * kills:
        sys.exit(f"{kills} kills cost {units} units and {batches} batches, with {SHARDS} shards")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", type=Path, default=HERE / "kills.yaml")
    parser.add_argument("--storage", type=Path, help="keep all that is written in this folder")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    sweeps: list[Sweep] = []
    with tempfile.TemporaryDirectory() as temporary:
        storage = options.storage or Path(temporary)
        try:
            sweeps.append(Sweep(options.space, storage / "undisturbed"))
            begin = time.monotonic()
            sweeps[0].start()
            if sweeps[0].wait() != 0:
                sys.exit((sweeps[0].storage / "launch-1.txt").read_text())
            expected = numbers(sweeps[0].folder)
            report("undisturbed", seconds=round(time.monotonic() - begin, 1), rows=sweeps[0].rows())
            waiting, waits = kinds(options.kills, chance), dict[str, list[float]]()
            while waiting:
                before = sum(map(len, waits.values()))
                sweeps.append(Sweep(options.space, storage / f"round-{len(sweeps)}"))
                disturbed(sweeps[-1], waiting, chance, waits)
                check(sweeps[-1], expected)
                kills = sum(map(len, waits.values())) - before
                report_round(sweeps[-1], len(sweeps) - 1, kills)
            medians = {kind: round(sorted(found)[len(found) // 2], 1) for kind, found in waits.items()}
            report("kills", **{kind: len(found) for kind, found in waits.items()}, median_progress_s=medians)
        finally:
            for sweep in sweeps:
                sweep.end()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
