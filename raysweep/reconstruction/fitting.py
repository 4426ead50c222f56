"""Whether a trial fits its model: names, patterns, spans and ranks."""

# O outputs, I inputs of a linear

from __future__ import annotations

from collections.abc import Collection, Mapping

from raysweep.config.criterion import is_mask_file
from raysweep.config.field_groups import LORA
from raysweep.config.names import matches
from raysweep.config.spellings import window_length
from raysweep.config.trial import Trial
from raysweep.errors import UsageError, nearest_name
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.rules import check_n_of_m

Shapes = Mapping[str, tuple[int, int]]
"""(O, I) of linears by full name."""


def check_trial(trial: Trial, linears: Shapes, blocks: int, routed: Collection[str] = ()) -> None:
    """Refuses what the model has no room for. Raises UsageError, whose `where` is the field.

    linears: of the decoder blocks;  blocks: how many there are;  routed: those of the linears that are of experts
    """
    _check_names(trial, list(linears))
    _check_pattern(trial, linears)
    if trial.granularity is not None:
        _check_window(trial, blocks)
        _check_experts(trial, routed)
    if trial.trainable in LORA:
        _check_rank(trial, linears)


def _check_names(trial: Trial, names: list[str]) -> None:
    by_name = trial.sparsity if isinstance(trial.sparsity, tuple) else ()
    given = {
        "targets": trial.targets or (),
        "ignore": trial.ignore or (),
        "sparsity": [name for name, _ in by_name],
    }
    for field, patterns in given.items():
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                last_parts = sorted({name.rpartition(".")[2] for name in names})
                raise UsageError(
                    f"{pattern!r} matches no linear of the model",
                    where=field,
                    allowed=f"{', '.join(last_parts)}; more of the name, such as {names[0]}; or re:REGEX",
                    nearest=nearest_name(pattern, last_parts),
                )
    recipe = MaskRecipe.of(trial)
    if not is_mask_file(recipe.criterion) and not any(map(recipe.prunes, names)):
        raise UsageError(
            "no linear is left to prune: `ignore` takes all that `targets` names, or `sparsity` is 0 for all by name",
            where="sparsity" if by_name and not (trial.targets or trial.ignore) else "targets",
            allowed="names that leave at least one linear to be pruned",
        )


def _check_pattern(trial: Trial, linears: Shapes) -> None:
    recipe = MaskRecipe.of(trial)
    if recipe.n_of_m is None:
        return
    for name, (_, inputs) in linears.items():
        if recipe.prunes(name):
            try:
                check_n_of_m(inputs, *recipe.n_of_m)
            except UsageError as error:
                raise UsageError(
                    f"{name}: {error.what}",
                    where="pattern",
                    allowed=error.allowed,
                    remedy=error.remedy,
                ) from None


def _check_window(trial: Trial, blocks: int) -> None:
    length = window_length(str(trial.granularity))
    if length is not None and length > blocks:
        raise UsageError(
            f"granularity {trial.granularity} is longer than the model, which has {blocks} blocks",
            where="granularity",
            allowed=f"window:2 to window:{blocks}, or model",
        )


def _check_experts(trial: Trial, routed: Collection[str]) -> None:
    """Samples have as many tokens each; what an expert sees of them has not."""
    by_gram = trial.optimizer == "exact" and trial.input_stream == "dense"
    if trial.granularity != "matrix" or by_gram:
        return
    recipe = MaskRecipe.of(trial)
    name = next(
        (name for name in sorted(routed) if is_mask_file(recipe.criterion) or recipe.prunes(name)), None
    )
    if name is not None:
        raise UsageError(
            f"granularity matrix: {name} is of an expert, which sees other numbers of tokens in every sample",
            where="granularity",
            allowed="subblock, block, window:K or model; or matrix with optimizer exact and input_stream dense",
            remedy="Or leave experts dense: ignore: ['re:.*experts.*'].",
        )


def _check_rank(trial: Trial, linears: Shapes) -> None:
    name, shape = min(linears.items(), key=lambda item: min(item[1]))
    if trial.lora_rank is not None and trial.lora_rank > min(shape):
        raise UsageError(
            f"lora_rank {trial.lora_rank} is above the smaller side of {name}, which is {shape[0]} x {shape[1]}",
            where="lora_rank",
            allowed=f"1 to {min(shape)}",
        )
