"""Units that wait on storage: which are written, and that nobody vouches for what is not there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from raysweep.results.folders import part_file, unit_file
from raysweep.shards import unfinished
from raysweep.shards.unfinished import UnfinishedUnits

WEIGHTS = {"model.layers.0.linear.weight": torch.randn(8, 8)}
LONG, NO_TIME = 10.0, 0.0


@pytest.fixture
def units() -> UnfinishedUnits:
    return UnfinishedUnits()


def test_a_unit_comes_back_as_it_was_left(units, tmp_path):
    written = units.leave("trial", unit_file(tmp_path, "0"), WEIGHTS, {"row": 1}, LONG)
    assert written is not None
    assert written.result()
    weights, about = units.take(tmp_path, "0", {0: "model.layers.0"}) or ({}, {})
    assert about == {"row": 1}
    assert torch.equal(weights["model.layers.0.linear.weight"], next(iter(WEIGHTS.values())))
    assert units.take(tmp_path, "1", {1: "model.layers.1"}) is None


def test_what_costs_less_than_a_file_is_not_written_until_that_is_forgotten(units, tmp_path):
    units._cost_s = 1.0
    left = [units.leave("trial", unit_file(tmp_path, str(k)), WEIGHTS, {}, 0.5) for k in range(8)]
    assert left[:6] == [None] * 6
    assert left[-1] is not None


def test_what_is_not_written_is_not_vouched_for(units, tmp_path):
    """Not even right after something else that was."""
    units.leave("one", unit_file(tmp_path, "before"), WEIGHTS, {}, LONG)
    assert not units.leave_part("two", tmp_path, "0-1", {0: WEIGHTS}, NO_TIME)
    assert not part_file(tmp_path, "0-1", 0).exists()
    assert units.leave_part("two", tmp_path, "0-1", {0: WEIGHTS, 1: WEIGHTS}, LONG)
    assert part_file(tmp_path, "0-1", 0).exists()
    assert part_file(tmp_path, "0-1", 1).exists()


def test_a_storage_that_is_slower_than_the_units_holds_none_of_them_up(units, tmp_path, monkeypatch):
    go_on, write = threading.Event(), unfinished.write_tensors

    def slow(file: Path, *more: object, **options: object) -> None:
        assert go_on.wait(20)
        write(file, *more, **options)

    monkeypatch.setattr(unfinished, "write_tensors", slow)
    units._wait_s = 1.0
    first = units.leave("trial", unit_file(tmp_path, "0"), WEIGHTS, {}, 0.01)
    assert first is not None
    assert not first.done()
    assert units.leave("trial", unit_file(tmp_path, "1"), WEIGHTS, {}, 0.01) is None
    go_on.set()
    units.settle("another trial")
    units.settle("trial")
    assert first.result()


def test_a_file_that_cannot_be_written_costs_nothing_else(units, tmp_path):
    (tmp_path / "folder").write_text("a file")
    written = units.leave("trial", unit_file(tmp_path / "folder", "0"), WEIGHTS, {}, LONG)
    assert written is not None
    assert not written.result()
    assert not units.leave_part("trial", tmp_path / "folder", "0-1", {0: WEIGHTS}, LONG)
