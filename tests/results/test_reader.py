"""Sweeps are read whatever columns their files have and whatever else lies in their folder."""

import math
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysweep.analysis.rows import records
from raysweep.errors import UsageError
from raysweep.results.cleaning import clean
from raysweep.results.folders import list_sweeps, new_sweep_folder, storage_folder, sweep_folder
from raysweep.results.reader import frame_of, load_results, load_rows, load_units, trial_states
from raysweep.results.writer import write_rows

ROOT = Path(__file__).resolve().parents[2]


def test_values_come_back_as_they_were(tmp_path, trial_row, unit_rows):
    row = trial_row(1, perplexity=0.1 + 0.2, tokens_trained=2**53 + 1, error='a "quoted" é\nline')
    write_rows(tmp_path, row, unit_rows(3), [])
    read = load_results(tmp_path).iloc[0]
    for name, value in row.items():
        assert read[name] == value, name
    assert pd.isna(read["granularity"])
    units = load_units(tmp_path)
    assert list(units["loss_after"]) == [0.0, 1 / 3, 2 / 3]


def test_whole_numbers_stay_whole_beside_nulls(tmp_path, trial_row):
    write_rows(tmp_path, trial_row(1, epochs=None, shuffle=None, seed=None), [], [])
    write_rows(tmp_path, trial_row(2), [], [])
    frame = load_results(tmp_path)
    assert [str(frame[name].dtype) for name in ("epochs", "seed", "shuffle")] == ["Int64", "Int64", "boolean"]
    assert frame["seed"][1] == 2**63 - 1


def test_trials_come_in_the_order_in_which_they_started(tmp_path, trial_row):
    numbers = [5, 1, 300, 2]
    for place, number in enumerate(numbers):
        write_rows(tmp_path, {**trial_row(number), "started_at": trial_row(place)["started_at"]}, [], [])
    assert list(load_results(tmp_path)["trial_id"]) == [f"{number:016x}" for number in numbers]


def test_columns_of_all_files_are_united(tmp_path, trial_row, unit_rows):
    write_rows(tmp_path, trial_row(1, perplexity_a=1.5), unit_rows(1), ["a"])
    write_rows(tmp_path, trial_row(2, perplexity_a=2.5, perplexity_b=3.5), unit_rows(1), ["a", "b"])
    write_rows(tmp_path, trial_row(3, perplexity_c=4.5), unit_rows(1), ["c"])
    frame = load_results(tmp_path)
    assert list(frame["perplexity_a"].fillna(-1)) == [1.5, 2.5, -1]
    assert list(frame["perplexity_b"].fillna(-1)) == [-1, 3.5, -1]
    assert list(frame["perplexity_c"].fillna(-1)) == [-1, -1, 4.5]


def test_files_of_other_versions_and_programs(tmp_path, trial_row, unit_rows):
    """An older file lacks columns, a newer one has more, and pandas drops our metadata."""
    write_rows(tmp_path, trial_row(1), unit_rows(1), [])
    old = {
        "trial_id": f"{2:016x}",
        "status": "finished",
        "perplexity": 9.0,
        "started_at": trial_row(2)["started_at"],
    }
    new = {**old, "trial_id": f"{3:016x}", "carbon": 1.25, "started_at": trial_row(3)["started_at"]}
    for row in (old, new):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "trials" / f"{row['trial_id']}.parquet")
    frame = load_results(tmp_path)
    assert list(frame["perplexity"]) == [12.6, 9.0, 9.0]
    assert math.isnan(frame["carbon"][0])
    assert frame["carbon"][2] == 1.25
    assert list(trial_states(tmp_path).values()) == ["finished"] * 3


