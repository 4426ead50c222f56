"""Frames that hold only the numbers of trials, compared bitwise."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from raysweep.results.reader import load_results, load_units
from raysweep.results.schema import NOT_NUMBERS


def numbers(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The numbers of all trials of a sweep: rows and units without cost and provenance, in a fixed order."""
    trials = load_results(folder).drop(columns=list(NOT_NUMBERS), errors="ignore").sort_values("trial_id")
    units = load_units(folder).drop(columns=list(NOT_NUMBERS), errors="ignore")
    units = units.sort_values(["trial_id", "kind", "unit"])
    return trials.reset_index(drop=True), units.reset_index(drop=True)


def assert_same_numbers(left: Path, right: Path) -> None:
    """Bitwise."""
    for a, b in zip(numbers(left), numbers(right), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
