"""`analysis/first_look.py` against numbers worked out by hand, and run as its users run it: without torch or Ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from raysweep.results.reader import load_results, load_units
from raysweep.results.writer import write_rows
from tests.analysis.rows import failed, row

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "analysis" / "first_look.py"
RUN = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
assert not {"torch", "ray"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def first_look() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_look", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recovered(
    number: int, granularity: str, perplexity: float, validation: float, **others: Any
) -> dict[str, Any]:
    """Dense 10, pruned 30 under wanda and 20 under magnitude; seconds are the number."""
    pruned = 20.0 if others.get("criterion") == "magnitude" else 30.0
    return row(
        number,
        granularity=granularity,
        perplexity=perplexity,
        validation_perplexity=validation,
        dense_perplexity=10.0,
        pruned_perplexity=pruned,
        device_seconds_standalone=float(number),
        **others,
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The test text prefers blocks, the validation text subblocks; magnitude has two learning rates."""
    rows = [
        row(1, "dense", perplexity=10.0, dense_perplexity=10.0),
        row(2, "none", perplexity=30.0, dense_perplexity=10.0, device_seconds_standalone=2.0),
        recovered(3, "block", 12.0, 9.0),
        recovered(4, "subblock", 15.0, 8.0),
        recovered(5, "matrix", 31.0, 9.5),
        recovered(6, "matrix", 18.0, 9.0, criterion="magnitude", learning_rate=1e-3),
        recovered(8, "matrix", 16.0, 8.5, criterion="magnitude", learning_rate=1e-2),
        failed(9, "diverged", granularity="block", criterion="magnitude"),
    ]
    for one in rows:
        number = int(one["trial_id"], 16)
        units = [
            {
                "trial_id": one["trial_id"],
                "kind": "block",
                "unit": str(k),
                "block": k,
                "error_after": number + k / 10,
            }
            for k in range(2)
        ]
        units.append(
            {"trial_id": one["trial_id"], "kind": "unit", "unit": "0", "block": 0, "error_after": 99.0}
        )
        write_rows(tmp_path / "a", one, units, [])
    return tmp_path / "a"


@pytest.fixture
def finished(sweep: Path) -> pd.DataFrame:
    rows = load_results(sweep)
    return rows[rows["status"] == "finished"]


def by_kind(table: pd.DataFrame, column: Any) -> dict[tuple[str, str], float]:
    """Granularity is `none` for trials without recovery."""
    keys = zip(table["criterion"], table["granularity"].fillna("none"), strict=True)
    return dict(zip(keys, table[column], strict=True))


def test_the_best_granularity_is_chosen_by_validation(first_look: ModuleType, finished: pd.DataFrame) -> None:
    best = first_look.best_granularity(finished)
    assert by_kind(best, "perplexity") == {("wanda", "subblock"): 15.0, ("magnitude", "matrix"): 16.0}
    without = first_look.best_granularity(finished.assign(validation_perplexity=float("nan")))
    assert by_kind(without, "perplexity") == {("wanda", "block"): 12.0, ("magnitude", "matrix"): 16.0}


def test_what_recovery_wins_back_of_the_loss(first_look: ModuleType, finished: pd.DataFrame) -> None:
    table = first_look.won_back(finished)
    assert by_kind(table, "won_back") == pytest.approx(
        {
            ("wanda", "block"): 18 / 20,
            ("wanda", "subblock"): 15 / 20,
            ("wanda", "matrix"): -1 / 20,
            ("magnitude", "matrix"): (2 / 10 + 4 / 10) / 2,
        }
    )
    assert by_kind(table, "best")["magnitude", "matrix"] == pytest.approx(0.4)
    nothing_lost = first_look.won_back(finished.assign(pruned_perplexity=10.0))
    assert nothing_lost["won_back"].isna().all()


def test_the_cost_is_that_of_a_trial_alone(first_look: ModuleType, finished: pd.DataFrame) -> None:
    table = first_look.cost(finished)
    assert by_kind(table, "seconds") == {
        ("wanda", "none"): 2.0,
        ("wanda", "block"): 3.0,
        ("wanda", "subblock"): 4.0,
        ("wanda", "matrix"): 5.0,
        ("magnitude", "matrix"): 7.0,
    }
    assert by_kind(table, "peak_mib")["wanda", "block"] == 3.0


def test_errors_by_depth_are_those_of_blocks(
    first_look: ModuleType, sweep: Path, finished: pd.DataFrame
) -> None:
    table = first_look.error_by_depth(finished, load_units(sweep))
    assert by_kind(table, 0)["wanda", "none"] == 2.0
    assert by_kind(table, 1)["wanda", "none"] == 2.1
    assert by_kind(table, 1)["magnitude", "matrix"] == pytest.approx((6.1 + 8.1) / 2)
    assert len(table) == 5


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_the_script_prints_four_tables_without_torch_or_ray(sweep: Path) -> None:
    done = run(sweep)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("7 finished trials of 8\n")
    tables = [part.splitlines() for part in done.stdout.split("\n\n")]
    assert [len(lines) for lines in tables] == [1, 2 + 2, 2 + 4, 2 + 5, 2 + 5]
    assert tables[1][-1].split()[:2] == ["wanda", "subblock"]
    assert "pattern" not in done.stdout  # the same in every row


def test_a_granularity_that_is_best_everywhere_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", recovered(1, "subblock", 15.0, 8.0), [], [])
    assert run(tmp_path / "a").stdout.split("\n\n")[1].count("subblock") == 1


def test_no_sweep_ends_in_one_message(tmp_path: Path) -> None:
    done = run(tmp_path / "nothing")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "nothing") in done.stderr
