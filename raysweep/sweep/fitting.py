"""Whether trials fit their model: names, patterns, spans and ranks, and criteria that users bring along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raysweep.config.criterion import function_parts, is_mask_file
from raysweep.config.names import matches
from raysweep.config.spellings import window_length
from raysweep.config.trial import LORA, Trial
from raysweep.errors import UsageError, nearest_name
from raysweep.model.shape import ModelShape
from raysweep.pruning.criteria import OwnFunction
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.masks import check_n_of_m
from raysweep.pruning.own import function_hash, load_function
from raysweep.pruning.recipe import MaskRecipe


def check_trial(trial: Trial, model: ModelShape) -> None:
    """Refuses what the model has no room for. Raises UsageError."""
    _check_names(trial, model)
    _check_pattern(trial, model)
    if trial.granularity is not None:
        _check_window(trial, len(model.blocks))
    if trial.trainable in LORA:
        _check_rank(trial, model)


@dataclass(frozen=True)
class OwnCriterion:
    """A criterion that a user brings along. content_hash: what stands for it in identities

    source: a function, or a file of masks
    """

    content_hash: str
    source: OwnFunction | MaskFile

    @property
    def for_shards(self) -> OwnFunction | Path:
        """What shards need of it: the function, or where the file is."""
        return self.source.path if isinstance(self.source, MaskFile) else self.source

    def check(self, model: ModelShape) -> None:
        """Refuses a file that does not fit the model."""
        if isinstance(self.source, MaskFile):
            self.source.check(model.stored_shapes)


def own_criteria(trials: Iterable[Trial]) -> dict[str, OwnCriterion]:
    """The users' own criteria among those of the trials, by the text that names them. Raises UsageError."""
    named = dict.fromkeys(trial.criterion for trial in trials if trial.criterion is not None)
    found: dict[str, OwnCriterion] = {}
    for text in named:
        if is_mask_file(text):
            file = MaskFile.of(text)
            found[text] = OwnCriterion(f"file:{file.content_hash}", file)
        elif function_parts(text) is not None:
            found[text] = OwnCriterion(f"function:{function_hash(text)}", load_function(text))
    return found


def _check_names(trial: Trial, model: ModelShape) -> None:
    by_name = trial.sparsity if isinstance(trial.sparsity, tuple) else ()
    given = {
        "targets": trial.targets or (),
        "ignore": trial.ignore or (),
        "sparsity": [name for name, _ in by_name],
    }
    names = list(model.linears)
    for field, patterns in given.items():
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                last_parts = sorted({name.rpartition(".")[2] for name in names})
                raise UsageError(
                    f"{pattern!r} matches no linear of the model",
                    where=f"sweep: {field}",
                    allowed=f"{', '.join(last_parts)}; more of the name, such as {names[0]}; or re:REGEX",
                    nearest=nearest_name(pattern, last_parts),
                )
    recipe = MaskRecipe.of(trial)
    if not is_mask_file(recipe.criterion) and not any(map(recipe.prunes, names)):
        raise UsageError(
            "no linear is left to prune: `ignore` takes all that `targets` names",
            where="sweep: ignore",
            remedy="Leave one of them out.",
        )


def _check_pattern(trial: Trial, model: ModelShape) -> None:
    recipe = MaskRecipe.of(trial)
    if recipe.n_of_m is None:
        return
    for name, (_, inputs) in model.linears.items():
        if recipe.prunes(name):
            try:
                check_n_of_m(inputs, *recipe.n_of_m)
            except UsageError as error:
                raise UsageError(
                    f"{name}: {error.what}",
                    where="sweep: pattern",
                    allowed=error.allowed,
                    remedy=error.remedy,
                ) from None


def _check_window(trial: Trial, blocks: int) -> None:
    length = window_length(str(trial.granularity))
    if length is not None and length > blocks:
        raise UsageError(
            f"granularity {trial.granularity} is longer than the model, which has {blocks} blocks",
            where="sweep: granularity",
            allowed=f"window:2 to window:{blocks}, or model",
        )


def _check_rank(trial: Trial, model: ModelShape) -> None:
    name, shape = min(model.linears.items(), key=lambda item: min(item[1]))
    if trial.lora_rank is not None and trial.lora_rank > min(shape):
        raise UsageError(
            f"lora_rank {trial.lora_rank} is above the smaller side of {name}, which is {shape[0]} x {shape[1]}",
            where="sweep: lora_rank",
            allowed=f"1 to {min(shape)}",
        )