def test_plain_rows_are_those_of_the_frame(tmp_path, trial_row):
    """In order, columns and values, whoever wrote them and wherever they lie."""
    texts = {"epochs": None, "shuffle": False, "started_at": trial_row(0)["started_at"]}
    write_rows(tmp_path, trial_row(3, perplexity_b=1.5, **texts), [], ["b"])
    write_rows(tmp_path, trial_row(4, perplexity_a=2.5, tokens_trained=2**53 + 1), [], ["a"])
    clean(tmp_path)
    write_rows(tmp_path, trial_row(2, perplexity_c=3.5), [], ["c"])
    there, moment = timezone(timedelta(hours=9)), datetime(2026, 11, 30, 12)
    unsaid = {
        "trial_id": f"{5:016x}",
        "status": "finished",
        "carbon": 1,
        "note": 1,
        "odd": True,
        "day": moment,
    }
    early = trial_row(1)["started_at"].astimezone(there)
    told = {"carbon": 1.25, "note": "a", "odd": 1, "day": moment.replace(tzinfo=there), "started_at": early}
    for row in (unsaid, unsaid | told | {"trial_id": f"{1:016x}"}):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "trials" / f"{row['trial_id']}.parquet")
    rows, frame = load_rows(tmp_path), load_results(tmp_path)
    assert [row["trial_id"] for row in rows] == [f"{number:016x}" for number in (3, 1, 2, 4, 5)]
    assert rows == records(frame)
    assert [type(value) for row in rows for value in row.values()] == [
        datetime if isinstance(value, datetime) else type(value)
        for row in records(frame)
        for value in row.values()
    ]
    assert [row["odd"] for row in rows] == [None, "1", None, None, "True"]
    assert [row["day"] for row in rows if row["day"]] == [
        datetime(2026, 11, 30, hour, tzinfo=UTC) for hour in (3, 12)
    ]
    assert [list(row) for row in rows] == [list(frame)] * 5
    assert rows[1]["started_at"].isoformat() == frame["started_at"][1].isoformat()
    pd.testing.assert_frame_equal(frame_of(rows), frame, check_exact=True)
    with pytest.raises(UsageError, match="no trial yet"):
        load_rows(tmp_path / "b")


def test_foreign_junk_is_passed_over(tmp_path, trial_row, unit_rows, caplog):
    write_rows(tmp_path, trial_row(1), unit_rows(1), [])
    good = tmp_path / "trials" / f"{1:016x}.parquet"
    (tmp_path / "trials" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "trials" / "notes.txt").write_text("mine")
    (tmp_path / "trials" / "all.parquet").write_bytes(good.read_bytes())
    (tmp_path / "trials" / f".{2:016x}.parquet.host.1.ff.tmp").write_bytes(b"half")
    (tmp_path / "trials" / f"{3:016x}.parquet").write_bytes(good.read_bytes()[:500])
    (tmp_path / "trials" / f"{4:016x}.parquet").write_bytes(b"")
    (tmp_path / "trials" / f"{5:016x}.parquet").mkdir()
    shutil.copy(good, tmp_path / "trials" / f"{6:016x}.parquet")
    (tmp_path / "units" / f"{1:016x}.parquet~").write_bytes(b"x")
    assert list(load_results(tmp_path)["trial_id"]) == [f"{1:016x}"]
    assert len(load_units(tmp_path)) == 1
    assert f"{3:016x}" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "done"},
        {"status": None},
        {"perplexity": "low"},
        {"perplexity": math.inf},
        {"perplexity_a": math.inf},
        {"epochs": [1]},
        {"epochs": True},
        {"epochs": 1.5},
        {"shuffle": "yes"},
        {"criterion": 5},
        {"started_at": "yesterday"},
        {"started_at": datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-9)))},
    ],
    ids=str,
)
def test_a_row_whose_columns_hold_what_they_cannot_is_passed_over(tmp_path, trial_row, caplog, wrong):
    """Of another program, or damaged: it must not end in an error of Arrow's, nor count as finished."""
    write_rows(tmp_path, trial_row(1), [], [])
    row = trial_row(2) | wrong
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "trials" / f"{2:016x}.parquet")
    assert list(load_results(tmp_path)["trial_id"]) == [f"{1:016x}"]
    assert list(trial_states(tmp_path)) == [f"{1:016x}"]
    assert f"{2:016x}" in caplog.text


def test_what_another_program_may_write_is_read(tmp_path, trial_row):
    """Whole numbers as floats, floats as whole numbers, moments without a zone, columns of several kinds."""
    rows = [trial_row(1, seed=1.0, epochs=2.0, perplexity=9, note="a"), trial_row(2, note=5, more={"a": [1]})]
    rows[1]["started_at"] = rows[1]["started_at"].replace(tzinfo=None)
    (tmp_path / "trials").mkdir()
    for row in rows:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "trials" / f"{row['trial_id']}.parquet")
    frame = load_results(tmp_path)
    assert list(frame["epochs"]) == [2, 1]
    assert frame["perplexity"][0] == 9.0
    assert list(frame["note"]) == ["a", "5"]
    assert frame["more"][1] == "{'a': [1]}"


def test_units_without_their_trial_are_not_read(tmp_path, trial_row, unit_rows):
    for number in (1, 2):
        write_rows(tmp_path, trial_row(number), unit_rows(2), [])
    (tmp_path / "trials" / f"{2:016x}.parquet").unlink()
    assert set(load_units(tmp_path)["trial_id"]) == {f"{1:016x}"}


