"""Which trials are kept, cell by cell, and what is removed when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysweep.config.sections import SearchConfig
from raysweep.results.artifacts import (
    ALL,
    BEST,
    MARKER,
    NONE,
    Keeping,
    Kept,
    artifact_folder,
    kept_trials,
    remove_artifact,
    remove_unfinished,
)

SEARCH = SearchConfig(compare_within=("model", "sparsity", "recovery"))


def trial(number: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """The row of a finished trial."""
    row = {"trial_id": f"{number:016x}", "recovery_id": f"{number + 256:016x}", "status": "finished"}
    row |= {"model": "m", "sparsity": 0.5, "recovery": "none", "validation_perplexity": value}
    return row | changes


def keep(sweep: Path, row: dict[str, Any], has_row: bool = True) -> Path:
    """As the shards and the trial's process leave it."""
    folder = artifact_folder(sweep, row["trial_id"])
    folder.mkdir(parents=True)
    (folder / "block-0.safetensors").write_bytes(b"weights")
    Kept.of(row, folder).write(folder)
    if has_row:
        (sweep / "trials").mkdir(exist_ok=True)
        (sweep / "trials" / f"{row['trial_id']}.parquet").touch()
    return folder


def ids(sweep: Path) -> list[int]:
    return [int(kept.trial_id, 16) for kept in kept_trials(sweep)]


def test_what_is_written_is_read(tmp_path):
    folder = keep(tmp_path, trial(1, 3.5))
    kept = Kept.read(folder)
    assert kept is not None
    assert (kept.trial_id, kept.recovery_id) == (f"{1:016x}", f"{257:016x}")
    assert kept.files == ("block-0.safetensors",)
    assert kept.missing(folder) == []
    (folder / "block-0.safetensors").unlink()
    assert kept.missing(folder) == ["block-0.safetensors"]
    assert kept.row == {"model": "m", "sparsity": 0.5, "recovery": "none", "validation_perplexity": 3.5}


def test_markers_of_other_versions_are_read(tmp_path):
    folder = keep(tmp_path, trial(1, 3.5))
    said = json.loads((folder / MARKER).read_text())
    assert "waits" not in said  # where it does not, versions that know nothing of it read it too
    (folder / MARKER).write_text(json.dumps(said | {"waits": True, "later": 1}))
    kept = Kept.read(folder)
    assert kept is not None
    assert kept.waits


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"trial_id": "x"', b"\xff", b'{"trial_id": 3}'])
def test_a_damaged_marker_makes_no_kept_trial(tmp_path, content):
    folder = keep(tmp_path, trial(1, 3.5))
    (folder / MARKER).write_bytes(content)
    assert Kept.read(folder) is None
    assert ids(tmp_path) == []


def test_a_marker_counts_in_its_own_folder_alone(tmp_path):
    folder = keep(tmp_path, trial(1, 3.5))
    folder.rename(folder.with_name(f"{2:016x}"))
    assert ids(tmp_path) == []


def test_none_all_and_trials_without_the_metric(tmp_path):
    assert not Keeping.of(NONE, SEARCH).wants(tmp_path, trial(1, 1.0))
    assert Keeping.of(ALL, SEARCH).wants(tmp_path, trial(1, None))
    assert not Keeping.of(BEST, SEARCH).wants(tmp_path, trial(1, None))


@pytest.mark.parametrize(("mode", "better", "worse"), [("min", 2.0, 4.0), ("max", 4.0, 2.0)])
def test_the_best_of_a_cell_is_wanted(tmp_path, mode, better, worse):
    search = SEARCH.model_copy(update={"mode": mode})
    earlier = [trial(1, 3.0), trial(2, 1.0 if mode == "max" else 5.0), trial(3, 0.5, recovery="dense")]
    keeping = Keeping.of(
        BEST, search, [*earlier, trial(4, 0.1, status="failed"), trial(5, 0.1, sparsity=0.6)]
    )
    assert keeping.wants(tmp_path, trial(9, better))
    assert not keeping.wants(tmp_path, trial(9, worse))
    assert not keeping.wants(tmp_path, trial(9, 3.0))  # the first one stays
    assert keeping.wants(tmp_path, trial(9, worse, recovery="reconstruct"))


