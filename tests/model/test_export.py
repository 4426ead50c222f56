"""Exported folders: the checkpoint's own files and keys with a trial's weights, against what was put in by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raysweep.errors import RaysweepError
from raysweep.model.block_files import write_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.experts import tensor_of
from raysweep.model.export import MASKS, BlockTensors, Written, write_folder
from raysweep.model.linears import block_linears, find_blocks
from raysweep.model.shard import ModelShard
from raysweep.results.folders import OUTSIDE
from tests.exported import check_zeros, stored_tensors
from tests.families import FAMILIES, make_model, token_ids
from tests.zoo import each_family, make_zoo_model

families = pytest.mark.parametrize("family", FAMILIES)


def prune_by_hand(model: PreTrainedModel, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Changes all linears and norms of the blocks, with half of the weights zero, and leaves that as shards do; returns
    the masks."""
    generator = torch.Generator().manual_seed(seed)
    prefix, blocks = find_blocks(model)
    masks: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        linears, tensors = block_linears(block, f"{prefix}.{index}"), dict[str, Tensor]()
        for name, parameter in block.named_parameters():
            full = f"{prefix}.{index}.{name}"
            value = torch.randn(parameter.shape, generator=generator)
            if (linear := full.removesuffix(".weight")) in linears:
                masks[linear] = tensors[linear] = (value > 0).to(torch.uint8)
                value = value * masks[linear]
            parameter.data = value.to(parameter.dtype)
            tensors[full] = value
        write_block(folder, index, tensors)
    return masks


def exported(source: Path, weights: Path, target: Path, **options) -> Written:
    target.mkdir()
    return write_folder(ModelSource(str(source)), BlockTensors(weights), target, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids(2, 16)).logits


@families
def test_it_loads_as_the_model_that_was_changed(tmp_path, family_folder, family):
    model = AutoModelForCausalLM.from_pretrained(family_folder(family), dtype=torch.float32).eval()
    masks = prune_by_hand(model, tmp_path)
    written = exported(family_folder(family), tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert check_zeros(tmp_path / "out") == written.zeros == sum(int((m == 0).sum()) for m in masks.values())
    assert written.prunable == sum(mask.numel() for mask in masks.values())
    assert not written.rounded
    stored = load_file(tmp_path / "out" / MASKS)
    assert stored.keys() == masks.keys()
    assert all(torch.equal(stored[name], mask) for name, mask in masks.items())


@each_family
def test_every_family_loads_as_the_model_that_was_changed(tmp_path, family):
    """Experts by their own names, wherever the checkpoint keeps them."""
    model = make_zoo_model(family)
    model.save_pretrained(tmp_path / "dense")
    shard = ModelShard.load(ModelSource(str(tmp_path / "dense")), dtype="float32")
    for block in shard.blocks:
        parameters = {f"{block.prefix}.{name}": part for name, part in block.module.named_parameters()}
        masks = {name: torch.randint(0, 2, linear.stored_shape) for name, linear in block.linears.items()}
        changed = {name: torch.randn(part.shape) * 0.2 for name, part in parameters.items()}
        for name, mask in masks.items():
            changed[f"{name}.weight"] *= mask
        for name, value in changed.items():
            with torch.no_grad():
                tensor_of(model, name).copy_(value)
        write_block(
            tmp_path, block.index, {name: mask.to(torch.uint8) for name, mask in masks.items()} | changed
        )
    written = exported(tmp_path / "dense", tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert check_zeros(tmp_path / "out") == written.zeros > 0
    before, after = stored_tensors(tmp_path / "dense"), stored_tensors(tmp_path / "out")
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }


@families
def test_keys_shapes_and_types_are_the_checkpoints(tmp_path, family_folder, family):
    prune_by_hand(make_model(family), tmp_path)
    exported(family_folder(family), tmp_path, tmp_path / "out")
    before, after = stored_tensors(family_folder(family)), stored_tensors(tmp_path / "out")
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_files_are_cut_as_the_checkpoints(tmp_path, tied):
    model = make_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    prune_by_hand(model, tmp_path)
    exported(tmp_path / "dense", tmp_path, tmp_path / "out")
    indices = [
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text())
        for side in ("dense", "out")
    ]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
    for file, name in {(file, name) for name, file in indices[1]["weight_map"].items()}:
        assert name in load_file(tmp_path / "out" / file)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_what_lies_outside_of_the_blocks(tmp_path, tied):
    """Of a model that was retrained as a whole, under every name that a tied tensor has."""
    model = make_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    prune_by_hand(model, tmp_path)
    outside = {n: p for n, p in model.named_parameters(remove_duplicate=False) if ".layers." not in n}
    for parameter in {id(p): p for p in outside.values()}.values():
        parameter.data = parameter.data + 0.25
    write_block(tmp_path, OUTSIDE, outside)
    exported(tmp_path / "dense", tmp_path, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_the_checkpoints_own_dtype_rounds_and_another_can_be_asked_for(tmp_path):
    dense = make_model("llama").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    prune_by_hand(model, tmp_path)
    written = exported(tmp_path / "dense", tmp_path, tmp_path / "own")
    assert (written.dtype, written.rounded) == ("bfloat16", True)
    stored = stored_tensors(tmp_path / "own")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.to(torch.bfloat16))
    check_zeros(tmp_path / "own")
    assert (tmp_path / "own" / "config.json").read_text() == (tmp_path / "dense" / "config.json").read_text()
    written = exported(tmp_path / "dense", tmp_path, tmp_path / "float32", dtype="float32")
    assert (written.dtype, written.rounded) == ("float32", False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float32").eval()
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))


