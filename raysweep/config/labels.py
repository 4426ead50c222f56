"""Short names of trials, for people."""

from __future__ import annotations

from raysweep.config.field_groups import RETRAIN_DEFAULTS
from raysweep.config.spellings import UNSTRUCTURED
from raysweep.config.trial import Trial

SHOWN_FIELDS = {  # that a label begins with
    "recovery",
    "criterion",
    "sparsity",
    "pattern",
    "comparison_group",
    "granularity",
    "learning_rate",
    "start_from",
    "data",
    "seed",
}


def label_of(trial: Trial) -> str:
    """A short name, such as `wanda/row 0.6 subblock lr=0.001` or `magnitude 2:4`."""
    if trial.is_dense:
        return "dense"
    words = [_mask_words(trial)]
    if not trial.is_pruned_only:
        words += _recovery_words(trial)
    return " ".join(words + _remarkable(trial))


def _recovery_words(trial: Trial) -> list[str]:
    if trial.optimizer == "exact":
        return [str(trial.granularity), "exact"]
    how = "retrain" if trial.granularity is None else trial.granularity
    return [how, f"lr={trial.learning_rate:g}"]


def _mask_words(trial: Trial) -> str:
    criterion = (
        trial.criterion if trial.comparison_group is None else f"{trial.criterion}/{trial.comparison_group}"
    )
    if trial.pattern is None:
        return str(criterion)
    if trial.pattern != UNSTRUCTURED:
        return f"{criterion} {trial.pattern}"
    if isinstance(trial.sparsity, tuple):
        return f"{criterion} " + ",".join(f"{name}={value:g}" for name, value in trial.sparsity)
    return f"{criterion} {trial.sparsity:g}"


def _remarkable(trial: Trial) -> list[str]:
    """What differs from the usual."""
    told = {*SHOWN_FIELDS, "optimizer"} if trial.optimizer == "exact" else SHOWN_FIELDS
    short = {"statistics_stream": "statistics", "input_stream": "input", "target_stream": "target"}
    words = [
        f"{short.get(name, name)}={_plain(value)}"
        for name, value in trial.identity().items()
        if name not in told and not (trial.recovery == "retrain" and RETRAIN_DEFAULTS.get(name) == value)
    ]
    if trial.start is not None:
        words.append(f"after {' '.join(_recovery_words(trial.start))}")
    if trial.data is not None:
        words.append(
            f"on {trial.data.num_samples} x {trial.data.sequence_length} tokens of {trial.data.dataset}"
        )
    return words + ([f"seed={trial.seed}"] if trial.seed else [])


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
