"""The training of a unit on a GPU: every step replayed as one graph, and compiled where that pays."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.errors import first_line
from raysweep.reconstruction.device_optimizer import DeviceOptimizer
from raysweep.reconstruction.device_peak import reset_peak
from raysweep.reconstruction.entry_norm import norm_gradient
from raysweep.reconstruction.feed import feed
from raysweep.reconstruction.graphs import StepGraph, beside_the_default_stream
from raysweep.reconstruction.losses import Loss
from raysweep.reconstruction.objectives import Objective
from raysweep.reconstruction.programs import compiled, is_of_compiler, many_variants
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.stage import UnitTraining
from raysweep.reconstruction.units import Unit

GRAPH_FROM_STEPS = 4  # recording takes about the time of two steps

log = logging.getLogger(__name__)


class DeviceStage(UnitTraining):
    """A unit that lies within one range as a whole, trained on the range's device.

    The same steps as `Stage` takes, to rounding. Nothing waits for the device before the last step: learning rates lie
    in a table there, and samples are read ahead. What cannot be compiled or recorded is trained without.
    """

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit, objective: Objective) -> None:
        super().__init__(blocks, name, trial, unit, objective)
        self._full = len(self.steps[0].rows)
        self._compiles = blocks.compiles and not self.has_experts  # which see other shapes in every step
        self.optimizer: DeviceOptimizer = DeviceOptimizer(
            self.recipe, self.trainable.parameters, self.trainable.masks, self._compiles
        )
        self._table = self.optimizer.table([step.factor for step in self.steps])
        self._number = torch.zeros(1, dtype=torch.int64, device=blocks.device)

    def train(self) -> None:
        """All steps. Raises NumericalError when weights are not finite after."""
        device = self.blocks.device
        sources = [self._given_inputs, *([] if self._targets is None else [self._targets])]
        records = device.type == "cuda" and len(self.steps) >= GRAPH_FROM_STEPS and not self.has_experts
        graph: StepGraph | None = None
        with (
            many_variants() if self._compiles else nullcontext(),
            feed(sources, [step.rows for step in self.steps], device) as samples,
            beside_the_default_stream(device),
        ):
            for number, given in enumerate(samples):
                full = len(given[0]) == self._full
                if number == 0:
                    self._first_step(given)
                    continue
                if records and full and graph is None:
                    graph = self._recorded(given)
                    records = graph is not None
                if graph is not None and full:
                    graph.replay(given)
                else:
                    self._step(*given)
        self.finish()

    def _first_step(self, given: Sequence[Tensor]) -> None:
        """Compiles, where this is the first unit of its kind, which takes memory: the peak counts anew behind it."""
        try:
            self._step(*given)
        except Exception as error:
            if not (self._compiles and is_of_compiler(error)):
                raise
            log.warning("%s is trained without being compiled: %s", self.unit.name, first_line(error))
            self.blocks.compiles = self._compiles = False
            self.optimizer.compiles = False
            self._step(*given)
        if self.blocks.device.type == "cuda" and len(self.steps) > 1:
            reset_peak(self.blocks.device)

    def _recorded(self, given: Sequence[Tensor]) -> StepGraph | None:
        try:
            return StepGraph(self._step, given)
        except RuntimeError as error:
            log.warning("the steps of %s are not recorded: %s", self.unit.name, first_line(error))
            return None

    def _step(self, input_BTH: Tensor, target_BTH: Tensor | None = None) -> None:
        compiles = self._compiles and len(input_BTH) == self._full  # a smaller last batch is not worth it
        output_BTH = self.objective.run(input_BTH, self._tensors(), compiles)
        mean = compiled(_mean_loss) if compiles else _mean_loss
        loss = mean(self._loss, output_BTH, target_BTH)
        gradients = self._gradients(loss, compiled(norm_gradient) if compiles else norm_gradient)
        self.optimizer.update(gradients, self._table.index_select(0, self._number)[0])
        self._number.add_(1)

    def _gradients(self, loss: Tensor, of_norm: Callable[..., Tensor]) -> list[Tensor]:
        """Of all that is trained."""
        apart = {id(norm.parameter) for norm in self._norms}
        others = [parameter for parameter in self.trainable.parameters if id(parameter) not in apart]
        found = torch.autograd.grad(loss, others, materialize_grads=self.has_experts)
        by_id = {id(p): g for p, g in zip(others, found, strict=True)}
        with torch.no_grad():
            for norm in self._norms:
                behind = [by_id[id(weight)] for weight in norm.weights]
                by_id[id(norm.parameter)] = of_norm(norm.parameter, norm.weights, behind)
        return [by_id[id(parameter)] for parameter in self.trainable.parameters]


def _mean_loss(loss: Loss, output_BTH: Tensor, target_BTH: Tensor | None) -> Tensor:
    """target_BTH: None for zeros"""
    return loss.mean(output_BTH, torch.zeros_like(output_BTH) if target_BTH is None else target_BTH)
