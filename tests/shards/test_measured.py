"""Batches that are measured together are kept one by one, and joined only where none between them is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysweep.reconstruction.measures import BatchMeasures
from raysweep.shards.group_info import TextInfo
from raysweep.shards.measured import MeasuredBatches

TEXT = TextInfo("evaluation/own", ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9)), tokens=16)


def measured(start: int, stop: int) -> BatchMeasures:
    """Numbers that tell where they come from."""
    samples = range(start, stop)
    return BatchMeasures(
        TEXT.name, start, stop, [1.0 + s for s in samples], {3: [10.0 + s for s in samples]}, stop - start
    )


@pytest.mark.parametrize(
    ("known", "together", "asked"),
    [
        ([], 1, TEXT.batches),
        ([], 2, ((0, 4), (4, 8), (8, 9))),
        ([], 8, ((0, 9),)),
        ([(2, 4)], 8, ((0, 2), (4, 9))),
        ([(0, 2), (6, 8)], 2, ((2, 6), (8, 9))),
        (TEXT.batches, 8, ()),
    ],
)
def test_what_is_known_is_not_asked_again(known, together, asked):
    batches = MeasuredBatches(None)
    for start, stop in known:
        batches.add(measured(start, stop), TEXT)
    assert batches.missing(TEXT, together).batches == asked
    for start, stop in asked:
        batches.add(measured(start, stop), TEXT)
    assert batches.missing(TEXT, together).batches == ()
    assert batches.of_text(TEXT) == [measured(*place) for place in TEXT.batches]


def test_a_later_launch_may_join_others(tmp_path: Path):
    MeasuredBatches(tmp_path / "own.jsonl").add(measured(0, 4), TEXT)
    later = MeasuredBatches(tmp_path / "own.jsonl")
    assert later.missing(TEXT, 1).batches == TEXT.batches[2:]
    assert later.missing(TEXT, 8).batches == ((4, 9),)
