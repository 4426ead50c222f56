"""Reconstructs one unit of a trial inside its range of blocks, and says what that did and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.config.trial import Trial
from raysweep.errors import NumericalError
from raysweep.reconstruction.losses import TextError
from raysweep.reconstruction.objectives import Objective, objective_of
from raysweep.reconstruction.optimizer import MaskedAdamW
from raysweep.reconstruction.range import (
    CALIBRATION,
    KEPT_TEXTS,
    VALIDATION,
    BlockRange,
    MaskRecipe,
    Weights,
)
from raysweep.reconstruction.training import TrainingRecipe, train
from raysweep.reconstruction.units import Unit, units_of

Errors = dict[str, TextError]
"""By text."""


@dataclass(frozen=True)
class UnitResult:
    """What reconstruction did to one unit. Losses are the trial's loss, errors relative squared errors."""

    unit: str
    block: int
    linears: str
    loss_before: float
    loss_after: float
    validation_loss_before: float | None
    validation_loss_after: float | None
    error_before: float
    error_after: float
    steps: int
    training_flops: int
    trainable_parameters: int
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def unit_names(blocks: BlockRange, granularity: str) -> list[str]:
    """The units of a range, in the order in which they run."""
    return [unit.name for block in blocks.blocks.values() for unit in units_of(block, granularity)]


def recover_unit(blocks: BlockRange, name: str, trial: Trial, unit_name: str) -> UnitResult:
    """Trains a unit of the trial `name` on the calibration set, in the place of its pruned weights.

    Raises NumericalError when the weights or the errors of the unit are not finite.
    """
    unit, recipe = _unit(blocks, str(trial.granularity), unit_name), TrainingRecipe.of(trial)
    objective = objective_of(blocks, name, unit, recipe.batch_size)
    before = _errors_before(blocks, MaskRecipe.of(trial), unit, objective)
    inputs, targets = objective.inputs(), objective.targets()  # while the block is dense
    parameters = _own_parameters(blocks.weights[name], unit, _trained_names(unit, objective, trial))
    masks = [_stored_mask(blocks, MaskRecipe.of(trial), unit, full) for full in parameters]
    trained = list(parameters.values())
    with blocks.using(name, unit.block), _gradients(trained), _memory_peak(blocks.device) as device_peak:
        optimizer = MaskedAdamW(trained, masks, recipe.learning_rate, recipe.max_grad_norm)
        steps = train(objective.run, optimizer, inputs, targets, recipe, blocks.device)
        counted_bytes = sum(parameter.nbytes for parameter in trained) + optimizer.nbytes
        peak_bytes = device_peak() or counted_bytes + objective.step_bytes()
    after = {text: objective.error(text) for text in before}
    _check_finite(unit, before, after)
    return UnitResult(
        unit=unit.name,
        block=unit.block.index,
        linears=",".join(unit.linears),
        loss_before=before[CALIBRATION].mean,
        loss_after=after[CALIBRATION].mean,
        validation_loss_before=before[VALIDATION].mean if VALIDATION in before else None,
        validation_loss_after=after[VALIDATION].mean if VALIDATION in after else None,
        error_before=before[CALIBRATION].relative,
        error_after=after[CALIBRATION].relative,
        steps=steps,
        training_flops=objective.flops(recipe.epochs * inputs.shape[0]),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        peak_bytes=peak_bytes,
    )


def _unit(blocks: BlockRange, granularity: str, unit_name: str) -> Unit:
    units = (unit for block in blocks.blocks.values() for unit in units_of(block, granularity))
    return next(unit for unit in units if unit.name == unit_name)


def _errors_before(blocks: BlockRange, recipe: MaskRecipe, unit: Unit, objective: Objective) -> Errors:
    """The errors before recovery, which every trial with this mask and unit shares."""
    texts = [text for text in KEPT_TEXTS if text in blocks.texts]
    key = ("error_before", recipe, unit.name)
    return {text: blocks.knowledge.get((*key, text), partial(objective.error, text)) for text in texts}


def _trained_names(unit: Unit, objective: Objective, trial: Trial) -> list[str]:
    """Names within the unit's module of what is trained: all that may be, or the prunable weights only."""
    names = objective.parameter_names()
    if trial.trainable == "all":
        return names
    prunable = {f"{name}.weight" for name in unit.linears}
    return [name for name in names if unit.parameter_name(name) in prunable]


def _own_parameters(weights: Weights, unit: Unit, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters of the unit by full name; `weights` gets copies of those that it does not hold yet."""
    parameters = {unit.parameter_name(name): unit.module.get_parameter(name) for name in names}
    for full, parameter in parameters.items():
        if full not in weights:
            weights[full] = parameter.detach().clone()
    return parameters


def _stored_mask(blocks: BlockRange, recipe: MaskRecipe, unit: Unit, full: str) -> Tensor | None:
    """The mask of a parameter in the parameter's own layout; None where nothing is removed."""
    linear = unit.linears.get(full.removesuffix(".weight"))
    if linear is None or not full.endswith(".weight"):
        return None
    return linear.as_stored(blocks.mask(recipe, unit.block, linear))


@contextmanager
def _gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters ask for gradients within the context; none are left behind."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def _memory_peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """A call for the most bytes that the device's allocator handed out within the context; None on a CPU."""
    if device.type == "cpu":
        yield lambda: None
        return
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - start


def _check_finite(unit: Unit, before: Errors, after: Errors) -> None:
    for when, errors in {"before": before, "after": after}.items():
        if not all(math.isfinite(error.mean) for error in errors.values()):
            raise NumericalError(f"the error of unit {unit.name} {when} recovery is not finite")
