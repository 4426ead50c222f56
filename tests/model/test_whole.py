"""A whole model by our own loader is the one of transformers, and with a trial's weights the one that was measured."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from raysweep.errors import RaysweepError
from raysweep.model.block_files import write_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.whole import load_whole
from raysweep.results.folders import OUTSIDE
from tests.families import token_ids


@torch.no_grad()
def test_it_is_the_model_of_transformers(tiny_llama):
    ids = token_ids(2, 16)
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert torch.equal(load_whole(ModelSource(str(tiny_llama)), "float32")(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_it_generates_as_its_folder_says(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    GenerationConfig(max_new_tokens=5, bos_token_id=1, eos_token_id=[7, 9], pad_token_id=0).save_pretrained(
        tmp_path
    )
    found = load_whole(ModelSource(str(tmp_path)))
    assert found.generation_config.eos_token_id == [7, 9]
    ids = token_ids(1, 4)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, do_sample=False)
    assert torch.equal(found.generate(ids, do_sample=False), expected)


def changed(folder, tmp_path):
    """Weights of a trial as shards write them: masks beside some of the weights of every block."""
    stored = load_file(folder / "model.safetensors")
    trial = {name: tensor + 1 for name, tensor in stored.items() if "down_proj" in name or "norm" in name}
    for block in range(4):
        mine = {name: tensor for name, tensor in trial.items() if f"layers.{block}." in name}
        masks = {f"model.layers.{block}.mlp.down_proj": torch.ones(32, 48, dtype=torch.uint8)}
        write_block(tmp_path, block, mine | masks)
    write_block(tmp_path, OUTSIDE, {"model.norm.weight": trial["model.norm.weight"]})
    return stored | trial


def test_a_trials_weights_take_the_place_of_its_own(tiny_llama, tmp_path):
    expected = changed(tiny_llama, tmp_path)
    found = load_whole(ModelSource(str(tiny_llama)), "float32", weights=tmp_path).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_weights_that_are_not_all_there_are_an_error(tiny_llama, tmp_path):
    changed(tiny_llama, tmp_path)
    (tmp_path / "block-2.safetensors").unlink()
    with pytest.raises(RaysweepError, match="block-2"):
        load_whole(ModelSource(str(tiny_llama)), "float32", weights=tmp_path)


def test_weights_of_another_model_are_an_error(tiny_llama, tmp_path):
    changed(tiny_llama, tmp_path)
    write_block(tmp_path, 1, {"model.layers.1.mlp.down_proj.weight": torch.ones(3, 3)})
    with pytest.raises(RaysweepError, match=r"down_proj.* \(3, 3\)"):
        load_whole(ModelSource(str(tiny_llama)), "float32", weights=tmp_path)
