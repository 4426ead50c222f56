"""The table of a sweep: what varies between its trials beside their numbers, in an order that compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.analysis.rows import Row, protocol_words
from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.config.field_groups import LORA, MASK_FIELDS, RECOVERY_FIELDS, RETRAIN_FIELDS, STEP_FIELDS
from raysweep.config.spellings import UNSTRUCTURED, window_length
from raysweep.errors import UsageError, nearest_name
from raysweep.results.schema import PERPLEXITY_PREFIX, TASK_PREFIX

MASK_COLUMNS = (
    "model",
    "model_hash",
    "dtype",
    "sparsity",
    "sparsity_by_name",
    "pattern",
    "criterion",
    "statistics_stream",
)
LATER_MASK_FIELDS = tuple(name for name in MASK_FIELDS if name not in (*MASK_COLUMNS, "comparison_group"))
LATER_RECOVERY_FIELDS = tuple(name for name in RETRAIN_FIELDS if name not in RECOVERY_FIELDS)
LABELS = (
    *MASK_COLUMNS,
    *LATER_MASK_FIELDS,
    "recovery",
    *RECOVERY_FIELDS,
    *LATER_RECOVERY_FIELDS,
    *CALIBRATION_COLUMNS,
    "seed",
    "evaluation",
)
"""Columns that tell trials apart, in the order of the table."""

MEASURES = (
    "perplexity",
    "validation_perplexity",
    "output_error_calibration",
    "device_seconds",
    "device_seconds_standalone",
    "peak_recovery_bytes",
)
RECOVERIES = ("dense", "none", "reconstruct", "retrain")
GRANULARITIES = ("matrix", "subblock", "block")
MOST_BLOCKS = 10_000  # more than a window may have
_ORDERS = {"recovery": RECOVERIES, "granularity": GRANULARITIES}  # others follow, by name


@dataclass(frozen=True)
class Summary:
    """What the table of a sweep shows.

    columns: the names of those that compare the trials: first what varies, then the measures that any of them has
    rows: the finished trials in the order of the table. They have all columns of their sweep; of them `criterion` comes
    with its comparison group (`wanda/row`), and `start_from`, `data` and `evaluation` as people write them
    """

    columns: Sequence[str]
    rows: Sequence[Row]

    def values(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


def summary_table(rows: Sequence[Row], sort: str | None = None) -> Summary:
    """The table of the trials of a sweep: the dense row first, then mask by mask the pruned row and its recoveries.

    sort: order by this column of `rows` instead, lowest first; with a minus (`-sparsity`) highest first
    Raises UsageError for an unknown column.
    """
    column, _ = sort_column(sort, rows)
    table = sorted_rows(_with_labels([row for row in rows if row["status"] == "finished"]), sort)
    labels = [name for name in _filled_labels(table) if _varies(table, name)]
    measured = [name for name in MEASURES[1:] if _values(table, name)]
    measures = [*MEASURES[:1], *_other_perplexities(table), *_tasks(table), *measured]
    shown = [*labels, *measures, *([column] if column else [])]
    return Summary(list(dict.fromkeys(shown)), table)


def sorted_rows(rows: Sequence[Row], sort: str | None = None) -> list[Row]:
    """The rows in the order of `summary_table`; last those to which the column does not apply."""
    if not rows:
        return []
    column, descending = sort_column(sort, rows)
    if column is None:
        return _in_reading_order(rows)
    told = [row for row in rows if row[column] is not None]
    ordered = sorted(told, key=lambda row: row[column], reverse=descending)
    return [*ordered, *(row for row in rows if row[column] is None)]


def sort_column(sort: str | None, rows: Sequence[Row]) -> tuple[str | None, bool]:
    """The column to sort by, and whether the highest comes first. Raises UsageError where the rows have no such one."""
    if sort is None:
        return None, False
    known, name = _columns(rows), sort.removeprefix("-")
    if name not in known:
        raise UsageError(
            f"unknown column {name!r} to sort by",
            allowed="any column of the trials, such as " + ", ".join(MEASURES[:4]),
            nearest=nearest_name(name, known),
        )
    return name, sort.startswith("-")


def fixed_columns(table: Summary) -> dict[str, Any]:
    """The columns that tell trials apart in other sweeps and are equal in this one, with their value."""
    rows = table.rows
    alike = (name for name in _filled_labels(rows) if name != "recovery" and not _varies(rows, name))
    return {name: values[0] for name in alike if len(values := _values(rows, name)) == 1}


def mask_groups(table: Summary) -> list[int]:
    """For each row the number of its mask; the dense row has one of its own."""
    names = [name for name in (*MASK_COLUMNS, *LATER_MASK_FIELDS) if name in table.columns]
    keys = [(row["recovery"] == "dense", *(row[name] for name in names)) for row in table.rows]
    numbers: list[int] = []
    for place, key in enumerate(keys):
        numbers.append(numbers[-1] + (key != keys[place - 1]) if place else 0)
    return numbers


def best_rows(rows: Sequence[Row], metric: str, mode: str, compare_within: Sequence[str]) -> set[str]:
    """The trial_id of the best finished trial of every cell that has more than one to choose from."""
    if not compare_within:
        return set()
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "finished" and row.get(metric) is not None:
            cells.setdefault(tuple(row.get(name) for name in compare_within), []).append(row)
    pick = min if mode == "min" else max
    chosen = (pick(cell, key=lambda row: row[metric]) for cell in cells.values() if len(cell) > 1)
    return {row["trial_id"] for row in chosen}


def _with_labels(rows: Sequence[Row]) -> list[Row]:
    """With the words of `Summary`; `evaluation` only where they were not measured alike."""
    measured_alike = len(_values(rows, "evaluation_protocol")) <= 1
    return [dict(row) | _labels(row, measured_alike) for row in rows]


def _labels(row: Row, measured_alike: bool) -> dict[str, Any]:
    criterion, group, start, data = (
        row[name] for name in ("criterion", "comparison_group", "start_from", "data")
    )
    return {
        "criterion": criterion if criterion is None or group is None else f"{criterion}/{group}",
        "start_from": start if start is None else _start_words(start),
        "data": data if data is None else _data_words(data),
        "evaluation": None if measured_alike else protocol_words(row["evaluation_protocol"]),
    }


def _start_words(text: str) -> str:
    """block 0.001: granularity and learning rate, or what else tells it apart."""
    try:
        settings = dict(json.loads(text))
        first = [settings.pop("granularity"), settings.pop("learning_rate", settings.pop("optimizer", ""))]
    except (TypeError, ValueError, LookupError):  # a row that another program wrote
        return text
    return " ".join(map(str, [*first, *(f"{name}={value}" for name, value in settings.items())])).strip()


def _data_words(text: str) -> str:
    """24 x 128 builtin:pystdlib"""
    try:
        data = json.loads(text)
        return f"{data['num_samples']} x {data['sequence_length']} {data['dataset']}"
    except (TypeError, ValueError, LookupError):  # a row that another program wrote
        return text


def _filled_labels(rows: Sequence[Row]) -> list[str]:
    """The columns that may tell trials apart: `recovery`, and of the others those that apply to some trial."""
    return [name for name in LABELS if name == "recovery" or any(row.get(name) is not None for row in rows)]


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """The different ones of a column, in the order of the rows."""
    return list(dict.fromkeys(value for row in rows if (value := row.get(name)) is not None))


def _varies(rows: Sequence[Row], name: str) -> bool:
    """Whether a column tells trials apart. Null is a value only where the field applies."""
    if name == "recovery":
        return True
    if name == "seed" and _follows_calibration_seed(rows):
        return False
    if name == "model_hash":
        return _vary_within([(row["model"], row[name]) for row in rows if row[name] is not None])
    if name == "pattern":
        return bool({*_values(rows, name)} - {UNSTRUCTURED}) and len(_values(rows, name)) > 1
    if name == "sparsity" and _values(rows, "pattern") and UNSTRUCTURED not in _values(rows, "pattern"):
        return False  # N:M says it
    if name == "granularity" and any(row["recovery"] == "retrain" for row in rows):
        return bool(_values(rows, name))
    if name in (*RECOVERY_FIELDS, *LATER_RECOVERY_FIELDS):
        told = [(row["recovery"], row[name]) for row in rows if _applies(row, name)]
        values = {value for _, value in told}
        if len(values) <= 1:
            return False
        # Defaults differ between recoveries.
        return _vary_within(told) or (name == "learning_rate" and len(values - {None}) > 1)
    return len(_values(rows, name)) > 1


def _vary_within(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the second ones differ among pairs with the same first one, which null is not."""
    known = {pair for pair in pairs if pair[0] is not None}
    return len(known) > len({first for first, _ in known})


