"""Every family of the zoo: numbers of the whole model, exact counts, lower losses, and masks read from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.range import BlockRange
from tests.reconstruction.ranges import load_ranges, prune_all, reconstruct_trial, recover_all
from tests.zoo import BLOCKS, each_family, make_zoo_model

if TYPE_CHECKING:
    from raysweep.config.trial import Trial

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(5))
SPARSITY, COLUMNS = 0.37, 8


@dataclass(frozen=True)
class Saved:
    """A model of a family: where it lies, and as two shards that a text has passed through."""

    folder: Path
    ranges: list[BlockRange]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """saved(family): made once."""

    @cache
    def make(family: str) -> Saved:
        folder = tmp_path_factory.mktemp(family)
        make_zoo_model(family).save_pretrained(folder)
        return Saved(folder, load_ranges(folder, [0, 1, BLOCKS]))

    return make


@torch.no_grad()
def logits_of(shards: list[ModelShard]) -> torch.Tensor:
    hidden = shards[0].embed(IDS)
    for shard in shards:
        for block in shard.blocks:
            hidden = block.run(hidden)
    return shards[-1].logits(hidden)


@each_family
def test_logits_through_two_shards_are_the_whole_models(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved(family).folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    logits = logits_of([blocks.shard for blocks in saved(family).ranges])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.02


@each_family
def test_a_checkpoint_in_several_files_and_in_bfloat16(saved, family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved(family).folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (
        read_shape(ModelSource(str(tmp_path))).linears
        == read_shape(ModelSource(str(saved(family).folder))).linears
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(IDS).logits
    logits = logits_of([ModelShard.load(ModelSource(str(tmp_path)))])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@each_family
def test_masks_have_exact_counts(saved, family):
    for blocks in saved(family).ranges:
        for block in blocks.blocks.values():
            for name, linear in block.linears.items():
                inputs = linear.weight_OI.shape[1]
                mask_OI = mask_of(blocks, reconstruct_trial(sparsity=SPARSITY), name)
                assert (mask_OI.sum(1) == inputs - int(inputs * SPARSITY)).all()
                trial = reconstruct_trial(criterion="sparsegpt", sparsity=SPARSITY, column_block=COLUMNS)
                for columns in mask_of(blocks, trial, name).split(COLUMNS, 1):
                    size = columns.numel()
                    assert columns.sum() == size - int(size * SPARSITY)


def mask_of(blocks: BlockRange, trial: Trial, name: str) -> torch.Tensor:
    block = next(block for block in blocks.blocks.values() if name in block.linears)
    layer = blocks.pruner.layer(MaskRecipe.of(trial), block, block.linears[name])
    assert layer is not None
    return layer.mask_OI


@each_family
def test_reconstruction_of_subblocks_lowers_their_losses(saved, family):
    trial = reconstruct_trial(learning_rate=0.003, epochs=3)
    results = [result for blocks in saved(family).ranges for result in recover_all(blocks, "trial", trial)]
    assert [result.unit for result in results] == [
        f"{index}.{half}" for index in range(BLOCKS) for half in ("attention", "mlp")
    ]
    for result in results:
        assert result.loss_after < result.loss_before, result
    for blocks in saved(family).ranges:
        for name, layer in blocks.layers["trial"].items():
            block = next(block for block in blocks.blocks.values() if name in block.linears)
            weight_OI = block.linears[name].from_stored(blocks.weights["trial"][f"{name}.weight"])
            assert not weight_OI[~layer.mask_OI].any()
        blocks.release("trial")


@each_family
def test_masks_read_from_a_file_give_the_same_weights(saved, family, tmp_path):
    trial = reconstruct_trial(criterion="sparsegpt", sparsity=SPARSITY)
    tensors: dict[str, torch.Tensor] = {}
    for blocks in saved(family).ranges:
        prune_all(blocks, "trial", trial)
        for block in blocks.blocks.values():
            for name, layer in blocks.layers["trial"].items():
                if name in block.linears:
                    tensors[name] = block.linears[name].as_stored(layer.mask_OI).to(torch.uint8)
        tensors |= blocks.weights["trial"]
    save_file(tensors, tmp_path / "masks.safetensors")
    file = MaskFile(tmp_path / "masks.safetensors")
    file.check(read_shape(ModelSource(str(saved(family).folder))).stored_shapes)
    again = reconstruct_trial(criterion=f"file:{file.path}", sparsity=None, statistics_stream=None)
    for blocks in saved(family).ranges:
        blocks.pruner.own_criteria[f"file:{file.path}"] = file.path
        prune_all(blocks, "again", again)
        assert blocks.weights["again"].keys() == blocks.weights["trial"].keys()
        for name, tensor in blocks.weights["again"].items():
            assert torch.equal(tensor, blocks.weights["trial"][name])
        blocks.release("trial")
        blocks.release("again")


@each_family
def test_no_router_is_a_linear(saved, family):
    """Nothing that has as many outputs as there are experts, or one, may be among them."""
    for blocks in saved(family).ranges:
        for block in blocks.blocks.values():
            assert all(linear.weight_OI.shape[0] not in (1, 4) for linear in block.linears.values())
            leaders = [block.linears[name] for name in block.leaders]
            assert all(blocks.statistics.rows(CALIBRATION, linear, block) for linear in leaders)