def test_states(tmp_path, trial_row):
    for number, status in enumerate(("finished", "failed", "stopped", "finished")):
        write_rows(tmp_path, trial_row(number, status=status), [], [])
    assert list(trial_states(tmp_path).values()) == ["finished", "failed", "stopped", "finished"]
    assert trial_states(tmp_path / "nothing") == {}


@pytest.fixture
def storage(tmp_path, trial_row, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSWEEP_STORAGE", raising=False)
    write_rows(tmp_path / "raysweep-results" / "first", trial_row(1), [], [])
    write_rows(tmp_path / "elsewhere" / "second", trial_row(2), [], [])
    (tmp_path / "elsewhere" / "begun").mkdir()
    (tmp_path / "elsewhere" / "begun" / "space.yaml").write_text("name: begun\n")
    (tmp_path / "elsewhere" / "holiday").mkdir()
    return tmp_path


def test_a_sweep_is_found_by_name_or_path(storage, monkeypatch):
    assert len(load_results("first")) == 1
    assert len(load_results("second", storage="elsewhere")) == 1
    assert len(load_results("elsewhere/second")) == 1
    assert len(load_results(storage / "elsewhere" / "second")) == 1
    monkeypatch.setenv("RAYSWEEP_STORAGE", str(storage / "elsewhere"))
    assert len(load_results("second")) == 1
    assert len(load_results("first", storage=storage / "raysweep-results")) == 1


def test_where_the_storage_is(monkeypatch):
    monkeypatch.delenv("RAYSWEEP_STORAGE", raising=False)
    assert storage_folder() == Path("raysweep-results")
    assert storage_folder(configured="/c") == Path("/c")
    monkeypatch.setenv("RAYSWEEP_STORAGE", "/v")
    assert storage_folder(configured="/c") == Path("/v")
    assert storage_folder("~/a", "/c") == Path.home() / "a"
    with pytest.raises(UsageError):
        new_sweep_folder("../a", Path("/v"))


def test_a_missing_sweep_names_those_that_exist(storage):
    assert list_sweeps(storage / "elsewhere") == ["begun", "second"]
    with pytest.raises(UsageError, match="no sweep 'secnd'") as caught:
        load_results("secnd", storage="elsewhere")
    assert caught.value.nearest == "second"
    assert "begun, second" in caught.value.allowed
    with pytest.raises(UsageError, match="raysweep launch"):
        load_results("first", storage=storage / "empty")
    for name in ("", "..", "nowhere/at/all", "holiday"):
        with pytest.raises(UsageError, match="no sweep"):
            load_units(name, storage="elsewhere")


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~nobody_at_all/x"], ids=["nul", "long", "home"])
def test_what_can_be_no_path_is_refused(storage, text):
    with pytest.raises(UsageError, match="is no path that can be used here"):
        storage_folder(text)
    with pytest.raises(UsageError, match="is no path that can be used here"):
        sweep_folder(text)


def test_a_sweep_without_trials_says_so(storage):
    assert sweep_folder("begun", "elsewhere").name == "begun"
    with pytest.raises(UsageError, match="no trial yet"):
        load_results("begun", storage="elsewhere")


def test_reading_imports_neither_torch_nor_ray():
    code = (
        "import sys, raysweep; raysweep.load_results; raysweep.load_units; raysweep.SearchSpace.from_yaml; "
    )
    code += "print([name for name in ('torch', 'ray', 'transformers', 'datasets') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


def test_a_launch_reads_the_rows_of_a_new_sweep_without_pandas(tmp_path):
    """Its import takes as long as Ray's, and Tune's imports it while Ray starts."""
    code = "import sys; from pathlib import Path; from raysweep.results.reader import trial_rows; "
    code += f"print(trial_rows(Path({str(tmp_path)!r})), 'pandas' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["{}", "False"]


def test_time_to_read_two_thousand_trials(tmp_path, trial_row, unit_rows, capsys):
    write_rows(tmp_path, trial_row(0), [], ["a"])
    template = (tmp_path / "trials" / f"{0:016x}.parquet").read_bytes()
    for number in range(1, 2000):  # the same row under other identities, which is as much work to read
        renamed = template.replace(f"{0:016x}".encode(), f"{number:016x}".encode())
        (tmp_path / "trials" / f"{number:016x}.parquet").write_bytes(renamed)
    started = time.perf_counter()
    assert len(load_results(tmp_path)) == 2000
    middle = time.perf_counter()
    assert len(trial_states(tmp_path)) == 2000
    with capsys.disabled():
        sys.stdout.write(
            f"\n2,000 trials: load_results {middle - started:.2f} s, "
            f"trial_states {time.perf_counter() - middle:.2f} s\n"
        )
