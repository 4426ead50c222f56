"""A unit in several ranges: its gradients are those of autograd through the whole, and its numbers do not change."""

from __future__ import annotations

import copy

import pytest
import torch

from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.optimizer import clip_factor
from raysweep.reconstruction.part import UnitPart
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import recover_unit
from tests.reconstruction.ranges import IDS, load_ranges, prune_all, reconstruct_trial
from tests.reconstruction.streams import hidden_states

CUTS = [[0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


def parts_of(ranges: list[BlockRange], trial, unit: str) -> list[UnitPart]:
    for blocks in ranges:
        prune_all(blocks, "trial", trial)
    return [UnitPart(blocks, "trial", trial, unit) for blocks in ranges]


def gradients(parts: list[UnitPart], number: int) -> dict[str, torch.Tensor]:
    """Of one step along the parts and back, by full name."""
    hidden = None
    for part in parts:
        hidden = part.stage.forward(number, hidden)
    gradient = None
    for part in reversed(parts):
        gradient = part.stage.backward(number, gradient)
    return {
        name: parameter.grad.clone()
        for part in parts
        for name, parameter in part.stage.trainable._parameters.items()
    }


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_gradients_are_those_of_autograd_through_the_whole_model(tiny_llama, cuts):
    trial = reconstruct_trial(granularity="model", shuffle=False)
    ranges = load_ranges(tiny_llama, cuts)
    parts = parts_of(ranges, trial, "model")
    found = gradients(parts, 0)

    model = copy.deepcopy(load_ranges(tiny_llama, [0, 4])[0].shard.model)
    target = hidden_states(model)[-1][:3]
    masks = {}
    for blocks in ranges:
        for name, weight in blocks.weights["trial"].items():
            model.get_parameter(name).data = weight.clone()
        for name, layer in blocks.layers["trial"].items():
            masks[f"{name}.weight"] = layer.mask_OI
    model.requires_grad_(True)
    left = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _module, _arguments, output: left.append(output[0] if isinstance(output, tuple) else output)
    )
    model(IDS[:3])
    handle.remove()
    (left[0] - target).square().mean().backward()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad * masks.get(name, 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("granularity", ["window:3", "model"])
def test_parts_train_to_the_same_bits_as_the_whole(tiny_llama, cuts, granularity, max_grad_norm):
    trial = reconstruct_trial(granularity=granularity, max_grad_norm=max_grad_norm)
    unit = {"model": "model", "window:3": "0-2"}[granularity]
    (whole,) = load_ranges(tiny_llama, [0, 4])
    prune_all(whole, "trial", trial)
    result = recover_unit(whole, "trial", trial, unit)
    assert result is not None
    ranges = [
        blocks for blocks in load_ranges(tiny_llama, cuts) if granularity == "model" or blocks.shard.start < 3
    ]
    parts = parts_of(ranges, trial, unit)
    for number in range(len(parts[0].stage.steps)):
        gradients(parts, number)
        squares = [square for part in parts for square in part.stage.squares()]
        for part in parts:
            part.stage.step(number, clip_factor(squares, max_grad_norm))
    costs = [part.close() for part in parts]
    assert sum(cost.trainable_parameters for cost in costs) == result.trainable_parameters
    assert sum(cost.training_flops for cost in costs) == result.training_flops
    hidden = None
    for part in parts:
        hidden = part.pass_recovered(CALIBRATION, slice(0, len(IDS)), hidden)
    error = parts[-1].error(CALIBRATION, slice(0, len(IDS)), hidden)
    assert error.loss == result.loss_after
    for blocks in ranges:
        for name, weight in blocks.weights["trial"].items():
            assert torch.equal(weight, whole.weights["trial"][name]), name
