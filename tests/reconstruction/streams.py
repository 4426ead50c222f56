"""What flows through whole models, plain or with a trial's weights written into a copy: the oracle of streams."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysweep.config.trial import Trial
from raysweep.model.linears import Linear
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.measures import CALIBRATION, UnitResult
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import recover_unit, units_in
from raysweep.reconstruction.units import Unit
from tests.reconstruction.ranges import IDS, prune_all


@torch.no_grad()
def linear_io(model: nn.Module, ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What the linear takes (N, I) and gives (N, O) while the whole model runs."""
    seen: dict[str, Tensor] = {}

    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.update(x=arguments[0].clone(), y=output.clone())

    handle = model.get_submodule(name).register_forward_hook(hook)
    model(ids)
    handle.remove()
    return seen["x"].reshape(-1, seen["x"].shape[-1]), seen["y"].reshape(-1, seen["y"].shape[-1])


def written(blocks: BlockRange, name: str = "trial") -> nn.Module:
    """A copy of the model with the trial's weights in it."""
    model = copy.deepcopy(blocks.shard.model)
    for full, weight in blocks.weights[name].items():
        model.get_parameter(full).data = weight.clone()
    return model


@torch.no_grad()
def hidden_states(model: nn.Module, ids: Tensor = IDS) -> list[Tensor]:
    """What enters every block, and last what leaves the last one (before the norm)."""
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def enter(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entered.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    def leave(_module: nn.Module, _arguments: Any, output: Any) -> None:
        left.append((output[0] if isinstance(output, tuple) else output).clone())

    layers = model.get_submodule(name)
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    model(ids)
    for handle in handles:
        handle.remove()
    return [*entered, left[0]]


def enter_all(blocks: BlockRange, name: str = "trial") -> None:
    """The calibration set as the trial's stream, at the door of the first block."""
    blocks.begin(name)
    blocks.enter_stream(name, CALIBRATION, len(IDS), slice(0, len(IDS)), blocks.shard.embed(IDS))


def recovered_units(blocks: BlockRange, trial: Trial) -> Iterator[tuple[Unit, nn.Module, UnitResult | None]]:
    """Unit by unit: the unit, a copy of the model as it was before it was recovered, and what recovery said."""
    if trial.statistics_stream == "recovered":
        blocks.begin("trial")
    else:
        prune_all(blocks, "trial", trial)
    enter_all(blocks)
    for unit in units_in(blocks, str(trial.granularity)):
        before = written(blocks)
        yield unit, before, recover_unit(blocks, "trial", trial, unit.name)


@dataclass
class MatrixSeen:
    """A matrix that was recovered: what arrived at it, what it now gives, (N, I) and (N, O)."""

    linear: Linear
    mask: Tensor
    inputs: Tensor
    outputs: Tensor
    result: UnitResult


def through(blocks: BlockRange, trial: Trial, units: int) -> dict[str, MatrixSeen]:
    """The first matrices of a trial on pruned inputs, by full name."""
    recipe, seen = MaskRecipe.of(trial), dict[str, MatrixSeen]()
    for unit, before, result in recovered_units(blocks, trial):
        if len(seen) == units:
            break
        assert unit.linear is not None
        assert result is not None
        name = unit.linear.name
        layer = blocks.pruner.layer(recipe, unit.block, unit.linear)
        assert layer is not None
        inputs, _ = linear_io(before, IDS, name)
        weight = unit.linear.from_stored(blocks.weights["trial"][f"{name}.weight"])
        bias = blocks.weights["trial"].get(f"{name}.bias", unit.linear.bias_O)
        outputs = inputs @ weight.T + (0 if bias is None else bias)
        seen[name] = MatrixSeen(unit.linear, layer.mask_OI, inputs, outputs, result)
    return seen
