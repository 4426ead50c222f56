"""What thousands of trials in one folder cost: to read them all, and to decide what a launch still has to run.

    python benchmarks/many_rows.py            5,000 trials, each with files of its own, and then put together by `clean`
    python benchmarks/many_rows.py --trials N
    python benchmarks/many_rows.py --report   the report of as many: the example study under more and more seeds

One trial of them is run; its rows stand for those of all others, under their identities. Prints one JSON line per
figure, in seconds; those of a launch begin when the libraries are loaded and end when it knows what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from raysweep.analysis.page.folder import write_report  # noqa: E402
from raysweep.analysis.report import make_report  # noqa: E402
from raysweep.config.space import SearchSpace  # noqa: E402
from raysweep.launching.launch import launch, prepare_launch  # noqa: E402
from raysweep.results.cleaning import clean  # noqa: E402
from raysweep.results.reader import load_results, load_units, trial_rows  # noqa: E402
from raysweep.results.writer import write_rows  # noqa: E402
from raysweep.sweep.prepare import prepare  # noqa: E402
from tests.browser import EXECUTABLE, browser  # noqa: E402

STUDY = ROOT / "analysis" / "study" / "results" / "study"

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


def many_seeds(trials: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and units of the example study, again and again with other seeds, identities and slightly other numbers."""
    rows, units = load_results(STUDY), load_units(STUDY)
    dense = rows["recovery"] == "dense"
    own, own_units = rows[~dense], units[units["trial_id"].isin(rows[~dense]["trial_id"])]
    times, seeds = -(-(trials - 1) // len(own)), int(own["calibration_seed"].max()) + 1
    noise = np.random.default_rng(0).normal(1.0, 1e-3, (times, len(own)))
    more, more_units = [rows[dense]], [units[~units["trial_id"].isin(own["trial_id"])]]
    for number in range(times):
        changed = {name: own[name] * noise[number] for name in ("perplexity", "validation_perplexity")}
        changed |= {name: own[name] + number * seeds for name in ("calibration_seed", "seed")}
        tag = f"{number:03x}"
        more.append(own.assign(trial_id=tag + own["trial_id"].str[3:], **changed))
        more_units.append(own_units.assign(trial_id=tag + own_units["trial_id"].str[3:]))
    return pd.concat(more, ignore_index=True)[:trials], pd.concat(more_units, ignore_index=True)


def time_report(trials: int) -> None:
    rows, units = many_seeds(trials)
    space = SearchSpace.from_yaml(STUDY / "space.yaml")
    making, made = seconds(lambda: make_report("many", rows, units, space))
    with tempfile.TemporaryDirectory() as folder:
        writing, (page, *_) = seconds(lambda: write_report(made, Path(folder)))
        figures = {"rows": len(rows), "units": len(units), "analysis": making, "page_and_figures": writing}
        figures |= {"whole": making + writing, "page_mib": page.stat().st_size / (1 << 20)}
        if EXECUTABLE is not None:
            with browser(Path(folder) / "profile") as opened:
                figures["opens_in"], _ = seconds(lambda: opened.open(page))
    found = {name: round(value, 2) for name, value in figures.items()}
    print(json.dumps({"figure": "report"} | found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--report", action="store_true", help="of the report alone")
    options = parser.parse_args()
    if options.report:
        time_report(options.trials)
        return
    with tempfile.TemporaryDirectory() as storage:
        whole, folder = fill(Path(storage), options.trials), Path(storage) / "many"
        report("files of their own", whole, folder)
        clean(folder)
        report("put together", whole, folder)


if __name__ == "__main__":
    main()
