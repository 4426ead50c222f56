"""The part of a unit in one range of blocks, where the unit reaches over several ranges."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.activations import fetch, keep_rows
from raysweep.reconstruction.losses import LOSSES, batch_error
from raysweep.reconstruction.measures import Cost, TextError
from raysweep.reconstruction.objectives import ModuleObjective
from raysweep.reconstruction.range import BlockRange, Weights
from raysweep.reconstruction.recovery import find_unit, stage_cost
from raysweep.reconstruction.stage import Stage


class UnitPart:
    """Activations come batch by batch from the part before and go to the part after, by way of the caller.

    The first part takes them from the unit's own inputs; the last one knows the targets.

    found: weights that an earlier process has recovered
    """

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit_name: str) -> None:
        self.blocks, self.name, self.trial = blocks, name, trial
        self._held = ExitStack()
        self.unit = find_unit(blocks, str(trial.granularity), unit_name)
        with self._in_hand():
            self.objective = ModuleObjective(blocks, name, trial, self.unit)
        self.found: Weights | None = None
        self._loss = LOSSES[str(trial.loss)]
        self._stage: Stage | None = None

    @property
    def stage(self) -> Stage:
        """Its training; made when it is first asked for, with the weights of that moment, which stay on the device
        until it is closed."""
        if self._stage is None:
            for block in self.unit.blocks:
                self._held.enter_context(self.blocks.holding(self.name, block))
            self.blocks.statistics.put_down()
            with self._in_hand():
                self._stage = Stage(self.blocks, self.name, self.trial, self.unit, self.objective)
        return self._stage

    def forward(self, number: int, hidden_BTH: Tensor | None) -> Tensor:
        """As of `Stage`."""
        stage = self.stage
        with self._in_hand():
            return stage.forward(number, hidden_BTH)

    def backward(self, number: int, gradient_BTH: Tensor | None) -> Tensor | None:
        """As of `Stage`."""
        stage = self.stage
        with self._in_hand():
            return stage.backward(number, gradient_BTH)

    @torch.no_grad()
    def pass_dense(self, text: str, rows: slice, hidden_BTH: Tensor | None) -> Tensor:
        """A batch through the dense blocks: where it ends it is what the unit should give (target_stream `pruned`)."""
        with self._in_hand():
            output_BTH = self.objective.run(self._input(text, rows, hidden_BTH))
        if self.unit.is_last:
            samples, store = self._samples(text), self.blocks.store
            keep_rows(self.objective.own_targets, text, samples, rows, output_BTH, store)
        return output_BTH

    @torch.no_grad()
    def pass_recovered(self, text: str, rows: slice, hidden_BTH: Tensor | None) -> Tensor:
        """A batch of the unit's inputs through the blocks with the trial's weights."""
        return self._with_trials_weights(self._input(text, rows, hidden_BTH))

    @torch.no_grad()
    def pass_stream(self, text: str, rows: slice, hidden_BTH: Tensor | None) -> Tensor:
        """A batch of the trial's stream through the blocks with the trial's weights."""
        if hidden_BTH is None:
            hidden_BTH = fetch(self.blocks.streams[self.name][text], rows, self.blocks.device)
        return self._with_trials_weights(hidden_BTH.to(self.blocks.device))

    def _with_trials_weights(self, input_BTH: Tensor) -> Tensor:
        with self.blocks.using_all(self.name, self.unit.blocks):
            return self.objective.run(input_BTH)

    def error(self, text: str, rows: slice, output_BTH: Tensor) -> TextError:
        """Of a batch that has come out of the last part."""
        with self._in_hand():
            target_BTH = fetch(self.objective.targets(text), rows, self.blocks.device)
        return batch_error(self._loss, output_BTH, target_BTH)

    def close(self) -> Cost:
        """Ends the training. Raises NumericalError when weights are not finite."""
        stage = self.stage
        with self._in_hand():
            stage.finish()
            cost = stage_cost(stage)
        for block in self.unit.blocks:
            self.blocks.changed(self.name, block)
        self.let_go()
        return cost

    def let_go(self) -> None:
        """Before it is forgotten, trained or not."""
        self._stage = None
        self._held.close()

    def _in_hand(self) -> AbstractContextManager[None]:
        return self.blocks.in_hand(self.name, self.unit.blocks)

    def _input(self, text: str, rows: slice, hidden_BTH: Tensor | None) -> Tensor:
        if hidden_BTH is None:
            return fetch(self.objective.inputs(text), rows, self.blocks.device)
        return hidden_BTH.to(self.blocks.device)

    def _samples(self, text: str) -> int:
        return self.blocks.texts[text].activations.samples
