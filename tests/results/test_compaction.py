"""`clean` puts finished trials together: the frames stay equal, whatever ends it, and whoever reads or writes later."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from raysweep.errors import RaysweepError, StorageError
from raysweep.results import compaction
from raysweep.results.cleaning import clean
from raysweep.results.folders import TRIALS, UNITS, compacted_file, has_rows, row_files
from raysweep.results.reader import (
    load_results,
    load_rows,
    load_units,
    row_count,
    trial_rows,
    trial_states,
)
from raysweep.results.schema import trial_schema, unit_schema
from raysweep.results.writer import write_rows, write_trial_row


def everything(folder: Path) -> tuple[object, ...]:
    """All that readers say of a sweep."""
    return (
        load_results(folder),
        load_units(folder),
        trial_rows(folder),
        trial_states(folder),
        row_count(folder),
        load_rows(folder),
    )


def assert_same(left: tuple, right: tuple) -> None:
    for a, b in zip(left[:2], right[:2], strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert left[2:] == right[2:]


def own_files(folder: Path, part: str) -> list[str]:
    return [path.stem for path in row_files(folder, part)]


@pytest.fixture
def sweep(tmp_path, trial_row, unit_rows) -> Path:
    """Finished trials out of the order of their names, of different evaluations; one failed, one stopped."""
    for number, place in enumerate((5, 0, 3, 1)):
        moment = trial_row(place)["started_at"]
        columns = {"started_at": moment, "perplexity_a": 0.1 + number}
        columns |= {"perplexity_b": 0.2 + number} if number > 1 else {}
        row = trial_row(number, epochs=None if number else 3, tokens_trained=2**53 + 1, **columns)
        write_rows(tmp_path, row, unit_rows(number), ["a", "b"] if number > 1 else ["a"])
    write_rows(tmp_path, trial_row(8, status="failed", error="é", error_kind="other"), [], ["a"])
    write_rows(tmp_path, trial_row(9, status="stopped", rungs='{"0": 1.5}'), [], ["a"])
    return tmp_path


def test_a_row_that_gets_columns_later_keeps_its_units(sweep):
    """Of tasks that are measured on a finished trial, before or after its files were put together."""
    units = len(load_units(sweep))
    for when in ("before", "after"):
        row = trial_rows(sweep)[f"{2:016x}"] | {f"task_{when}": 0.5}
        names, tasks = ["a", "b"], [name.removeprefix("task_") for name in row if name.startswith("task_")]
        write_trial_row(sweep, row, names, tasks)
        for cleaned in (False, True):
            if cleaned:
                clean(sweep)
            found = load_results(sweep).set_index("trial_id")
            assert found[f"task_{when}"].dropna().to_dict() == {f"{2:016x}": 0.5}
            assert found.perplexity_b[f"{2:016x}"] == row["perplexity_b"]
            assert len(load_units(sweep)) == units


def test_frames_are_equal_and_files_few(sweep):
    before = everything(sweep)
    cleaned = clean(sweep)
    assert cleaned.files == 8
    assert_same(everything(sweep), before)
    assert own_files(sweep, TRIALS) == own_files(sweep, UNITS) == [f"{n:016x}" for n in (8, 9)]


def test_pandas_opens_both_folders_with_one_schema(sweep):
    clean(sweep)
    trials, units = (pd.read_parquet(sweep / part) for part in (TRIALS, UNITS))
    assert list(trials) == trial_schema(["a", "b"]).names  # those of the widest file, which comes first
    assert sorted(trials["trial_id"]) == [f"{n:016x}" for n in (0, 1, 2, 3, 8, 9)]
    assert list(units) == unit_schema().names
    assert len(units) == 0 + 1 + 2 + 3


def test_cleaning_twice_changes_nothing(sweep):
    clean(sweep)
    files = {path: path.read_bytes() for path in sweep.rglob("*.parquet")}
    assert clean(sweep).files == 0
    assert {path: path.read_bytes() for path in sweep.rglob("*.parquet")} == files


def test_later_trials_join_at_the_next_clean(sweep, trial_row, unit_rows):
    clean(sweep)
    write_rows(sweep, trial_row(20, perplexity_c=4.5), unit_rows(2), ["c"])
    write_rows(sweep, trial_row(8), unit_rows(1), ["a"])  # the failed one, run again
    before = everything(sweep)
    assert clean(sweep).files == 4
    assert_same(everything(sweep), before)
    assert own_files(sweep, TRIALS) == [f"{9:016x}"]
    assert set(before[3].values()) == {"finished", "stopped"}


def test_a_row_that_was_written_again_is_put_together_again(sweep):
    """Else pandas alone would see its trial twice, and none of the columns that it got."""
    clean(sweep)
    for number in (1, 2):
        row = trial_rows(sweep)[f"{number:016x}"] | {"task_quiz": 0.5}
        write_trial_row(sweep, row, ["a", "b"], ["quiz"])
    before = everything(sweep)
    clean(sweep)
    assert_same(everything(sweep), before)
    alone = pd.read_parquet(compacted_file(sweep, TRIALS)).set_index("trial_id")
    assert alone.index.is_unique
    assert alone.task_quiz.notna().sum() == 2
    assert not {f"{1:016x}", f"{2:016x}"} & {*own_files(sweep, TRIALS)}


def test_a_row_of_its_own_counts(sweep, trial_row, unit_rows):
    clean(sweep)
    write_rows(sweep, trial_row(1, perplexity=1.25), unit_rows(7), [])
    rows = load_results(sweep).set_index("trial_id")
    assert rows.loc[f"{1:016x}"].perplexity == 1.25
    assert (load_units(sweep).trial_id == f"{1:016x}").sum() == 7
    assert row_count(sweep) == 6
    before = everything(sweep)
    clean(sweep)
    assert_same(everything(sweep), before)


class Killed(BaseException):
    pass


STEPS = 2 + 8  # files written, files removed


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("again", [False, True])
def test_whatever_ends_it_every_trial_is_there_once(sweep, trial_row, unit_rows, monkeypatch, step, again):
    if again:  # the same where there is a file of an earlier call already
        clean(sweep)
        for number in range(20, 24):
            write_rows(sweep, trial_row(number), unit_rows(2), [])
    before, done = everything(sweep), []
    write, unlink = compaction.write_table, Path.unlink

    def counting(change, *arguments, **options):
        if len(done) == step:
            raise Killed
        done.append(change)
        return change(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "write_table", lambda *a, **o: counting(write, *a, **o))
        patch.setattr(
            Path,
            "unlink",
            lambda self, missing_ok=False: (
                counting(unlink, self, missing_ok) if self.suffix == ".parquet" else unlink(self, missing_ok)
            ),
        )
        if step == STEPS:
            clean(sweep)
        else:
            with pytest.raises(Killed):
                clean(sweep)
    assert_same(everything(sweep), before)
    clean(sweep)
    assert_same(everything(sweep), before)
    assert own_files(sweep, TRIALS) == own_files(sweep, UNITS) == [f"{n:016x}" for n in (8, 9)]


def test_a_full_disk_leaves_everything_as_it_was(sweep, monkeypatch):
    before, files = everything(sweep), sorted(sweep.rglob("*.parquet"))
    monkeypatch.setattr(compaction, "write_table", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    with pytest.raises(StorageError):
        clean(sweep)
    assert sorted(sweep.rglob("*.parquet")) == files
    assert_same(everything(sweep), before)


def test_one_trial_stays_in_its_file(tmp_path, trial_row, unit_rows):
    write_rows(tmp_path, trial_row(1), unit_rows(1), [])
    assert clean(tmp_path).files == 0
    assert own_files(tmp_path, TRIALS) == [f"{1:016x}"]


def test_what_cannot_be_read_stays(sweep, trial_row, unit_rows):
    """A damaged row, damaged units, and a row of a newer version."""
    for number in (30, 31, 32):
        write_rows(sweep, trial_row(number), unit_rows(1), [])
    damaged = [sweep / TRIALS / f"{30:016x}.parquet", sweep / UNITS / f"{31:016x}.parquet"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    newer = pd.DataFrame([trial_row(32, carbon=1.25)])
    newer.to_parquet(sweep / TRIALS / f"{32:016x}.parquet")
    before = load_results(sweep)
    clean(sweep)
    pd.testing.assert_frame_equal(load_results(sweep), before)
    assert {f"{n:016x}" for n in (30, 31, 32)} < set(own_files(sweep, UNITS))
    assert before["carbon"].notna().sum() == 1


def test_a_compacted_file_that_cannot_be_read_is_no_empty_sweep(sweep):
    clean(sweep)
    path = compacted_file(sweep, TRIALS)
    path.write_bytes(path.read_bytes()[:100])
    for read in (load_results, trial_rows, clean):
        with pytest.raises(RaysweepError, match="holds the rows of many trials"):
            read(sweep)
    assert len(path.read_bytes()) == 100


def test_files_that_vanish_while_they_are_listed_are_no_loss(sweep, monkeypatch):
    """A reader that has listed the folder before `clean` removes files."""
    before = everything(sweep)[0]
    listed = list(row_files(sweep, TRIALS))
    clean(sweep)
    monkeypatch.setattr("raysweep.results.reader.row_files", lambda *_: listed)
    pd.testing.assert_frame_equal(load_results(sweep), before)


def test_a_sweep_with_compacted_rows_alone_has_rows(sweep, tmp_path):
    assert has_rows(sweep)
    for number in (8, 9):
        (sweep / TRIALS / f"{number:016x}.parquet").unlink()
    clean(sweep)
    assert own_files(sweep, TRIALS) == []
    assert has_rows(sweep)
    assert not has_rows(tmp_path / "nothing")
