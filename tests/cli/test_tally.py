"""What a display tells of a running sweep: the best of every cell, and the time left at the pace so far."""

from __future__ import annotations

from typing import Any

import pytest

from raysweep.analysis.rows import trial_label
from raysweep.cli.tally import Tally
from raysweep.config.space import SearchSpace
from tests.analysis.rows import failed, row


def space(**changes: Any) -> SearchSpace:
    return SearchSpace.from_dict(
        {
            "name": "a",
            "model": {"path": "builtin:pystdlib"},
            "calibration": {"dataset": "builtin:pystdlib"},
            "sweep": [
                {"recovery": "none", "criterion": ["magnitude", "wanda"], "sparsity": [0.5, 0.6]},
                {
                    "recovery": "reconstruct",
                    "criterion": "wanda",
                    "sparsity": [0.5, 0.6],
                    "granularity": ["subblock", "block"],
                    "learning_rate": 1e-3,
                },
            ],
            **changes,
        }
    )


def labeled(one: dict[str, Any]) -> dict[str, Any]:
    return one | {"label": trial_label(one)}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_row_of_every_cell_is_kept(mode):
    tally = Tally.of(space(search={"mode": mode}))
    tally.begin(9, 0, 0)
    made = [
        row(0, "dense", validation_perplexity=1.0),
        row(1, "none", sparsity=0.5, validation_perplexity=9.0),
        row(2, "none", sparsity=0.5, criterion="magnitude", validation_perplexity=8.0),
        row(3, "none", sparsity=0.6, validation_perplexity=11.0),
        row(4, sparsity=0.5, validation_perplexity=6.0),
        row(5, sparsity=0.5, granularity="block", validation_perplexity=7.0),
        failed(6, "lost", sparsity=0.6),
    ]
    for one in made:
        tally.row(labeled(one))
    assert tally.cell_columns == ("sparsity", "recovery")
    best = {cell: one["trial_id"] for cell, one in tally.best.items()}
    first, second = (2, 4) if mode == "min" else (1, 5)
    assert best == {
        (0.5, "none"): f"{first:016x}",
        (0.6, "none"): f"{3:016x}",
        (0.5, "reconstruct"): f"{second:016x}",
    }
    assert tally.dense is not None
    assert (tally.finished, tally.done) == (6, 7)
    assert tally.failures == [("wanda/row 0.6 subblock lr=0.001", "lost")]


def test_rows_of_earlier_launches_compete(monkeypatch):
    tally = Tally.of(space(), [labeled(row(1, "none", sparsity=0.5, validation_perplexity=5.0))])
    tally.begin(9, 1, 0)
    tally.row(labeled(row(2, "none", sparsity=0.5, criterion="magnitude", validation_perplexity=6.0)))
    assert tally.best[(0.5, "none")]["trial_id"] == f"{1:016x}"
    assert tally.finished == 2


@pytest.fixture
def clock(monkeypatch):
    """The time that the display sees, in seconds."""
    now = [100.0]
    monkeypatch.setattr("raysweep.cli.tally.time.monotonic", lambda: now[0])
    return now


def test_no_estimate_before_a_row_of_every_recovery_is_there(clock):
    tally = Tally.of(space())
    assert tally.time_left.seconds() is None
    tally.begin(9, 0, 0)
    assert tally.time_left.seconds() is None
    clock[0] += 1
    tally.row(labeled(row(0, "dense", seconds_total=1.0)))
    for number in (1, 2):
        clock[0] += 1
        tally.row(labeled(row(number, "none", sparsity=0.4 + number / 10, seconds_total=1.0)))
    assert tally.time_left.seconds() is None
    clock[0] += 20
    tally.row(labeled(row(3, sparsity=0.5, seconds_total=20.0)))
    # Two pruned trials at 1 s and three reconstructed ones at 20 s remain, one at a time.
    assert tally.time_left.seconds() == pytest.approx(2 + 3 * 20)


def test_trials_side_by_side_shorten_the_time_left(clock):
    tally = Tally.of(
        space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": [n / 10 for n in range(9)]}])
    )
    tally.begin(10, 0, 0)
    clock[0] += 10
    for number in range(4):  # four in flight: each took 10 s of the same 10 s
        tally.row(labeled(row(number, "none", sparsity=number / 10, seconds_total=10.0)))
    tally.row(labeled(row(9, "dense", seconds_total=0.001)))
    assert tally.time_left.seconds() == pytest.approx(5 * 10 / 4, rel=1e-3)


def test_what_earlier_launches_took_is_known_from_the_start(clock):
    earlier = [
        labeled(row(0, "dense", seconds_total=1.0)),
        labeled(row(1, "none", sparsity=0.5, seconds_total=2.0)),
        labeled(row(2, sparsity=0.5, seconds_total=30.0)),
    ]
    tally = Tally.of(space(), earlier)
    tally.begin(9, 3, 0)
    clock[0] += 2
    tally.row(labeled(row(3, "none", sparsity=0.6, seconds_total=2.0)))
    assert tally.time_left.seconds() == pytest.approx(2 * 2 + 3 * 30)


def test_a_failed_trial_is_not_waited_for(clock):
    tally = Tally.of(space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": [0.5, 0.6, 0.7]}]))
    tally.begin(4, 0, 0)
    clock[0] += 1
    tally.row(labeled(row(0, "dense", seconds_total=1.0)))
    clock[0] += 1
    tally.row(labeled(row(1, "none", sparsity=0.5, seconds_total=1.0)))
    tally.row(labeled(failed(2, "lost", recovery="none", sparsity=0.6)))
    assert tally.time_left.seconds() == pytest.approx(1)
    tally.row(labeled(row(3, "none", sparsity=0.7, seconds_total=1.0)))
    assert tally.time_left.seconds() == 0


def test_the_start_of_processes_is_no_pace(clock):
    """The first row came after a minute, of which it took a second: the others will not take a minute each."""
    tally = Tally.of(space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": [0.5, 0.6, 0.7]}]))
    tally.begin(4, 0, 0)
    clock[0] += 60
    tally.row(labeled(row(0, "dense", seconds_total=1.0)))
    tally.row(labeled(row(1, "none", sparsity=0.5, seconds_total=2.0)))
    assert tally.time_left.seconds() == pytest.approx(2 * 2)


def test_a_stopped_trial_is_not_the_best_of_its_cell():
    """Its metric is that of a model that is dense for the most part."""
    tally = Tally.of(space())
    tally.begin(9, 0, 0)
    tally.row(labeled(row(1, sparsity=0.5, validation_perplexity=6.0)))
    tally.row(labeled(row(2, sparsity=0.5, learning_rate=1e-2, validation_perplexity=5.0, status="stopped")))
    assert tally.best[(0.5, "reconstruct")]["trial_id"] == f"{1:016x}"
    assert tally.done == 2
