"""The questions of the study, each answered by comparisons that share their seeds and all that is not asked about.

Every function takes the rows that `ladder.tuned` chose and returns a comparison a row, with the columns of
`paired.difference`, and

question: what is asked;  stratum: key of the model and sparsity (`settings.stratum_words` names it)
value, reference: what is compared, in words;  contexts: combinations of everything else that the mean is over
missing: pairs (context and seed) of which one side is not there
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from raysweep.analysis.paired import Margin, difference, ratio
from raysweep.analysis.settings import CHOICE, METRIC, QUALITY, RETRAINING, SETTING_COLUMNS, keys_of
from raysweep.config.field_groups import RECOVERY_FIELDS, RETRAIN_FIELDS

COLUMNS = (
    "question",
    "stratum",
    "value",
    "reference",
    "contexts",
    "missing",
    "seeds",
    "mean",
    "reference_mean",
    "difference",
    "spread",
    "low",
    "high",
    "margin",
    "p_difference",
    "p_equivalence",
)
GRANULARITY = "granularity"
BEFORE, AFTER = "criterion before recovery", "criterion after recovery"
EQUAL_DATA, EQUAL_COMPUTE = (
    "reconstruction and retraining at equal data",
    "reconstruction and retraining at equal compute",
)
EFFECTS = {
    "statistics_stream": "stream of the statistics",
    "input_stream": "stream of the inputs",
    "target_stream": "stream of the targets",
    "loss": "loss",
    "trainable": "what is trained",
    "calibration_num_samples": "calibration samples",
    "epochs": "epochs",
}
"""Fields of a reconstruction whose effect is asked about, beside granularity and criterion, and their words."""

FINEST_AS_GOOD, STRONGEST = "subblock", "sparsegpt"  # what the study compares others with (arXiv 2510.14444)
PUT_TOGETHER = {
    "method": ("granularity", "optimizer", "trainable"),
    "mask": ("criterion", "comparison_group"),
}
"""Columns that a column of `with_settings` stands for."""
NOT_OF_MASKS = {*RECOVERY_FIELDS, *RETRAIN_FIELDS, "recovery"}
COSTS = ("device_seconds_standalone", "training_flops", "tokens_unique", "peak_recovery_bytes")
RECONSTRUCTION = "reconstruction"
ALIKE = 1.25  # ratio of costs up to which they count as equal; assumption


def all_questions(rows: pd.DataFrame, margin: Margin) -> pd.DataFrame:
    """The comparisons of a report."""
    return joined(
        [granularity(rows, margin), criteria(rows, margin), retraining(rows, margin), effects(rows, margin)]
    )


def granularity(rows: pd.DataFrame, margin: Margin, reference: str | None = None) -> pd.DataFrame:
    """Reconstruction by units of other sizes against the reference (default: subblock, else the best one)."""
    recovered = rows[rows["recovery"] == "reconstruct"]
    return _compared(GRANULARITY, recovered, "method", margin, reference or FINEST_AS_GOOD)


def criteria(rows: pd.DataFrame, margin: Margin, reference: str | None = None) -> pd.DataFrame:
    """Criteria against the reference (default: SparseGPT, else the best one before recovery), before recovery and after
    reconstruction."""
    chosen = reference or STRONGEST
    before = _compared(BEFORE, rows[rows["recovery"] == "none"], "mask", margin, chosen)
    if reference is None and len(before):
        chosen = Counter(before["reference"]).most_common(1)[0][0]
    after = _compared(AFTER, rows[rows["recovery"] == "reconstruct"], "mask", margin, chosen)
    return joined([before, after])


def effects(rows: pd.DataFrame, margin: Margin) -> pd.DataFrame:
    """Of every field of `EFFECTS` that takes several values among reconstructions, its values against the commonest."""
    recovered = rows[rows["recovery"] == "reconstruct"]
    found = []
    for field, words in EFFECTS.items():
        if field in recovered and recovered[field].nunique() > 1:
            commonest = recovered[field].value_counts().index[0]
            found.append(_compared(words, recovered, field, margin, commonest))
    return joined(found)


def retraining(rows: pd.DataFrame, margin: Margin, method: str | None = None) -> pd.DataFrame:
    """Reconstruction (default: by subblock, else the best one) against retraining of the same masks: with as many
    distinct tokens, and in as much device time, each the best of its kind. Where a sweep has no such retraining there
    is no comparison."""
    recovered = rows[rows["recovery"] == "reconstruct"]
    retrained = rows[rows["method"] == RETRAINING]
    found = []
    for stratum, mine in recovered.groupby("stratum", sort=False):
        chosen = _reference(mine, "method", method or FINEST_AS_GOOD)
        ours, theirs = mine[mine["method"] == chosen], retrained[retrained["stratum"] == stratum]
        for question, cost in ((EQUAL_DATA, "tokens_unique"), (EQUAL_COMPUTE, "device_seconds_standalone")):
            pairs = _pairs(*_alike_in(cost, ours, theirs))
            if len(pairs):
                words = {"value": f"{RECONSTRUCTION} ({chosen})", "reference": RETRAINING}
                found.append(_of_pairs(question, str(stratum), pairs, margin) | words)
    return pd.DataFrame(found, columns=list(COLUMNS))


def cost_ratios(rows: pd.DataFrame, method: str | None = None) -> pd.DataFrame:
    """How many times the cost of reconstruction (as in `retraining`) the best retraining of the same masks takes, over
    masks and seeds.

    Columns: stratum, method, cost (a column of `COSTS`), pairs, ratio, low, high (`paired.ratio`)
    """
    recovered, retrained = rows[rows["recovery"] == "reconstruct"], rows[rows["method"] == RETRAINING]
    found = []
    for stratum, mine in recovered.groupby("stratum", sort=False):
        chosen = _reference(mine, "method", method or FINEST_AS_GOOD)
        sides = _of_the_same_masks(mine[mine["method"] == chosen], retrained[retrained["stratum"] == stratum])
        for cost in COSTS:
            pairs = _pairs(*sides, measure=cost).dropna()
            if len(pairs):
                about = {"stratum": stratum, "method": chosen, "cost": cost, "pairs": len(pairs)}
                found.append(about | ratio(list(pairs["reference"]), list(pairs["value"])))
    return pd.DataFrame(found, columns=["stratum", "method", "cost", "pairs", "ratio", "low", "high"])


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """What each method gives and takes: by stratum and method the means over masks and seeds of quality and cost.

    rows: of `ladder.tuned`. Columns: stratum, method, trials, perplexity, validation_perplexity,
    output_error_calibration, device_seconds_standalone, training_flops, tokens_unique, peak_recovery_bytes
    """
    measures = [
        QUALITY,
        METRIC,
        "output_error_calibration",
        *COSTS,
    ]
    grouped = rows.groupby(["stratum", "method"], sort=False)
    means = grouped[[name for name in measures if name in rows]].mean()
    means.insert(0, "trials", grouped.size())
    return means.reset_index()


def _compared(question: str, rows: pd.DataFrame, column: str, margin: Margin, reference: Any) -> pd.DataFrame:
    """Every value of the column against the reference (or the best where that is not there), stratum by stratum."""
    found = []
    asked = PUT_TOGETHER.get(column, (column,))
    for stratum, mine in rows.groupby("stratum", sort=False):
        chosen = _reference(mine, column, reference)
        for value in mine[column].dropna().unique():
            if value != chosen:
                pairs = _paired(mine[mine[column] == value], mine[mine[column] == chosen], asked)
                if len(pairs):
                    words = {"value": str(value), "reference": str(chosen)}
                    found.append(_of_pairs(question, str(stratum), pairs, margin) | words)
    return pd.DataFrame(found, columns=list(COLUMNS))


def _reference(rows: pd.DataFrame, column: str, wanted: Any) -> Any:
    values = rows.groupby(column)[CHOICE].mean()
    if (rows[column] == wanted).any() or values.isna().all():
        return wanted
    return values.idxmin()


def _paired(values: pd.DataFrame, references: pd.DataFrame, asked: Iterable[str]) -> pd.DataFrame:
    """One row a context and seed, with `value` and `reference`, null where that side is not there.

    A context is what both sides have in common beside the columns that are asked about. Columns that do not apply to
    one side, such as the epochs of an exact recovery, need not agree; where several settings of a side are left then,
    its best one stands for it.
    """
    columns = [
        name
        for name in SETTING_COLUMNS
        if name in values
        and name not in {*asked}
        and values[name].notna().any()
        and references[name].notna().any()
    ]
    return _pairs(_best_of_each_context(values, columns), _best_of_each_context(references, columns))


def _contexts(rows: pd.DataFrame, columns: Sequence[str]) -> pd.Series[str]:
    """`keys_of` columns of the setting, once for each setting: there are few, and many rows."""
    settings = rows.drop_duplicates("setting")
    return rows["setting"].map(dict(zip(settings["setting"], keys_of(settings, columns), strict=True)))


def _best_of_each_context(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """With `context`; of several settings in one the best mean of what is chosen by."""
    frame = rows.assign(context=_contexts(rows, columns))
    means = frame.groupby(["context", "setting"], sort=False)[CHOICE].mean().fillna(np.inf)
    best = set(means.groupby(level="context").idxmin()) if len(means) else set()
    mine = [key in best for key in zip(frame["context"], frame["setting"], strict=True)]
    return frame[np.array(mine, dtype=bool)]  # an empty list would choose no columns


def _pairs(values: pd.DataFrame, references: pd.DataFrame, measure: str = QUALITY) -> pd.DataFrame:
    sides = [side.groupby(["context", "repeat"], sort=False)[measure].mean() for side in (values, references)]
    contexts = [side.index.get_level_values("context") for side in sides]
    both = pd.concat(sides, axis=1, keys=["value", "reference"])
    return both[both.index.get_level_values("context").isin(contexts[0].intersection(contexts[1]))]


def _of_the_same_masks(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The best reconstructions and retrainings of each mask, whose columns are their context."""
    columns = [name for name in SETTING_COLUMNS if name in ours and name not in NOT_OF_MASKS]
    return _best_of_each_context(ours, columns), _best_of_each_context(theirs, columns)