def test_weights_that_were_only_pruned_are_not_rounded(tmp_path):
    dense = make_model("llama").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    prefix, blocks = find_blocks(dense)
    for index, block in enumerate(blocks):
        tensors: dict[str, Tensor] = {}
        for name, linear in block_linears(block, f"{prefix}.{index}").items():
            weight = linear.module.get_parameter("weight").detach().float()
            tensors |= {name: (weight > 0).to(torch.uint8), f"{name}.weight": weight.clamp(min=0)}
        write_block(tmp_path, index, tensors)
    assert not exported(tmp_path / "dense", tmp_path, tmp_path / "out").rounded


def test_weights_lie_beside_the_masks_where_pruning_has_updated_them(tmp_path, family_folder):
    model = make_model("gpt2")
    masks = prune_by_hand(model, tmp_path)
    exported(family_folder("gpt2"), tmp_path, tmp_path / "out", updated=True)
    stored = load_file(tmp_path / "out" / MASKS)
    assert stored.keys() == masks.keys() | {f"{name}.weight" for name in masks}
    for name in masks:
        assert torch.equal(stored[f"{name}.weight"], model.get_parameter(f"{name}.weight"))


def test_what_makes_a_model_usable_comes_along(tmp_path, tiny_llama):
    prune_by_hand(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tmp_path)
    written = exported(tiny_llama, tmp_path, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_llama / name).read_bytes()
    assert sorted(written.files) == sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model.layers.0.mlp.up_proj": torch.zeros(48, 32, dtype=torch.uint8)}, "where its mask has none"),
        ({"model.layers.0.mlp.down": torch.zeros(2)}, r"layers\.0\.mlp\.down lies in no tensor"),
        ({"model.layers.0.mlp.up_proj.weight": torch.full((48, 32), torch.inf)}, "cannot hold"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, family_folder, damage, message):
    from raysweep.model.block_files import read_block

    prune_by_hand(make_model("llama"), tmp_path)
    tensors = read_block(tmp_path, 0)
    if "inf" in str(damage):
        tensors["model.layers.0.mlp.up_proj"] = torch.ones(48, 32, dtype=torch.uint8)
    write_block(tmp_path, 0, tensors | damage)
    with pytest.raises(RaysweepError, match=message):
        exported(family_folder("llama"), tmp_path, tmp_path / "out")


def test_numbers_beyond_float16_are_refused(tmp_path, family_folder):
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data.fill_(1e5)
    prune_by_hand(model, tmp_path)
    write_block(tmp_path, OUTSIDE, {"model.norm.weight": torch.full((32,), 1e5)})
    with pytest.raises(RaysweepError, match="float16 cannot hold"):
        exported(family_folder("llama"), tmp_path, tmp_path / "out", dtype="float16")


def test_damaged_blocks_are_seen(tmp_path):
    prune_by_hand(make_model("llama"), tmp_path)
    BlockTensors(tmp_path).check()
    file = tmp_path / "block-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RaysweepError, match="block-1"):
        BlockTensors(tmp_path).check()
    file.write_bytes(b"nothing")
    with pytest.raises(RaysweepError, match="block-1"):
        BlockTensors(tmp_path)
