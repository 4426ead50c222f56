"""The table of a sweep: what varies between its trials beside their numbers, in an order that compares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.config.field_groups import LORA, MASK_FIELDS, RECOVERY_FIELDS, RETRAIN_FIELDS, STEP_FIELDS
from raysweep.config.labels import label_of
from raysweep.config.spellings import UNSTRUCTURED, window_length
from raysweep.config.trial import Trial
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


def summary_table(rows: pd.DataFrame, sort: str | None = None) -> pd.DataFrame:
    """The rows of `load_results`, one for each finished trial, with the columns that compare them.

    The index is `trial_id`. First come the columns that vary (`criterion` with its comparison group, as in
    `wanda/row`), then the measures that any of them has, all under their names in `rows`. The dense row comes first,
    then mask by mask the pruned row and its recoveries.

    sort: order by this column of `rows` instead, lowest first; with a minus (`-sparsity`) highest first
    Raises UsageError for an unknown column.
    """
    column, _ = _sort_column(sort, rows.columns)
    table = sorted_rows(_with_labels(rows[rows["status"] == "finished"]), sort)
    labels = [name for name in _filled_labels(table) if _varies(table, name)]
    measured = [name for name in MEASURES[1:] if table[name].notna().any() or table.empty]
    measures = [*MEASURES[:1], *_other_perplexities(table), *_tasks(table), *measured]
    shown = [*labels, *measures, *([column] if column else [])]
    return table.set_index("trial_id", drop=False)[list(dict.fromkeys(shown))]


def sorted_rows(rows: pd.DataFrame, sort: str | None = None) -> pd.DataFrame:
    """All columns of the rows in the order of `summary_table`."""
    column, descending = _sort_column(sort, rows.columns)
    if column is None:
        return rows.iloc[_reading_order(rows)]
    return rows.sort_values(column, ascending=not descending, kind="stable", na_position="last")


def fixed_columns(rows: pd.DataFrame) -> dict[str, Any]:
    """The columns that tell trials apart in other sweeps and are equal in this one, with their value."""
    table = _with_labels(rows)
    alike = (name for name in _filled_labels(table) if name != "recovery" and not _varies(table, name))
    return {name: _plain(values[0]) for name in alike if len(values := _values(table, name)) == 1}


def failures(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Label and reason of every failed trial."""
    return [
        (trial_label(row), str(row["error"]) if pd.notna(row["error"]) else "no reason was recorded")
        for row in records(rows[rows["status"] == "failed"])
    ]


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain Python values, None where a column does not apply."""
    if len(rows) == 0:  # for which pandas would take milliseconds, with a hundred columns
        return []
    return [
        {str(name): None if pd.isna(value) else _plain(value) for name, value in row.items()}
        for row in rows.to_dict("records")
    ]


def plain_values(column: pd.Series) -> list[Any]:
    """A column as plain Python values, None where it does not apply."""
    return [None if pd.isna(value) else _plain(value) for value in column]


def trial_label(row: Mapping[str, Any]) -> str:
    """The trial's short name, as progress lines show it; its identity where the fields make no trial."""
    try:
        label = label_of(Trial.from_columns(dict(row)))
    except (UsageError, ValueError):
        return str(row["trial_id"])
    seed = row.get("calibration_seed")
    return label + (f" calibration.seed={seed}" if seed else "")


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, which strict settings ask for."""
    return value.item() if hasattr(value, "item") else value


def mask_groups(table: pd.DataFrame) -> list[int]:
    """For each row of a summary table the number of its mask; the dense row has one of its own."""
    names = [name for name in (*MASK_COLUMNS, *LATER_MASK_FIELDS) if name in table]
    dense = table["recovery"].eq("dense") if "recovery" in table else pd.Series(False, index=table.index)
    keys = [
        (bool(is_dense), *map(str, key)) for is_dense, key in zip(dense, _tuples(table, names), strict=True)
    ]
    numbers: list[int] = []
    for place, key in enumerate(keys):
        numbers.append(numbers[-1] + (key != keys[place - 1]) if place else 0)
    return numbers


def best_rows(rows: pd.DataFrame, metric: str, mode: str, compare_within: Sequence[str]) -> set[str]:
    """The trial_id of the best finished trial of every cell that has more than one to choose from."""
    names = [name for name in compare_within if name in rows]
    if metric not in rows or not names:
        return set()
    usable = rows[(rows["status"] == "finished") & rows[metric].notna()]
    best: set[str] = set()
    for _, cell in usable.groupby(names, dropna=False, sort=False):
        if len(cell) > 1:
            place = cell[metric].idxmin() if mode == "min" else cell[metric].idxmax()
            best.add(str(cell.at[place, "trial_id"]))
    return best


def _with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """With `criterion` as people write it, and `evaluation` where the rows were not measured alike."""
    table = rows.copy()
    grouped = table["comparison_group"].notna()
    table.loc[grouped, "criterion"] = table["criterion"] + "/" + table["comparison_group"]
    table["start_from"] = table["start_from"].map(_start_words, na_action="ignore")
    table["data"] = table["data"].map(_data_words, na_action="ignore")
    protocols = table["evaluation_protocol"] if "evaluation_protocol" in table else pd.Series(dtype=object)
    if protocols.nunique() > 1:
        table["evaluation"] = [protocol_words(text) for text in protocols]
    return table


def protocol_words(text: Any) -> str | None:
    """pystdlib 64 x 256: the first entry with its windows and their length."""
    try:
        entry = json.loads(text)["perplexity"][0]
        return f"{entry['name']} {entry.get('max_windows', 'all')} x {entry['sequence_length']}"
    except (TypeError, ValueError, LookupError):
        return None


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


def _filled_labels(table: pd.DataFrame) -> list[str]:
    """The columns that may tell trials apart: `recovery`, and of the others those that apply to some trial."""
    filled = {str(name) for name in table.columns[table.notna().any()]}
    return [name for name in LABELS if name in filled or (name == "recovery" and name in table)]


def _values(table: pd.DataFrame, name: str) -> list[Any]:
    return list(table[name].dropna().unique())


def _varies(table: pd.DataFrame, name: str) -> bool:
    """Whether a column tells trials apart. Null is a value only where the field applies."""
    if name == "recovery":
        return True
    if name == "seed" and _follows_calibration_seed(table):
        return False
    if name == "model_hash":
        return bool((table.groupby("model")["model_hash"].nunique() > 1).any())
    if name == "pattern":
        return bool({*_values(table, name)} - {UNSTRUCTURED}) and len(_values(table, name)) > 1
    if name == "sparsity" and _values(table, "pattern") and UNSTRUCTURED not in _values(table, "pattern"):
        return False  # N:M says it
    if name == "granularity" and table["recovery"].eq("retrain").any():
        return bool(_values(table, name))
    if name in (*RECOVERY_FIELDS, *LATER_RECOVERY_FIELDS):
        applies = _applies(table, name)
        values = table.loc[applies, name]  # of this column alone: rows have a hundred
        if values.nunique(dropna=False) <= 1:
            return False
        by_recovery = values.groupby(table.loc[applies, "recovery"])  # defaults differ between recoveries
        differs = by_recovery.nunique(dropna=False) > 1
        return bool(differs.any()) or (name == "learning_rate" and values.nunique() > 1)
    return len(_values(table, name)) > 1


def _applies(table: pd.DataFrame, name: str) -> pd.Series:
    """The rows to which a field of recovery applies, so that a null among them is a value."""
    if name in STEP_FIELDS:
        return table["learning_rate"].notna()
    if name in ("lora_rank", "lora_alpha"):
        return table["trainable"].isin(LORA)
    if name in LATER_RECOVERY_FIELDS:
        return table["recovery"].eq("retrain")
    return table["recovery"].isin(("reconstruct", "retrain"))


def _follows_calibration_seed(table: pd.DataFrame) -> bool:
    own, calibration = table["seed"], table["calibration_seed"]
    return bool(own.eq(calibration)[own.notna() & calibration.notna()].all())


def _other_perplexities(table: pd.DataFrame) -> list[str]:
    """The perplexities of all evaluation entries but the first, which is `perplexity` itself."""
    names = [name for name in map(str, table) if name.startswith(PERPLEXITY_PREFIX)]
    first = table["perplexity"]
    return [name for name in names if table[name].notna().any() and not table[name].equals(first)]


def _tasks(table: pd.DataFrame) -> list[str]:
    """The columns of tasks that some row has a value of."""
    return [name for name in map(str, table) if name.startswith(TASK_PREFIX) and table[name].notna().any()]


def _reading_order(table: pd.DataFrame) -> list[int]:
    """Models in the order in which they ran; in each the dense row, which has no mask, then mask by mask."""
    models = {model: place for place, model in enumerate(table["model"].dropna().unique())}
    names = [name for name in LABELS if name in table]
    keys = []
    for place, row in enumerate(records(table[names])):
        parts = [_sort_key(name, row[name]) for name in names if name != "model"]
        keys.append((models.get(row["model"], -1), parts, place))
    return [key[-1] for key in sorted(keys)]


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


def _sort_column(sort: str | None, columns: Iterable[str]) -> tuple[str | None, bool]:
    if sort is None:
        return None, False
    known, name = list(columns), sort.removeprefix("-")
    if name not in known:
        raise UsageError(
            f"unknown column {name!r} to sort by",
            allowed="any column of the trials, such as " + ", ".join(MEASURES[:4]),
            nearest=nearest_name(name, known),
        )
    return name, sort.startswith("-")


def _tuples(table: pd.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(table[list(names)].itertuples(index=False, name=None)) if names else [()] * len(table)
