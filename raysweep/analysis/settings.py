"""Which rows belong together: a setting is what seeds repeat and learning rates are tuned in; a stratum holds the
settings that answer the same demand, a model at a sparsity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from raysweep.analysis.rows import protocol_words, records, trial_label
from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.config.spellings import UNSTRUCTURED
from raysweep.config.trial import Trial

SEEDS = ("calibration_seed", "seed")
TUNED = "learning_rate"
MODEL_COLUMNS = ("model", "model_hash", "dtype", "evaluation_protocol")
SETTING_COLUMNS = (
    *MODEL_COLUMNS,
    *(name for name in CALIBRATION_COLUMNS if name not in SEEDS),
    "sparsity_by_name",
    *(name for name in Trial.model_fields if name not in (*SEEDS, TUNED)),
)
"""Columns that are equal among the trials of a setting."""

STRATUM_COLUMNS = (*MODEL_COLUMNS, "sparsity", "sparsity_by_name", "pattern")
"""Columns that are equal among trials that could stand for one another."""

METRIC = "validation_perplexity"  # what is chosen by
CHOICE = "choice"
QUALITY = "perplexity"  # what is reported: measured on the test set, never chosen by
HASH_LETTERS = 8  # of a hash that people read
RETRAINING, PRUNED_ONLY = "retraining", "pruned only"  # methods beside granularities
LABEL_WORDS_OF_ONE_TRIAL = ("lr=", "seed=", "calibration.seed=")


def with_settings(rows: pd.DataFrame, metric: str = METRIC, mode: str = "min") -> pd.DataFrame:
    """The rows of `load_results` that finished or failed, with columns more:

    setting, stratum: equal for rows that belong together
    repeat: what is repeated, equal for rows that are to be paired: the seed of the calibration set; where there is one
        such seed alone, that of the trial
    choice: the number that is chosen by, less is better (`metric`, with the other sign where `mode` is max)
    method: how weights were recovered (`subblock`, `matrix exact`, `retraining`, `pruned only`, `dense`)
    mask: criterion with its comparison group (`wanda/row`)
    Rows that the scheduler stopped are left out: their models are partly dense.
    """
    frame = rows[rows["status"].isin(("finished", "failed"))].copy()
    frame["setting"] = keys_of(frame, SETTING_COLUMNS)
    frame["stratum"] = keys_of(frame, STRATUM_COLUMNS)
    rows_of = records(frame)
    several = frame["calibration_seed"].nunique() > 1
    frame["repeat"] = [_repeat(row, several) for row in rows_of]
    frame[CHOICE] = (frame[metric] if mode == "min" else -frame[metric]) if metric in frame else np.nan
    frame["method"] = [method_of(row) for row in rows_of]
    frame["mask"] = [_mask(row) for row in rows_of]
    return frame


def _repeat(row: Mapping[str, Any], several: bool) -> str:
    """several: whether there are several calibration sets. Orders of steps on one of them are no independent draws."""
    calibration, own = row.get("calibration_seed"), row.get("seed")
    return f"{calibration}" if several or own in (None, calibration) else f"{calibration}/{own}"


def method_of(row: Mapping[str, Any]) -> str:
    recovery, granularity = row["recovery"], row.get("granularity")
    if recovery == "reconstruct":
        return f"{granularity} exact" if row.get("optimizer") == "exact" else str(granularity)
    if recovery == "retrain":
        return RETRAINING if row.get("start_from") is None else f"{RETRAINING} after reconstruction"
    return PRUNED_ONLY if recovery == "none" else str(recovery)


def _mask(row: Mapping[str, Any]) -> str:
    group = row.get("comparison_group")
    return f"{row.get('criterion')}/{group}" if group else f"{row.get('criterion')}"


def keys_of(rows: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """For every row a text of its values in these columns, as far as it has such columns; nulls say nothing."""
    present = [name for name in columns if name in rows]
    return [
        json.dumps({name: value for name, value in row.items() if value is not None})
        for row in records(rows[present])
    ]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """Of what `with_settings` gave, the rows with numbers of a pruned model."""
    return frame[(frame["status"] == "finished") & (frame["recovery"] != "dense")]


def setting_labels(frame: pd.DataFrame) -> dict[str, str]:
    """By setting, how its trials are called, without learning rate and seeds."""
    first = frame.drop_duplicates("setting")
    labels = zip(first["setting"], trial_labels(first), strict=True)
    return {
        setting: " ".join(word for word in label.split() if not word.startswith(LABEL_WORDS_OF_ONE_TRIAL))
        for setting, label in labels
    }


def trial_labels(rows: pd.DataFrame) -> list[str]:
    """The label of every row, with what differs between the calibration sets of these rows."""
    varies = [
        name
        for name in CALIBRATION_COLUMNS
        if name in rows and name not in SEEDS and rows[name].nunique() > 1
    ]
    return [
        " ".join(
            [trial_label(row), *(f"{name.replace('_', '.', 1)}={row[name]}" for name in varies if row[name])]
        )
        for row in records(rows)
    ]


def stratum_words(frame: pd.DataFrame) -> dict[str, str]:
    """By stratum, what tells it apart in this frame: `sparsity 0.6`, `2:4`, and the model where there are several."""
    first = frame.drop_duplicates("stratum")
    varies = [name for name in MODEL_COLUMNS if name in first and first[name].nunique() > 1]
    if "model_hash" in varies and (first.groupby("model")["model_hash"].nunique() <= 1).all():
        varies.remove("model_hash")  # the name says it
    said = {"evaluation_protocol": protocol_words, "model_hash": lambda text: text[:HASH_LETTERS]}
    words = {}
    for row in records(first):
        named = [str(said.get(name, str)(row[name])) for name in varies if row[name] is not None]
        words[row["stratum"]] = ", ".join([*named, mask_words(row)])
    return words


def mask_words(row: Mapping[str, Any]) -> str:
    """sparsity 0.6, 2:4, or masks from files"""
    pattern = row.get("pattern")
    if pattern not in (None, UNSTRUCTURED):
        return str(pattern)
    sparsity, by_name = row.get("sparsity"), row.get("sparsity_by_name")
    if isinstance(sparsity, int | float):
        return f"sparsity {sparsity:g}"
    return "masks from files" if by_name is None else f"sparsity {by_name}"
