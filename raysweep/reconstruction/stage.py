"""The training of a unit, or of the part of it in one range of blocks: forward, backward, step."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.activations import fetch
from raysweep.reconstruction.entry_norm import norm_gradient
from raysweep.reconstruction.losses import LOSSES
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.objectives import Objective
from raysweep.reconstruction.optimizer import MaskedOptimizer, clip_factor, gradient_of
from raysweep.reconstruction.range import BlockRange, Weights
from raysweep.reconstruction.trainable import trainable_of
from raysweep.reconstruction.training import TrainingRecipe
from raysweep.reconstruction.units import Unit


class Optimizer(Protocol):
    """What trains the parameters."""

    @property
    def nbytes(self) -> int:
        """Of its state, with gradients."""
        ...

    def check(self) -> None:
        """Raises NumericalError when a parameter is no longer finite."""
        ...


class UnitTraining:
    """What is trained of a unit, or of the part of it in one range, on what and towards what.

    Made while the blocks are dense. Holds what it trains itself, so that other trials may run in between.
    """

    optimizer: Optimizer

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit, objective: Objective) -> None:
        self.blocks, self.unit, self.recipe = blocks, unit, TrainingRecipe.of(trial)
        self.objective = objective
        self.has_experts = any(block.routed for block in unit.blocks)
        samples = blocks.texts[CALIBRATION].activations.samples
        self.steps = list(self.recipe.steps(samples))
        self._loss = LOSSES[str(trial.loss)]
        self._inputs = self.objective.inputs(CALIBRATION) if unit.is_first else None
        self._targets = self.objective.targets(CALIBRATION) if unit.is_last else None
        self.trainable = trainable_of(blocks, name, trial, unit, self.objective.parameter_names())
        self._entry_norms = self.objective.entry_norms()
        self._norms = self.trainable.behind(self._entry_norms)

    def finish(self) -> None:
        """Puts what was trained into the trial's weights. Raises NumericalError when it is not finite."""
        self.optimizer.check()
        self.trainable.finish()

    def _tensors(self) -> Weights:
        """What the unit runs with: norms whose gradients follow from others' are no part of the graph."""
        return self.trainable.instead() | {norm.name: norm.parameter.detach() for norm in self._norms}

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trainable.parameters)

    @property
    def nbytes(self) -> int:
        """Counted: what is trained, the optimizer's state, and what a step holds."""
        parameters = sum(parameter.nbytes for parameter in self.trainable.parameters)
        return parameters + self.optimizer.nbytes + self.objective.step_bytes()

    @property
    def flops(self) -> int:
        """Of the products of all steps."""
        samples = sum(len(step.rows) for step in self.steps)
        tokens = samples * self.blocks.texts[CALIBRATION].activations.tokens
        return self.objective.flops(samples) - 2 * self._spared_weights() * tokens

    def _spared_weights(self) -> int:
        """Behind norms that are no part of the graph: nothing asks for the gradient of what these weights take."""
        in_graph = self.trainable.names - {norm.name for norm in self._norms}
        spared = [name for entry in self._entry_norms if entry.norm not in in_graph for name in entry.weights]
        block = self.unit.block
        return sum(
            block.module.get_parameter(name.removeprefix(f"{block.prefix}.")).numel() for name in spared
        )

    @property
    def _given_inputs(self) -> Tensor:
        if self._inputs is None:
            raise RuntimeError("this stage gets its inputs from the one before")
        return self._inputs


class Stage(UnitTraining):
    """Of a unit that reaches over several ranges each has one stage: activations go forward through them, the last
    takes the loss, gradients come back, and every stage steps its own parameters. A unit within a range is one stage.
    """

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit, objective: Objective) -> None:
        super().__init__(blocks, name, trial, unit, objective)
        self.optimizer: MaskedOptimizer = MaskedOptimizer(
            self.recipe.optimizer, self.trainable.parameters, self.trainable.masks, self.recipe.learning_rate
        )
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def train(self) -> None:
        """All steps of a unit that lies here as a whole. Raises NumericalError when weights are not finite after."""
        for number in range(len(self.steps)):
            self.forward(number)
            self.backward(number)
            self.step(number, clip_factor(self.squares(), self.recipe.max_grad_norm))
        self.finish()

    def forward(self, number: int, hidden_BTH: Tensor | None = None) -> Tensor:
        """The output (B, T, H) of a step's samples. hidden_BTH: from the stage before, where there is one."""
        if hidden_BTH is None:
            hidden_BTH = fetch(self._given_inputs, self.steps[number].rows, self.blocks.device)
        else:
            hidden_BTH = hidden_BTH.to(self.blocks.device).requires_grad_(True)
        self._input = hidden_BTH
        self._output = self.objective.run(hidden_BTH, self._tensors())
        return self._output.detach()

    def backward(self, number: int, gradient_BTH: Tensor | None = None) -> Tensor | None:
        """Gradients of a step, gathered for the optimizer; returns that of the stage's input, where one comes before.

        gradient_BTH: of the output, from the stage after; without one the loss is taken here
        """
        output_BTH, input_BTH = self._output, self._input
        self._output = self._input = None
        if output_BTH is None or input_BTH is None:
            raise RuntimeError("backward comes after forward")
        if gradient_BTH is None:
            self._loss.mean(output_BTH, self._target(number, output_BTH)).backward()
        else:
            output_BTH.backward(gradient_BTH.to(output_BTH))
        with torch.no_grad():
            if self.has_experts:
                self._fill_gradients()
            self._derive_gradients()
        self.optimizer.gather()
        return input_BTH.grad

    def _fill_gradients(self) -> None:
        """Zeros for experts that ran on none of the step's tokens."""
        for parameter in self.trainable.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _derive_gradients(self) -> None:
        """Of the norms that are no part of the graph."""
        for norm in self._norms:
            behind = [gradient_of(weight) for weight in norm.weights]
            norm.parameter.grad = norm_gradient(norm.parameter, norm.weights, behind).to(norm.parameter)

    def squares(self) -> list[float]:
        """Squared norms of the gathered gradients, where they are clipped; else nothing."""
        return [] if self.recipe.max_grad_norm is None else self.optimizer.squares()

    def step(self, number: int, clip: float) -> None:
        """Steps on the gathered gradients times `clip`."""
        self.optimizer.step(self.steps[number].factor, clip)

    def _target(self, number: int, output_BTH: Tensor) -> Tensor:
        if self._targets is None:
            return output_BTH.new_zeros(output_BTH.shape)
        return fetch(self._targets, self.steps[number].rows, self.blocks.device)
