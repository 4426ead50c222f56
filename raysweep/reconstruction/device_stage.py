"""The training of a unit on a GPU: every step replayed as one graph, and compiled where that pays."""

# B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.reconstruction.device_optimizer import DeviceOptimizer
from raysweep.reconstruction.feed import feed
from raysweep.reconstruction.losses import Loss
from raysweep.reconstruction.objectives import Objective
from raysweep.reconstruction.programs import compiled
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.stage import UnitTraining
from raysweep.reconstruction.units import Unit

GRAPH_FROM_STEPS = 4  # recording takes about the time of two steps


class DeviceStage(UnitTraining):
    """A unit that lies within one range as a whole, trained on the range's device.

    The same steps as `Stage` takes, to rounding. Nothing waits for the device before the last step: learning rates lie
    in a table there, and samples are read ahead.
    """

    def __init__(self, blocks: BlockRange, name: str, trial: Trial, unit: Unit, objective: Objective) -> None:
        super().__init__(blocks, name, trial, unit, objective)
        self._compiles = objective.compiles = blocks.compiles
        self.optimizer: DeviceOptimizer = DeviceOptimizer(
            self.recipe, self.trainable.parameters, self.trainable.masks, self._compiles
        )
        self._table = self.optimizer.table([step.factor for step in self.steps])
        self._number = torch.zeros(1, dtype=torch.int64, device=blocks.device)

    def train(self) -> None:
        """All steps. Raises NumericalError when weights are not finite after."""
        sources = [self._given_inputs, *([] if self._targets is None else [self._targets])]
        steps, full = [step.rows for step in self.steps], len(self.steps[0].rows)
        graph: _Graph | None = None
        with (
            feed(sources, steps, self.blocks.device) as samples,
            _side_stream(self.blocks.device),
        ):
            for number, given in enumerate(samples):
                if number == 1 and self._records(steps):
                    graph = _Graph(self._step, given)
                if graph is not None and len(given[0]) == full:
                    graph.run(given)
                else:
                    self._step(*given)
        self.finish()

    def _records(self, steps: Sequence[Tensor]) -> bool:
        return self.blocks.device.type == "cuda" and len(steps) >= GRAPH_FROM_STEPS

    def _step(self, input_BTH: Tensor, target_BTH: Tensor | None = None) -> None:
        output_BTH = self.objective.run(input_BTH, self.trainable.instead())
        mean = compiled(_mean_loss) if self._compiles else _mean_loss
        loss = mean(self._loss, output_BTH, target_BTH)
        gradients = torch.autograd.grad(loss, self.trainable.parameters)
        self.optimizer.update(gradients, self._table.index_select(0, self._number)[0])
        self._number.add_(1)


def _mean_loss(loss: Loss, output_BTH: Tensor, target_BTH: Tensor | None) -> Tensor:
    """target_BTH: None for zeros"""
    return loss.mean(output_BTH, torch.zeros_like(output_BTH) if target_BTH is None else target_BTH)


class _Graph:
    """A step recorded once and replayed on other samples."""

    pool: Any = None
    last: torch.cuda.CUDAGraph | None = (
        None  # alive until the next one is recorded, so that the pool's memory is
    )

    def __init__(self, step: Callable[..., None], given: Sequence[Tensor]) -> None:
        self._given = [tensor.clone() for tensor in given]
        self._graph = torch.cuda.CUDAGraph()
        _Graph.pool = _Graph.pool or torch.cuda.graph_pool_handle()
        self._graph.capture_begin(pool=_Graph.pool, capture_error_mode="thread_local")
        try:
            step(*self._given)
        finally:
            self._graph.capture_end()
        _Graph.last = self._graph

    def run(self, given: Sequence[Tensor]) -> None:
        for mine, each in zip(self._given, given, strict=True):
            mine.copy_(each)
        self._graph.replay()


@cache
def _graph_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all units: memory that was freed on a stream, or in a graph's pool on it, is taken again only there."""
    return torch.cuda.Stream(device)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Graphs are recorded beside the default stream; what is on that comes first, and waits for what was done here."""
    if device.type == "cpu":
        yield
        return
    default, side = torch.cuda.current_stream(device), _graph_stream(device)
    side.wait_stream(default)
    with torch.cuda.stream(side):
        yield
    default.wait_stream(side)