def _applies(row: Row, name: str) -> bool:
    """Whether a field of recovery applies to a trial, so that a null is a value."""
    if name in STEP_FIELDS:
        return row["learning_rate"] is not None
    if name in ("lora_rank", "lora_alpha"):
        return row["trainable"] in LORA
    if name in LATER_RECOVERY_FIELDS:
        return bool(row["recovery"] == "retrain")
    return row["recovery"] in ("reconstruct", "retrain")


def _follows_calibration_seed(rows: Sequence[Row]) -> bool:
    pairs = ((row["seed"], row["calibration_seed"]) for row in rows)
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _other_perplexities(rows: Sequence[Row]) -> list[str]:
    """The perplexities of all evaluation entries but the first, which is `perplexity` itself."""
    names = [name for name in _columns(rows) if name.startswith(PERPLEXITY_PREFIX) and _values(rows, name)]
    return [name for name in names if any(row[name] != row["perplexity"] for row in rows)]


def _tasks(rows: Sequence[Row]) -> list[str]:
    """The columns of tasks that some row has a value of."""
    return [name for name in _columns(rows) if name.startswith(TASK_PREFIX) and _values(rows, name)]


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(rows[0]) if rows else []


def _in_reading_order(rows: Sequence[Row]) -> list[Row]:
    """Models in the order in which they ran; in each the dense row, which has no mask, then mask by mask."""
    models = {model: place for place, model in enumerate(_values(rows, "model"))}
    names = [name for name in _filled_labels(rows) if name != "model"]

    def place(row: Row) -> tuple[int, list[tuple[int, float, str]]]:
        return models.get(row["model"], -1), [_sort_key(name, row[name]) for name in names]

    return sorted(rows, key=place)


def _sort_key(name: str, value: Any) -> tuple[int, float, str]:
    """Known words in their own order, numbers by size, texts by letter, null first."""
    if value is None:
        return (0, 0.0, "")
    order = _ORDERS.get(name, ())
    if value in order:
        return (1, float(order.index(value)), "")
    if name == "granularity":  # windows by their length, then the model
        return (2, float(window_length(str(value)) or MOST_BLOCKS), "")
    if name == "pattern":
        return (1, float(value != UNSTRUCTURED), str(value))
    return (2, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))
