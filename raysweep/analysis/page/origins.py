"""Where the numbers come from: models, data, machines and versions, and how perplexity was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from raysweep.analysis.page import words
from raysweep.analysis.report import Report
from raysweep.analysis.rows import records

MOST_NAMED = 8  # values of a column that are named


def origins(report: Report) -> list[tuple[str, list[str]]]:
    """Titles with what is said of each; what no row tells is left out."""
    rows = report.rows
    told = [
        ("Model", _together(rows, ["model", "model_hash", "dtype"], "{}", ", contents {}", ", {}")),
        ("Calibration", _calibration(rows)),
        ("Seeds", _values(rows, "calibration_seed")),
        ("Evaluation", evaluation(report)),
        ("Devices", _together(rows, ["device_name", "devices"], "{}", ", {} at work")),
        ("Shards", _values(rows, "shards")),
        ("Versions", _versions(rows)),
        ("Time", _time(rows)),
        ("Trouble", _trouble(rows)),
    ]
    return [(title, said) for title, said in told if said]


def evaluation(report: Report) -> list[str]:
    """How perplexity was measured, as the rows have it, with the data sets where a space names them."""
    entries = report.space.evaluation.perplexity if report.space else ()
    texts = {one.name: f"{one.dataset}, split {one.split}" for one in entries}
    said: list[str] = []
    for protocol in _distinct(report.rows, "evaluation_protocol"):
        try:
            said += _protocol_words(json.loads(protocol), texts)
        except (TypeError, ValueError, LookupError, AttributeError):  # of another program
            said.append(str(protocol)[:200])
    return list(dict.fromkeys(said))


def _protocol_words(protocol: dict[str, Any], texts: dict[str, str]) -> list[str]:
    said = []
    for place, entry in enumerate(protocol["perplexity"]):
        windows = entry.get("max_windows")
        text = str(entry["name"]) + (f" ({texts[entry['name']]})" if entry["name"] in texts else "")
        how = "the whole text in windows" if windows is None else words.count(windows, "window")
        begin = ", each behind the BOS token" if entry.get("bos_each_window") else ""
        reported = "" if place else "perplexity on "
        said.append(f"{reported}{text}: {how} of {entry['sequence_length']} tokens{begin}")
    if held := protocol.get("validation"):
        said.append(
            f"chosen by {held['samples']} held-out sequences of {held['sequence_length']} tokens, seed {held['seed']}"
        )
    return said


def _calibration(rows: pd.DataFrame) -> list[str]:
    names = ["dataset", "num_samples", "sequence_length", "sampling"]
    columns = [f"calibration_{name}" for name in names]
    return _together(rows, columns, "{}", ": {} sequences", " of {} tokens", ", {}")


def _versions(rows: pd.DataFrame) -> list[str]:
    names = ("raysweep", "torch", "transformers", "ray")
    return [f"{name} {', '.join(known)}" for name in names if (known := _values(rows, f"{name}_version"))]


def _time(rows: pd.DataFrame) -> list[str]:
    said = []
    if {"started_at", "finished_at"} <= {*rows} and rows["finished_at"].notna().any():
        begin, end = rows["started_at"].min(), rows["finished_at"].max()
        said.append(f"{begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC")
    if "device_seconds" in rows and rows["device_seconds"].notna().any():
        said.append(f"{words.duration(float(rows['device_seconds'].sum()))} of devices in all")
    return said


def _trouble(rows: pd.DataFrame) -> list[str]:
    said = []
    for name, thing in (("retries", "trial started again"), ("fallbacks", "numerical fallback")):
        number = int(rows[name].fillna(0).sum()) if name in rows else 0
        if number:
            said.append(f"{number:,} {thing}{'s' if name == 'fallbacks' and number != 1 else ''}")
    return said


def _together(rows: pd.DataFrame, columns: Iterable[str], *patterns: str) -> list[str]:
    """Every distinct combination in words; of what is null the pattern is left out."""
    pairs = list(zip(columns, patterns, strict=True))
    known = [name for name, _ in pairs if name in rows]
    if not known:
        return []
    distinct = records(rows[known].dropna(how="all").drop_duplicates())
    said = [
        "".join(pattern.format(row[name]) for name, pattern in pairs if row.get(name) is not None)
        for row in distinct
    ]
    full = [
        one
        for one in dict.fromkeys(said)
        if not any(one != other and other.startswith(one) for other in said)
    ]
    return _some(full)


def _values(rows: pd.DataFrame, name: str) -> list[str]:
    return (
        [", ".join(_some([str(value) for value in _distinct(rows, name)]))] if _distinct(rows, name) else []
    )


def _distinct(rows: pd.DataFrame, name: str) -> list[Any]:
    return sorted(rows[name].dropna().unique().tolist()) if name in rows else []


def _some(values: list[str]) -> list[str]:
    more = len(values) - MOST_NAMED
    return [*values[:MOST_NAMED], f"and {more} more"] if more > 0 else values
