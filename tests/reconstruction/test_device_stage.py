"""The loop of GPUs against `Stage`: on a GPU where there is one, else on the CPU, where it takes the same steps without
graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysweep.errors import NumericalError
from raysweep.model.shard import ModelShard
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction import programs
from raysweep.reconstruction.boundaries import INPUT
from raysweep.reconstruction.device_stage import DeviceStage
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.placement import Placement
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import find_unit
from raysweep.reconstruction.stage import Stage
from tests.families import make_model
from tests.reconstruction.ranges import IDS, pass_text, range_of, reconstruct_trial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

CASES: list[tuple[str, dict[str, Any]]] = [
    ("1", {"granularity": "block"}),
    ("1", {"granularity": "block", "max_grad_norm": 0.01}),
    ("1", {"granularity": "block", "optimizer": "sgd", "learning_rate": 0.3}),
    ("1", {"granularity": "block", "loss": "cosine"}),
    ("1", {"granularity": "block", "trainable": "lora+norms", "lora_rank": 4}),
    ("1.attention", {"granularity": "subblock"}),
    ("1.mlp", {"granularity": "subblock", "trainable": "weights", "loss": "normalized_mse"}),
    ("0-1", {"granularity": "window:2"}),
    (
        "1",
        {"granularity": "block", "batch_size": 6, "epochs": 3},
    ),  # the second of two batches is of one sample
    ("1", {"granularity": "block", "batch_size": 2, "epochs": 4}),
    ("1.mlp.up_proj", {"granularity": "matrix", "batch_size": 6, "epochs": 3}),
    ("1.mlp.up_proj", {"granularity": "matrix"}),
    ("1.mlp.up_proj", {"granularity": "matrix", "loss": "normalized_mse"}),
]


def a_range(dtype: torch.dtype = torch.float32) -> BlockRange:
    return range_of(make_model("llama").to(DEVICE, dtype))


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
    blocks = a_range()
    expected = trained(Stage, blocks, unit, fields)
    found = trained(DeviceStage, blocks, unit, fields)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(found[name] == 0, tensor == 0), name


def test_16_bit_weights_follow_their_float32_masters():
    blocks = a_range(torch.bfloat16)
    fields = {"granularity": "block"}
    expected, found = (trained(kind, blocks, "1", fields) for kind in (Stage, DeviceStage))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.01, atol=1e-4, msg=name)


def test_divergence_is_an_error():
    with pytest.raises(NumericalError, match="not finite"):
        trained(DeviceStage, a_range(), "1", {"granularity": "block", "learning_rate": 1e30})


@on_a_gpu
def test_where_activations_lie_changes_no_number():
    model = make_model("llama").to(DEVICE)
    found = []
    for store, device in {"host": "cpu", "disk": "cpu", "device": "cuda:0"}.items():
        shard = ModelShard.whole(model.eval().requires_grad_(False))
        blocks = BlockRange(shard, placement=Placement(activations=store))
        pass_text([blocks], CALIBRATION, IDS)
        assert str(blocks.texts[CALIBRATION].activations.get(INPUT, 0).device) == device
        found.append(trained(DeviceStage, blocks, "1", {"granularity": "block", "epochs": 4}))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
        assert torch.equal(found[2][name], tensor), name


@on_a_gpu
def test_a_loop_that_fails_in_the_middle_harms_no_other(monkeypatch):
    """In the first step, in the recording, and in the smaller batch at an epoch's end."""
    fields = {"granularity": "block", "epochs": 4}
    blocks = a_range()
    expected = trained(DeviceStage, blocks, "1", fields)
    step = DeviceStage._step
    for failing in (0, 1, 2):
        seen: list[int] = []

        def fails(self, *given, failing=failing, seen=seen):
            seen.append(1)
            if len(seen) == failing + 1:
                raise ValueError("in the middle")
            step(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(DeviceStage, "_step", fails)
            with pytest.raises(ValueError, match="in the middle"):
                trained(DeviceStage, blocks, "1", fields)
        for name, tensor in trained(DeviceStage, blocks, "1", fields).items():
            assert torch.equal(tensor, expected[name]), name


@on_a_gpu
def test_what_cannot_be_recorded_is_trained_step_by_step(monkeypatch, caplog):
    """A step that waits for the device, as experts that are looked up on the host do."""
    fields = {"granularity": "block", "epochs": 4}
    blocks = a_range()
    expected = trained(DeviceStage, blocks, "1", fields)
    step = DeviceStage._step

    def waits(self, given, *more):
        float(given.sum())
        step(self, given, *more)

    monkeypatch.setattr(DeviceStage, "_step", waits)
    for _ in range(2):
        for name, tensor in trained(DeviceStage, blocks, "1", fields).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert "are not recorded" in caplog.text
    monkeypatch.undo()
    assert torch.equal(
        trained(DeviceStage, blocks, "1", fields)["model.layers.1.mlp.up_proj.weight"],
        expected["model.layers.1.mlp.up_proj.weight"],
    )


@on_a_gpu
def test_many_units_take_no_more_memory_than_a_few():
    blocks = a_range()
    reserved = []
    for _ in range(40):
        trained(DeviceStage, blocks, "1", {"granularity": "block", "epochs": 4})
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[4]


def test_unlike_blocks_share_no_program(monkeypatch):
    """They have equal tensors, and differ in a setting, in a number, or only in their place in the model."""
    monkeypatch.setattr(programs, "compiled", lambda function: function)
    programs._forward_of.cache_clear()
    blocks = a_range()
    first, second = blocks.blocks[0], blocks.blocks[1]
    hidden = blocks.texts[CALIBRATION].activations.get(INPUT, 1)[:2].to(DEVICE)
    dense = {name: tensor.detach() for name, tensor in second.module.named_parameters()}
    instead = {f"{second.prefix}.{name}": tensor for name, tensor in dense.items()}
    programs.run_compiled(first, hidden, first.module, {})
    second.module.self_attn.scaling *= 3.0
    found = programs.run_compiled(second, hidden, second.module, instead)
    torch.testing.assert_close(found, second.run(hidden))
    assert not torch.equal(found, programs.run_compiled(first, hidden, first.module, {}))
    programs._forward_of.cache_clear()


@pytest.mark.long
def test_blocks_of_one_structure_are_compiled_once():
    """With the compiler of torch, which takes its time."""
    blocks = a_range()
    blocks.compiles = True
    graphs = torch._dynamo.utils.counters["stats"]
    made = []
    for unit in ("0", "1"):
        expected = trained(Stage, blocks, unit, {"granularity": "block", "epochs": 4})
        found = trained(DeviceStage, blocks, unit, {"granularity": "block", "epochs": 4})
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        made.append(graphs["unique_graphs"])
    assert blocks.compiles  # nothing went wrong
    assert made[0] == made[1] > 0
