"""Settles a trial: defaults filled in, impossible combinations refused. What is left out stays null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raysweep.config.criterion import is_mask_file, reads_statistics
from raysweep.config.field_groups import (
    LORA,
    MODEL_LOSSES,
    RECOVERY_FIELDS,
    RETRAIN_DEFAULTS,
    RETRAIN_FIELDS,
    STEP_FIELDS,
    UNIT_LOSSES,
)
from raysweep.config.fields import allowed_values, default_of, nearest_field
from raysweep.config.spellings import UNSTRUCTURED, parse_pattern
from raysweep.errors import UsageError

if TYPE_CHECKING:
    from raysweep.config.trial import SettingPairs, Trial

_SPARSITY_TOLERANCE = 1e-9  # 0.33333333333 is meant to be 1 - 2/3


def mask_fields(trial: Trial) -> dict[str, Any]:
    """The fields that say which weights go, as far as they apply. Raises UsageError."""
    criterion = _required(trial, "criterion", f"recovery {trial.recovery!r}")
    if is_mask_file(criterion):
        return {"criterion": criterion}
    pattern = _given_or_default(trial, "pattern")
    fields: dict[str, Any] = {
        "criterion": criterion,
        "pattern": pattern,
        "sparsity": _sparsity(trial, pattern),
    }
    applying = ["targets", "ignore"]
    if reads_statistics(criterion):
        applying.append("statistics_stream")
    if criterion == "sparsegpt":
        applying += ["dampening", "column_block"]
    elif pattern == UNSTRUCTURED:
        applying.append("comparison_group")
    if criterion == "ria":
        applying.append("ria_power")
    fields |= {name: _given_or_default(trial, name) for name in applying}
    _check_mask(trial, fields)
    return fields


def _check_mask(trial: Trial, fields: dict[str, Any]) -> None:
    if fields.get("statistics_stream") == "recovered" and trial.recovery != "reconstruct":
        raise UsageError(
            f"statistics_stream 'recovered' needs recovery 'reconstruct', and recovery is {trial.recovery!r}",
            where="statistics_stream",
            allowed="dense | pruned",
        )
    if fields["criterion"] != "sparsegpt":
        return
    if trial.comparison_group == "matrix":
        raise UsageError(
            "comparison_group 'matrix' does not apply to sparsegpt, which ranks all rows of one block of columns",
            where="comparison_group",
            allowed="row, or leave it out",
            remedy="put sparsegpt into a group of its own",
        )
    group, block = parse_pattern(fields["pattern"]), fields["column_block"]
    if group is not None and block % group[1]:
        raise UsageError(
            f"column_block {block} cannot be cut into groups of {group[1]}, as pattern {fields['pattern']} asks",
            where="column_block",
            allowed=f"a multiple of {group[1]}",
        )


def _sparsity(trial: Trial, pattern: str) -> Any:
    parsed = parse_pattern(pattern)
    if parsed is None:
        sparsity = _required(trial, "sparsity", "the pattern 'unstructured'")
        if isinstance(sparsity, tuple):
            return tuple((name, float(value) + 0.0) for name, value in sparsity)
        return float(sparsity) + 0.0  # -0.0 is 0.0
    kept, group = parsed
    implied = (group - kept) / group
    fits = not isinstance(trial.sparsity, tuple) and (
        trial.sparsity is None or abs(trial.sparsity - implied) <= _SPARSITY_TOLERANCE
    )
    if not fits:
        raise UsageError(
            f"sparsity {trial.sparsity!r} contradicts pattern {pattern}",
            where="sparsity",
            allowed=f"{implied!r}, or leave it out",
            remedy="put patterns and sparsities that do not belong together into groups of their own",
        )
    return implied


def recovery_fields(trial: Trial) -> dict[str, Any]:
    """The fields of reconstruction, as far as they apply. Raises UsageError."""
    _required(trial, "granularity", "recovery 'reconstruct'")
    fields = {name: _given_or_default(trial, name) for name in RECOVERY_FIELDS}
    _check_recovery(trial, fields)
    if fields["optimizer"] == "exact":
        fields |= dict.fromkeys(STEP_FIELDS)
    else:
        _required(trial, "learning_rate", "recovery 'reconstruct'")
    if fields["trainable"] not in LORA:
        fields |= {"lora_rank": None, "lora_alpha": None}
    if fields["granularity"] == "matrix" and fields["trainable"] == "lora+norms":
        fields["trainable"] = "lora"  # there is no norm in a matrix
    return fields


def _check_recovery(trial: Trial, fields: dict[str, Any]) -> None:
    _check_one_of(trial, "loss", fields["loss"], UNIT_LOSSES)
    _check_one_of(trial, "trainable", fields["trainable"], ("all", "weights", *LORA))
    if fields["input_stream"] == "dense" and fields["target_stream"] == "pruned":
        raise UsageError(
            "target_stream 'pruned' needs a pruned input: on dense inputs the dense unit gives the dense target",
            where="target_stream",
            allowed="dense, or input_stream: pruned as well",
        )
    if fields["optimizer"] != "exact":
        return
    needed = {"granularity": ("matrix",), "loss": ("mse",), "trainable": ("all", "weights")}
    for name, values in needed.items():
        if fields[name] not in values:
            raise UsageError(
                f"optimizer 'exact' solves a least squares problem of one matrix; {name} is {fields[name]!r}",
                where=name,
                allowed=" | ".join(values),
                remedy="or choose optimizer adamw or sgd",
            )


def retrain_fields(trial: Trial) -> dict[str, Any]:
    """The fields of retraining, as far as they apply. Raises UsageError."""
    fields = {name: _given_or_default(trial, name) for name in RETRAIN_FIELDS}
    for name, default in RETRAIN_DEFAULTS.items():
        fields[name] = default if getattr(trial, name) is None else getattr(trial, name)
    _check_one_of(trial, "loss", fields["loss"], MODEL_LOSSES)
    _check_one_of(trial, "optimizer", fields["optimizer"], ("adamw",))
    _required(trial, "learning_rate", "recovery 'retrain'")
    _check_retraining(trial, fields)
    if fields["trainable"] not in LORA:
        fields |= {"lora_rank": None, "lora_alpha": None}
    if trial.start_from is not None:
        fields["start_from"] = _start_pairs(trial)
    return fields


def _check_one_of(trial: Trial, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{name} {value!r} does not apply to recovery {trial.recovery!r}",
            where=name,
            allowed=" | ".join(allowed),
            remedy="put recoveries that need different values into groups of their own",
        )


def _check_retraining(trial: Trial, fields: dict[str, Any]) -> None:
    if fields["offload"] == "cpu" and fields["zero_stage"] == 0:
        raise UsageError(
            "offload 'cpu' needs ZeRO, and zero_stage is 0",
            where="offload",
            allowed="none, or zero_stage 1 to 3",
        )
    batch, pieces = fields["batch_size"], fields["gradient_accumulation"]
    if batch % pieces:
        divisors = [number for number in range(1, batch + 1) if batch % number == 0]
        raise UsageError(
            f"batch_size {batch} cannot be cut into {pieces} equal pieces",
            where="gradient_accumulation",
            allowed=" | ".join(map(str, divisors)),
        )


def _start_pairs(trial: Trial) -> SettingPairs:
    """The fields of the reconstruction that retraining starts from; those at their default are left out."""
    given = dict(trial.start_from or ())
    unknown = [name for name in given if name not in RECOVERY_FIELDS]
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is no field of a reconstruction that retraining could start from",
            where="start_from",
            allowed=", ".join(RECOVERY_FIELDS),
            nearest=nearest_field(unknown[0], list(RECOVERY_FIELDS)),
        )
    try:
        settled = trial.reconstruction(given).identity()
    except UsageError as error:
        raise error.inside("start_from.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"][:1]))
        raise UsageError(
            f"{name} cannot be {problem['input']!r}",
            where=f"start_from.{name}",
            allowed=allowed_values(type(trial).model_fields[name]),
        ) from None
    return tuple((name, settled[name]) for name in sorted(RECOVERY_FIELDS) if name in settled)


def settled_seed(trial: Trial, fields: dict[str, Any]) -> int | None:
    """The seed, null where the trial draws nothing. fields: as they are settled so far"""
    seeded = fields["criterion"] == "random" or fields["shuffle"] or fields["trainable"] in LORA
    return (trial.seed or 0) if seeded else None


def _given_or_default(trial: Trial, name: str) -> Any:
    given = getattr(trial, name)
    return default_of(type(trial).model_fields[name]) if given is None else given


def _required(trial: Trial, name: str, by: str) -> Any:
    value = getattr(trial, name)
    if value is None:
        allowed = allowed_values(type(trial).model_fields[name])
        raise UsageError(f"{name} is missing; {by} needs it", where=name, allowed=allowed)
    return value
