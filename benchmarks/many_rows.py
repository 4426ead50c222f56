"""What thousands of trials in one folder cost: to read them all, and to decide what a launch still has to run.

    python benchmarks/many_rows.py            5,000 trials, each with files of its own, and then put together by `clean`
    python benchmarks/many_rows.py --trials N

One trial of them is run; its rows stand for those of all others, under their identities. Prints one JSON line per
figure, in seconds; those of a launch begin when the libraries are loaded and end when it knows what is missing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch, prepare_launch
from raysweep.results.cleaning import clean
from raysweep.results.reader import load_results, trial_rows
from raysweep.results.writer import write_rows
from raysweep.sweep.prepare import prepare

BUILTIN = "builtin:pystdlib"


def space(sparsities: list[float]) -> SearchSpace:
    texts: dict[str, Any] = {"dataset": BUILTIN, "sequence_length": 32}
    return SearchSpace.from_dict(
        {
            "name": "many",
            "model": {"path": BUILTIN, "dtype": "float32"},
            "calibration": texts | {"num_samples": 2},
            "validation": {"samples": 1},
            "evaluation": {"perplexity": [{"name": "pystdlib", "max_windows": 1} | texts]},
            "sweep": [{"recovery": "none", "criterion": "magnitude", "sparsity": sparsities}],
        }
    )


def fill(storage: Path, trials: int) -> SearchSpace:
    """A folder in which all trials but one are finished; returns the space with that one."""
    sparsities = [round(0.1 + 0.8 * number / trials, 6) for number in range(trials)]
    launch(space(sparsities[:1]), storage=storage, in_process=True)
    folder, whole = storage / "many", space(sparsities)
    row = next(row for row in trial_rows(folder).values() if row["recovery"] == "none")
    for trial in prepare(whole, "cpu")[0].trials[2:]:
        renamed = row | {"trial_id": trial.trial_id, "recovery_id": trial.recovery_id}
        write_rows(folder, renamed, [], [BUILTIN.partition(":")[2]])
    (folder / "trials" / f"{row['trial_id']}.parquet").unlink()
    return whole


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def report(what: str, whole: SearchSpace, folder: Path) -> None:
    reading, rows = seconds(lambda: load_results(folder))
    deciding, left = seconds(lambda: prepare_launch(whole, folder, "cpu").to_run)
    assert left == 1, left
    figures = {"rows": len(rows), "load_results": round(reading, 2), "launch_decides": round(deciding, 2)}
    print(json.dumps({"figure": what} | figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    with tempfile.TemporaryDirectory() as storage:
        whole, folder = fill(Path(storage), parser.parse_args().trials), Path(storage) / "many"
        report("files of their own", whole, folder)
        clean(folder)
        report("put together", whole, folder)


if __name__ == "__main__":
    main()