def _alike_in(cost: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The best reconstruction of each mask, and the best of the retrainings of it whose mean cost is alike."""
    columns = [name for name in SETTING_COLUMNS if name in ours and name not in NOT_OF_MASKS]
    ours = _best_of_each_context(ours, columns)
    theirs = theirs.assign(context=_contexts(theirs, columns))
    means = theirs.groupby(["context", "setting"])[cost].mean()
    ratios = means / ours.groupby("context")[cost].mean().reindex(means.index, level="context")
    alike = set(ratios[(ratios <= ALIKE) & (ratios >= 1 / ALIKE)].index)
    kept = [key in alike for key in zip(theirs["context"], theirs["setting"], strict=True)]
    return ours, _best_of_each_context(theirs[np.array(kept, dtype=bool)], columns)


def _of_pairs(question: str, stratum: str, pairs: pd.DataFrame, margin: Margin) -> dict[str, Any]:
    """Of each seed the mean over the contexts: seeds are what is repeated, contexts are what is asked about."""
    whole = pairs.dropna()
    by_seed = whole.groupby(level="repeat")[["value", "reference"]].mean()
    contexts = whole.index.get_level_values("context").nunique()
    about = {
        "question": question,
        "stratum": stratum,
        "contexts": contexts,
        "missing": len(pairs) - len(whole),
    }
    return about | difference(list(by_seed["value"]), list(by_seed["reference"]), margin)


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Comparisons of several questions in one frame."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(COLUMNS))