@pytest.mark.parametrize("name", ["model_hash", "dtype", "validation_hash"])
def test_what_was_measured_otherwise_is_not_compared(tmp_path, name):
    """Rows of earlier launches, on another validation text, of other weights under the same path, of another dtype."""
    keeping = Keeping.of(BEST, SEARCH, [trial(1, 1.0, **{name: "before"})])
    keep(tmp_path, trial(1, 1.0, **{name: "before"}))
    now = trial(2, 3.0, **{name: "now"})
    assert keeping.wants(tmp_path, now)
    keep(tmp_path, now)
    keeping.remove_superseded(tmp_path, {f"{1:016x}", f"{2:016x}"})
    assert ids(tmp_path) == [1, 2]


@pytest.mark.parametrize("keeps", [BEST, ALL])
def test_numbers_that_are_none_keep_nothing(tmp_path, keeps):
    assert Keeping.of(keeps, SEARCH).wants(tmp_path, trial(1, float("nan"))) == (keeps == ALL)


def test_trials_of_this_launch_count_once_they_have_rows(tmp_path):
    keeping = Keeping.of(BEST, SEARCH)
    keep(tmp_path, trial(1, 3.0), has_row=False)
    assert keeping.wants(tmp_path, trial(2, 4.0))  # the first one may yet fail
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / f"{1:016x}.parquet").touch()
    assert not keeping.wants(tmp_path, trial(2, 4.0))
    assert keeping.wants(tmp_path, trial(2, 2.0))
    assert keeping.wants(tmp_path, trial(1, 3.0))  # begun again, it is not compared with itself


def test_a_better_one_takes_the_place_of_what_was_kept(tmp_path):
    keeping = Keeping.of(BEST, SEARCH)
    rows = [trial(1, 3.0), trial(2, 2.0), trial(3, 4.0), trial(4, 9.0, sparsity=0.6), trial(5, 1.0)]
    for row in rows:
        keep(tmp_path, row)
    finished = {row["trial_id"] for row in rows[:4]}  # the fifth is still at work
    keeping.remove_superseded(tmp_path, finished)
    assert ids(tmp_path) == [2, 4, 5]
    keeping.remove_superseded(tmp_path, {row["trial_id"] for row in rows})
    assert ids(tmp_path) == [4, 5]
    for keeps in (ALL, NONE):
        Keeping.of(keeps, SEARCH).remove_superseded(tmp_path, set())
    assert ids(tmp_path) == [4, 5]


def test_of_equals_one_stays(tmp_path):
    rows = [trial(1, 3.0), trial(2, 3.0)]
    for row in rows:
        keep(tmp_path, row)
    Keeping.of(BEST, SEARCH).remove_superseded(tmp_path, {row["trial_id"] for row in rows})
    assert ids(tmp_path) == [1]


def test_what_is_not_complete_or_has_no_row_is_removed_and_nothing_else(tmp_path):
    whole, orphan, half = (keep(tmp_path, trial(number, 3.0)) for number in (1, 2, 3))
    (half / MARKER).unlink()
    (tmp_path / "artifacts" / "mine").mkdir()
    remove_unfinished(tmp_path, {f"{1:016x}", f"{3:016x}"})
    assert whole.exists()
    assert not orphan.exists()
    assert not half.exists()
    assert (tmp_path / "artifacts" / "mine").exists()


def test_removing_begins_with_the_marker(tmp_path, monkeypatch):
    """So that a removal that is interrupted leaves nothing that looks whole."""
    folder = keep(tmp_path, trial(1, 3.0))
    monkeypatch.setattr("raysweep.results.artifacts.shutil.rmtree", lambda *_, **__: None)
    remove_artifact(folder)
    assert (folder / "block-0.safetensors").exists()
    assert Kept.read(folder) is None


def test_it_is_json_that_others_can_read(tmp_path):
    folder = keep(tmp_path, trial(1, 3.0))
    assert json.loads((folder / MARKER).read_text())["row"]["validation_perplexity"] == 3.0
