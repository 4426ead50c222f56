"""Recovers one unit of a trial inside its range of blocks, and says what that did and cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from raysweep.config.trial import Trial
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.device_peak import reset_peak
from raysweep.reconstruction.device_stage import DeviceStage
from raysweep.reconstruction.measures import CALIBRATION, KEPT_TEXTS, Cost, Errors, UnitResult
from raysweep.reconstruction.objectives import Objective, objective_of
from raysweep.reconstruction.range import BlockRange, Weights
from raysweep.reconstruction.solving import Solver
from raysweep.reconstruction.stage import Stage, UnitTraining
from raysweep.reconstruction.units import Unit, units_of


def units_in(blocks: BlockRange, granularity: str) -> list[Unit]:
    """The units of a range, in the order in which they run."""
    return units_of(list(blocks.blocks.values()), granularity, blocks.shard.blocks_in_model)


def unit_names(blocks: BlockRange, granularity: str) -> list[str]:
    """The names of the units of a range, in the order in which they run."""
    return [unit.name for unit in units_in(blocks, granularity)]


def find_unit(blocks: BlockRange, granularity: str, unit_name: str) -> Unit:
    return next(unit for unit in units_in(blocks, granularity) if unit.name == unit_name)


def recover_unit(
    blocks: BlockRange, name: str, trial: Trial, unit_name: str, recovered: Weights | None = None
) -> UnitResult | None:
    """Recovers a unit of the trial `name` in the place of its pruned weights; None where nothing in it is pruned, or
    only experts that too few tokens are routed to.

    recovered: what `weights_of` gave when the unit was recovered before; then it is taken over, and the result is None
    A trial whose units depend on one another has a stream of its name that has arrived at the unit: it is pruned on it
    if need be, and the stream is moved on through what the unit becomes.
    Raises NumericalError when the weights or the errors of the unit are not finite.
    """
    unit = find_unit(blocks, str(trial.granularity), unit_name)
    with blocks.in_hand(name, unit.blocks):
        return _recover_in_hand(blocks, name, trial, unit, recovered)


def _recover_in_hand(
    blocks: BlockRange, name: str, trial: Trial, unit: Unit, recovered: Weights | None
) -> UnitResult | None:
    """With its blocks in hand."""
    if trial.statistics_stream == "recovered":
        prune_unit_on_stream(blocks, name, trial, unit)
    result = None
    if recovered is not None:
        blocks.weights[name] |= recovered
    elif is_pruned(blocks, name, unit):
        result = _recovered(blocks, name, trial, unit)
    if trial.is_sequential:
        advance_past(blocks, name, unit)
    return result


def weights_of(
    blocks: BlockRange, name: str, trial: Trial, unit_name: str, before: Collection[str]
) -> Weights:
    """What the recovery of a unit that lies here as a whole has made of the trial's tensors, by full name: its linears,
    and those that the trial did not have `before`, such as norms. Halves of a block share these, so that those of the
    other half are left out."""
    linears = tuple(f"{linear}." for linear in find_unit(blocks, str(trial.granularity), unit_name).linears)
    return {
        full: tensor
        for full, tensor in blocks.weights[name].items()
        if full.startswith(linears) or full not in before
    }


def is_pruned(blocks: BlockRange, name: str, unit: Unit) -> bool:
    """Whether the trial prunes a linear in this part of the unit that can be recovered."""
    pruned = [linear for full, linear in unit.linears.items() if full in blocks.layers[name]]
    return any(not blocks.starves(linear, unit.block_of(linear.name)) for linear in pruned)


def prune_unit_on_stream(blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> None:
    """Prunes the blocks that begin with the unit, on the trial's stream; behind one another they are pruned only."""
    if not unit.opens_block:
        return
    if len(unit.blocks) == 1:
        blocks.prune_on_stream(name, name, MaskRecipe.of(trial), unit.block)
        return
    ahead = f"ahead@{name}"  # whoever releases the trial also releases what ends in its name
    blocks.streams[ahead] = {CALIBRATION: blocks.streams[name][CALIBRATION].clone()}
    for block in unit.blocks:
        blocks.prune_on_stream(name, ahead, MaskRecipe.of(trial), block)
        blocks.advance_block(ahead, name, block)
    del blocks.streams[ahead]


def advance_past(blocks: BlockRange, name: str, unit: Unit) -> None:
    """Moves the trial's stream on through a unit that is done: through halves one by one, else through whole blocks."""
    sequential_half = unit.half is not None and not unit.block.halves.parallel
    if sequential_half:
        with blocks.using(name, unit.block):
            blocks.advance(name, partial(unit.block.run, module=unit.module))
    elif unit.closes_block:
        for block in unit.blocks:
            blocks.advance_block(name, name, block)


def _recovered(blocks: BlockRange, name: str, trial: Trial, unit: Unit) -> UnitResult:
    measured: Objective | Solver
    if trial.optimizer == "exact":
        measured = Solver(blocks, name, trial, unit)
        before = _errors_before(blocks, trial, unit, measured)
        with _memory_peak(blocks.device) as device_peak:
            cost = _solved(measured)
            peak_bytes = device_peak() or cost.peak_bytes
    else:
        measured = objective_of(blocks, name, trial, unit)
        before = _errors_before(blocks, trial, unit, measured)
        if unit.linear is None:
            blocks.statistics.put_down()
        else:
            blocks.statistics.put_down_one()
        with _memory_peak(blocks.device) as device_peak:
            kind = Stage if blocks.device.type == "cpu" else DeviceStage
            stage = kind(blocks, name, trial, unit, measured)
            try:
                stage.train()
            finally:
                for block in unit.blocks:
                    blocks.changed(name, block)
            cost = stage_cost(stage)
            peak_bytes = device_peak() or cost.peak_bytes
        del stage  # with its targets, which are made anew
    after = {text: measured.error(text) for text in before}
    return UnitResult.of(unit.name, unit.block.index, before, after, [replace(cost, peak_bytes=peak_bytes)])


def _solved(solver: Solver) -> Cost:
    solved = solver.solve()
    linears = (solver.linear.name,)
    return Cost(
        linears, solved.iterations, solved.flops, solved.trainable_parameters, solved.nbytes, solved.fallback
    )


def stage_cost(stage: UnitTraining) -> Cost:
    """What the training of a unit, or of its part, took, by count."""
    return Cost(
        tuple(stage.unit.linears), len(stage.steps), stage.flops, stage.trainable_parameters, stage.nbytes
    )


def _errors_before(blocks: BlockRange, trial: Trial, unit: Unit, measured: Objective | Solver) -> Errors:
    """The errors before recovery. On dense streams every trial with this mask, unit and loss shares them.

    A solver sums them up in another order, so it has its own.
    """
    texts = [text for text in KEPT_TEXTS if text in blocks.texts]
    if trial.is_sequential:
        return {text: measured.error(text) for text in texts}
    key = ("error_before", MaskRecipe.of(trial), unit.name, trial.loss, isinstance(measured, Solver))
    return {text: blocks.knowledge.get((*key, text), partial(measured.error, text)) for text in texts}


@contextmanager
def _memory_peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """A call for the most bytes that the device's allocator handed out within the context; None on a CPU."""
    if device.type == "cpu":
        yield lambda: None
        return
    reset_peak(device)
    start = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - start
