"""What is trained of a unit: its own tensors, or low-rank changes of its weights under the mask."""

# O outputs, I inputs of a linear, R rank

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from raysweep.config.field_groups import LORA
from raysweep.config.trial import Trial
from raysweep.model.linears import Linear
from raysweep.reconstruction.entry_norm import EntryNorm
from raysweep.reconstruction.range import BlockRange, Weights
from raysweep.reconstruction.units import Unit


class Trainable(Protocol):
    """Leaves of the graph, with their masks, and the tensors that a unit runs with.

    parameters: what the optimizer steps;  masks: for each of them, bool in its layout, True = kept, or None
    """

    parameters: list[nn.Parameter]
    masks: list[Tensor | None]

    @property
    def names(self) -> set[str]:
        """Full names of the unit's own tensors among them."""
        ...

    def instead(self) -> Weights:
        """By full name all tensors of the trial that differ from the dense ones, made of the parameters as they are."""
        ...

    def behind(self, norms: Iterable[EntryNorm]) -> list[TrainedNorm]:
        """Those of the unit's first norms that are trained as the weights behind them are, all of these."""
        ...

    def finish(self) -> None:
        """Writes what was trained into the trial's weights."""
        ...


@dataclass(frozen=True)
class TrainedNorm:
    """A norm's weight, and those of the linears that take what it gives."""

    name: str
    parameter: nn.Parameter
    weights: tuple[nn.Parameter, ...]


def trainable_of(
    blocks: BlockRange, name: str, trial: Trial, unit: Unit, names: Iterable[str]
) -> OwnTensors | LowRank:
    """What the trial trains. names: full names of what may be trained of the unit."""
    if trial.trainable in LORA:
        names = list(names)
        norms = [full for full in names if full.rpartition(".")[0] not in unit.linears]
        return LowRank(
            blocks, name, trial, unit, norms if trial.trainable == "lora+norms" else [], _changed(unit, names)
        )
    weights = {f"{linear}.weight" for linear in unit.linears}
    return OwnTensors(
        blocks, name, unit, [full for full in names if trial.trainable == "all" or full in weights]
    )


def _changed(unit: Unit, names: Iterable[str]) -> list[Linear]:
    """The unit's linears whose weights are among `names`."""
    weights = set(names)
    return [linear for name, linear in unit.linears.items() if f"{name}.weight" in weights]


class OwnTensors:
    """The unit's tensors themselves. The trial's weights share their storage, so that nothing is left to finish."""

    def __init__(self, blocks: BlockRange, name: str, unit: Unit, names: Iterable[str]) -> None:
        self._weights, self._unit = blocks.weights[name], unit
        self._parameters = {full: _parameter(self._weights, unit, full) for full in names}
        self.parameters = list(self._parameters.values())
        self.masks = [stored_mask(blocks, name, unit, full) for full in self._parameters]

    @property
    def names(self) -> set[str]:
        return set(self._parameters)

    def instead(self) -> Weights:
        return _of_unit(self._weights, self._unit) | self._parameters

    def behind(self, norms: Iterable[EntryNorm]) -> list[TrainedNorm]:
        mine = self._parameters
        return [
            TrainedNorm(each.norm, mine[each.norm], tuple(mine[name] for name in each.weights))
            for each in norms
            if {each.norm, *each.weights} <= mine.keys() and bool((mine[each.norm] != 0).all())
        ]

    def finish(self) -> None:
        """Nothing."""


class LowRank:
    """W + (alpha / rank) * mask . (B A) for every linear (Hu et al., arXiv 2106.09685, with the mask), and norms.

    A (R, I) starts uniform within 1 / sqrt(I), B (O, R) at zero, both float32, so that training starts at W.
    """

    def __init__(
        self,
        blocks: BlockRange,
        name: str,
        trial: Trial,
        unit: Unit,
        norms: Iterable[str],
        linears: Sequence[Linear] | None = None,
    ) -> None:
        linears = list(unit.linears.values()) if linears is None else linears
        self._weights, self._unit, self._linears = blocks.weights[name], unit, linears
        self._norms = {full: _parameter(self._weights, unit, full) for full in norms}
        rank = trial.lora_rank or 1
        self._scale = (trial.lora_alpha or 0.0) / rank
        self._factors = {linear.name: low_rank_factors(linear, rank, trial.seed or 0) for linear in linears}
        self._masks = {
            linear.name: stored_mask(blocks, name, unit, f"{linear.name}.weight") for linear in linears
        }
        self.parameters = [*(part for pair in self._factors.values() for part in pair), *self._norms.values()]
        self.masks: list[Tensor | None] = [None] * len(self.parameters)

    @property
    def names(self) -> set[str]:
        return set(self._norms)

    def instead(self) -> Weights:
        merged = {f"{linear.name}.weight": self._merged(linear) for linear in self._linears}
        return _of_unit(self._weights, self._unit) | self._norms | merged

    def behind(self, norms: Iterable[EntryNorm]) -> list[TrainedNorm]:
        return []

    def finish(self) -> None:
        with torch.no_grad():
            for linear in self._linears:
                self._weights[f"{linear.name}.weight"] = self._merged(linear).detach()

    def _merged(self, linear: Linear) -> Tensor:
        b_OR, a_RI = self._factors[linear.name]
        start = self._weights.get(f"{linear.name}.weight")
        if start is None:
            start = linear.module.get_parameter("weight").detach()
        change = self._scale * linear.as_stored(b_OR @ a_RI)
        mask = self._masks[linear.name]
        return start + (change if mask is None else change * mask).to(start.dtype)


def stored_mask(blocks: BlockRange, name: str, unit: Unit, full: str) -> Tensor | None:
    """The mask of a parameter in the parameter's own layout; None where nothing is removed."""
    linear = unit.linears.get(full.removesuffix(".weight"))
    if linear is None or not full.endswith(".weight") or linear.name not in blocks.layers[name]:
        return None
    return linear.as_stored(blocks.layers[name][linear.name].mask.on(blocks.device))


def _parameter(weights: Weights, unit: Unit, full: str) -> nn.Parameter:
    """A leaf on the trial's tensor of that name, which is a copy of the dense one until now."""
    if full not in weights:
        block = unit.block_of(full)
        weights[full] = block.module.get_parameter(full.removeprefix(f"{block.prefix}.")).detach().clone()
    return nn.Parameter(weights[full])


def _of_unit(weights: Weights, unit: Unit) -> Weights:
    prefixes = tuple(f"{block.prefix}." for block in unit.blocks)
    return {full: tensor for full, tensor in weights.items() if full.startswith(prefixes)}


def low_rank_factors(linear: Linear, rank: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """B (O, R) and A (R, I), drawn on the CPU from the seed and the linear's name alone."""
    outputs, inputs = linear.weight_OI.shape
    digest = hashlib.sha256(f"lora/{seed}/{linear.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(inputs)
    a_RI = (torch.rand(rank, inputs, generator=generator) * 2.0 - 1.0) * bound
    device = linear.weight_OI.device
    return nn.Parameter(torch.zeros(outputs, rank, device=device)), nn.Parameter(a_RI.to(device))
