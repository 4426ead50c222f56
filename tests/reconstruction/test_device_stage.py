"""The loop of GPUs, run on the CPU where it takes the same steps without graphs: against `Stage`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysweep.errors import NumericalError
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.device_stage import DeviceStage
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.programs import _TEMPLATES
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import find_unit
from raysweep.reconstruction.stage import Stage
from tests.families import make_model
from tests.reconstruction.ranges import range_of, reconstruct_trial

CASES: list[tuple[str, dict[str, Any]]] = [
    ("1", {"granularity": "block"}),
    ("1", {"granularity": "block", "max_grad_norm": 0.01}),
    ("1", {"granularity": "block", "optimizer": "sgd", "learning_rate": 0.3}),
    ("1", {"granularity": "block", "loss": "cosine"}),
    ("1", {"granularity": "block", "trainable": "lora+norms", "lora_rank": 4}),
    ("1.attention", {"granularity": "subblock"}),
    ("1.mlp", {"granularity": "subblock", "trainable": "weights", "loss": "normalized_mse"}),
    ("0-1", {"granularity": "window:2"}),
    ("1.mlp.up_proj", {"granularity": "matrix"}),
    ("1.mlp.up_proj", {"granularity": "matrix", "loss": "normalized_mse"}),
]


def trained(kind: Any, blocks: BlockRange, unit: str, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The unit's weights after training."""
    trial = reconstruct_trial(**fields)
    blocks.release("trial")
    blocks.begin("trial")
    for block in blocks.blocks.values():
        blocks.prune("trial", MaskRecipe.of(trial), block)
    found = find_unit(blocks, str(trial.granularity), unit)
    kind(blocks, "trial", trial, found, objective_of(blocks, "trial", trial, found)).train()
    return {name: tensor.detach().clone() for name, tensor in blocks.weights["trial"].items()}


@pytest.mark.parametrize(("unit", "fields"), CASES, ids=str)
def test_it_takes_the_same_steps(unit, fields):
    blocks = range_of(make_model("llama"))
    expected = trained(Stage, blocks, unit, fields)
    found = trained(DeviceStage, blocks, unit, fields)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(found[name] == 0, tensor == 0), name


def test_16_bit_weights_follow_their_float32_masters():
    blocks = range_of(make_model("llama").to(torch.bfloat16))
    fields = {"granularity": "block"}
    expected, found = (trained(kind, blocks, "1", fields) for kind in (Stage, DeviceStage))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.01, atol=1e-4, msg=name)


def test_divergence_is_an_error():
    with pytest.raises(NumericalError, match="not finite"):
        trained(
            DeviceStage, range_of(make_model("llama")), "1", {"granularity": "block", "learning_rate": 1e30}
        )


@pytest.mark.long
def test_blocks_of_one_structure_are_compiled_once():
    """With the compiler of torch, which takes its time."""
    blocks = range_of(make_model("llama"))
    blocks.compiles = True
    before, compiled = len(_TEMPLATES), []
    torch._dynamo.callback.on_compile_start(lambda *_: compiled.append(1))
    for unit in ("0", "1"):
        expected = trained(Stage, blocks, unit, {"granularity": "block"})
        found = trained(DeviceStage, blocks, unit, {"granularity": "block"})
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        if unit == "0":
            first = len(compiled)
    assert len(_TEMPLATES) == before + 1
    assert len(compiled) == first > 0
