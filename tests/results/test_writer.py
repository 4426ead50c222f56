"""Rows appear whole or not at all, whatever ends the writer; rows that do not fit are refused."""

import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from raysweep.errors import NumericalError, RaysweepError, StorageError
from raysweep.results.atomic import remove_stale_temporaries
from raysweep.results.reader import load_results, load_units, trial_states
from raysweep.results.schema import SCHEMA_VERSION, trial_schema, unit_schema
from raysweep.results.writer import write_rows

ROOT = Path(__file__).resolve().parents[2]


def test_files_have_the_one_schema_and_open_with_pandas(tmp_path, trial_row, unit_rows):
    for number in range(3):
        path = write_rows(tmp_path, trial_row(number), unit_rows(2), ["x"])
        assert path == tmp_path / "trials" / f"{number:016x}.parquet"
        assert pq.read_schema(path).equals(trial_schema(["x"]))
        assert pq.read_schema(tmp_path / "units" / path.name).equals(unit_schema())
    trials, units = (pd.read_parquet(tmp_path / part) for part in ("trials", "units"))
    assert sorted(trials["trial_id"]) == [f"{number:016x}" for number in range(3)]
    assert set(trials["schema_version"]) == {SCHEMA_VERSION}
    assert len(units) == 6
    assert set(units["trial_id"]) == set(trials["trial_id"])


def test_columns_and_the_row_in_the_metadata_are_equal(tmp_path, trial_row, unit_rows):
    path = write_rows(tmp_path, trial_row(1, perplexity_x=math.pi), unit_rows(1), ["x"])
    (columns,) = pq.read_table(path).to_pylist()
    row = load_results(tmp_path).iloc[0]
    for name, value in columns.items():
        assert (pd.isna(row[name]) and value is None) or row[name] == value, name


def test_a_rerun_replaces_the_rows(tmp_path, trial_row, unit_rows):
    write_rows(tmp_path, trial_row(1, status="failed", error="loss is nan"), unit_rows(3), [])
    write_rows(tmp_path, trial_row(1), unit_rows(2), [])
    assert list(load_results(tmp_path)["status"]) == ["finished"]
    assert len(load_units(tmp_path)) == 2


def test_a_trial_without_units(tmp_path, trial_row):
    write_rows(tmp_path, trial_row(1), [], [])
    assert len(load_units(tmp_path)) == 0


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"perplexty": 1.0}, "perplexty"),
        ({"perplexity_x": 1.0}, "perplexity_x"),
        ({"trial_id": "../../x"}, "trial_id"),
        ({"trial_id": None}, "trial_id"),
        ({"recovery_id": "0123"}, "recovery_id"),
        ({"status": "done"}, "finished, failed, stopped"),
        ({"epochs": 1.0}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"sparsity": "0.5"}, "sparsity"),
        ({"sparsity": True}, "sparsity"),
        ({"shuffle": 1}, "shuffle"),
        ({"criterion": 3}, "criterion"),
        ({"started_at": "2026-01-01"}, "started_at"),
        ({"started_at": datetime(2026, 1, 1)}, "time zone"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path, trial_row, unit_rows, columns, said
):
    with pytest.raises(RaysweepError, match=said):
        write_rows(tmp_path, trial_row(1, **columns), unit_rows(1), [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [{"perplexity": math.nan}, {"perplexity": math.inf}])
def test_numbers_that_are_not_finite_are_no_results(tmp_path, trial_row, columns):
    with pytest.raises(NumericalError, match="perplexity"):
        write_rows(tmp_path, trial_row(1, **columns), [], [])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"los": 1.0}, "los"),
        ({"kind": "matrix"}, "kind"),
        ({"trial_id": "f" * 16}, "among"),
        ({"steps": 1.5}, "steps"),
    ],
)
def test_units_that_do_not_fit_are_refused(tmp_path, trial_row, unit_rows, columns, said):
    with pytest.raises(RaysweepError, match=said):
        write_rows(tmp_path, trial_row(1), unit_rows(1, **columns), [])
    assert trial_states(tmp_path) == {}


def test_the_units_are_there_before_the_trial(tmp_path, trial_row, unit_rows, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (replaced.append(Path(new).parent.name), replace(old, new))
    )
    write_rows(tmp_path, trial_row(1), unit_rows(1), [])
    assert replaced == ["units", "trials"]


def test_a_full_disk_leaves_neither_row_nor_temporary(tmp_path, trial_row, unit_rows, monkeypatch):
    write_rows(tmp_path, trial_row(1), unit_rows(1), [])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        write_rows(tmp_path, trial_row(2), unit_rows(1), [])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{1:016x}.parquet"] * 2


WRITER = """
import sys
from pathlib import Path
from datetime import UTC, datetime
from raysweep.results.writer import write_rows
units = [{"kind": "unit", "unit": str(block), "block": block} for block in range(200)]
number = 0
while True:
    row = {"trial_id": f"{number % 20:016x}", "recovery_id": "0" * 16, "sweep": "a", "status": "finished",
           "error": "x" * 20000, "perplexity": float(number)}
    write_rows(Path(sys.argv[1]), row, units, [])
    if number == 0:
        print("writing", flush=True)
    number += 1
"""


def test_killed_writers_leave_no_half_file(tmp_path):
    rounds = 4
    for attempt in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.01 + 0.025 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        states = trial_states(tmp_path)
        assert len(states) == len(list((tmp_path / "trials").glob("*.parquet"))) >= 1
        counts = load_units(tmp_path).groupby("trial_id").size()
        assert set(counts.index) == set(states)
        assert set(counts) == {200}
    remove_stale_temporaries(tmp_path)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert left == []
