"""Sweeps written by hand: rows as trials would leave them, with whatever a test is about."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.config.calibration import CALIBRATION_COLUMNS, CalibrationConfig
from raysweep.config.expansion import PlannedTrial
from raysweep.config.sections import ModelConfig
from raysweep.config.trial import Trial
from raysweep.results.reader import load_results, load_rows
from raysweep.results.schema import PERPLEXITY_PREFIX, planned_columns
from raysweep.results.writer import write_rows

START = datetime(2026, 11, 24, 12, tzinfo=UTC)
MEASURED = {
    "validation_perplexity": 7.5,
    "output_error_calibration": 0.25,
    "device_seconds": 12.0,
    "device_seconds_standalone": 20.0,
    "seconds_total": 10.0,
    "peak_recovery_bytes": 3 << 20,
}


def row(number: int, recovery: str = "reconstruct", **columns: Any) -> dict[str, Any]:
    """The row of the trial that started as number `number`; `columns` are fields of the trial or others."""
    fields = {name: columns.pop(name) for name in Trial.model_fields if name in columns}
    if recovery != "dense":
        fields = {"criterion": "wanda", "sparsity": 0.6} | fields
    if recovery == "reconstruct":
        fields = {"granularity": "subblock", "learning_rate": 1e-3} | fields
    own = {name: columns.pop(name) for name in CALIBRATION_COLUMNS if name in columns}
    calibration = CalibrationConfig(
        dataset="builtin:pystdlib",
        **{name.removeprefix("calibration_"): value for name, value in own.items()},
    )
    planned = PlannedTrial(
        ModelConfig(path=columns.pop("model", "builtin:pystdlib")),
        None if recovery == "dense" else calibration,
        Trial(recovery=recovery, **fields),
    )
    return {
        **planned_columns(planned),
        "trial_id": f"{number:016x}",
        "recovery_id": f"{number:016x}",
        "sweep": "a",
        "status": "finished",
        "dtype": "float32",
        "perplexity": 10.0 + number,
        **MEASURED,
        "started_at": START + timedelta(seconds=number),
        **columns,
    }


def failed(number: int, error: str, **columns: Any) -> dict[str, Any]:
    return (
        row(number, **columns)
        | {"status": "failed", "error": error}
        | dict.fromkeys(["perplexity", *MEASURED])
    )


def quickstart_rows() -> list[dict[str, Any]]:
    """Dense, two criteria, each only pruned and at three granularities, in an order that compares nothing."""
    masks = [{"criterion": "wanda"}, {"criterion": "magnitude"}]
    recovered = [
        row(0, **mask, granularity=granularity)
        for mask in masks
        for granularity in ("block", "matrix", "subblock")
    ]
    pruned = [row(0, "none", **mask, peak_recovery_bytes=None) for mask in masks]
    rows = [*recovered, *pruned, row(0, "dense", output_error_calibration=0.0, peak_recovery_bytes=None)]
    return [
        one
        | {
            "trial_id": f"{place:016x}",
            "perplexity": 20.0 - place,
            "perplexity_pystdlib": 20.0 - place,
            "started_at": START + timedelta(seconds=place),
        }
        for place, one in enumerate(rows)
    ]


def write_sweep(folder: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes the rows into the sweep `folder`; returns it."""
    for one in rows:
        names = [name.removeprefix(PERPLEXITY_PREFIX) for name in one if name.startswith(PERPLEXITY_PREFIX)]
        write_rows(folder, one, [], names)
    return folder


def frame(folder: Path, rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The rows as `load_results` gives them."""
    return load_results(write_sweep(folder, rows))


def plain(folder: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as `load_rows` gives them."""
    return load_rows(write_sweep(folder, rows))
