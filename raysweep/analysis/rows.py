"""Rows of trials as plain values, and how a trial is called in few words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from raysweep.config.labels import label_of
from raysweep.config.trial import Trial
from raysweep.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
"""A trial with all its columns, as `load_rows` and `records` give it: None where a column does not apply."""


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of pandas as dictionaries of plain Python values, None where a column does not apply."""
    if len(frame) == 0:  # for which pandas would take milliseconds, with a hundred columns
        return []
    import pandas as pd  # who has a frame has it; others come here for labels

    return [
        {str(name): None if pd.isna(value) else _plain(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, which strict settings ask for."""
    return value.item() if hasattr(value, "item") else value


def trial_label(row: Row) -> str:
    """The trial's short name, as progress lines show it; its identity where the fields make no trial."""
    try:
        label = label_of(Trial.from_columns(dict(row)))
    except (UsageError, ValueError):
        return str(row["trial_id"])
    seed = row.get("calibration_seed")
    return label + (f" calibration.seed={seed}" if seed else "")


def failures(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Label and reason of every failed trial."""
    return [
        (trial_label(row), "no reason was recorded" if row["error"] is None else str(row["error"]))
        for row in rows
        if row["status"] == "failed"
    ]


def protocol_words(text: Any) -> str | None:
    """pystdlib 64 x 256: the first entry with its windows and their length."""
    try:
        entry = json.loads(text)["perplexity"][0]
        return f"{entry['name']} {entry.get('max_windows', 'all')} x {entry['sequence_length']}"
    except (TypeError, ValueError, LookupError):
        return None
