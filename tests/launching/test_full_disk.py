"""A storage that fills up in the middle of a sweep: what was written stays, the reason is named, and it goes on."""

from __future__ import annotations

from contextlib import suppress

import pytest

from raysweep.errors import StorageError
from raysweep.launching.launch import launch
from raysweep.launching.progress import Silent
from raysweep.results.reader import load_results
from tests.frames import assert_same_numbers


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_sweep_survives_a_full_disk(make_space, tmp_path, small_disk, in_process):
    options = {"in_process": True} if in_process else {"address": "local"}
    launch(make_space(), storage=tmp_path / "whole", in_process=True)
    filler, progress, rows = small_disk / "filler", Silent(), list[str]()

    def row(row) -> None:
        rows.append(row["status"])
        if len(rows) == 1:  # to the last byte, and fast: trials in other processes go on
            with suppress(OSError), open(filler, "wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1 << 20))  # as much of it as fits

    progress.row = row
    with pytest.raises(StorageError, match="No space left on device"):
        launch(make_space(), storage=small_disk, progress=progress, **options)
    kept = load_results("tiny", small_disk)
    assert (kept.status == "finished").all()
    assert 1 <= len(kept) < 9
    filler.unlink()
    launch(make_space(), storage=small_disk, **options)
    assert_same_numbers(tmp_path / "whole" / "tiny", small_disk / "tiny")
    folder = small_disk / "tiny"
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
