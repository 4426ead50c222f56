"""Damaged checkpoints: refused with the file and the tensor named, or taken as transformers takes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raysweep.errors import UsageError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from tests.families import make_model, token_ids
from tests.zoo import make_zoo_model

IDS = token_ids(2, 16)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def several_files(tmp_path: Path) -> Path:
    """A Llama in several files, with an index."""
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def file_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_file_is_named(several_files):
    gone = file_of(several_files, UP)
    gone.unlink()
    for read in (read_shape, ModelShard.load):
        with pytest.raises(UsageError, match=f"{gone.name} is not there"):
            read(ModelSource(str(several_files)))


def test_a_tensor_of_another_shape_is_named_with_its_file(several_files):
    file = file_of(several_files, UP)
    edit(file, lambda tensors: tensors.update({UP: torch.zeros(3, 4)}))
    for read in (read_shape, ModelShard.load):
        with pytest.raises(UsageError) as caught:
            read(ModelSource(str(several_files)))
        assert f"{UP} has shape (3, 4)" in str(caught.value)
        assert file.name in str(caught.value)


def test_an_expert_of_another_shape_is_named_with_its_file(tmp_path):
    make_zoo_model("mixtral").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.2.w3.weight"
    stored = load_file(tmp_path / "model.safetensors")
    (name,) = [key for key in stored if key.endswith("layers.1.block_sparse_moe.experts.2.w3.weight")]
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(5, 32)}))
    for read in (read_shape, ModelShard.load):
        with pytest.raises(UsageError, match=r"\(53, 32\).*\(96, 32\).*model\.safetensors") as caught:
            read(ModelSource(str(tmp_path)))
        assert "experts.2.gate_up_proj" in str(caught.value)


def test_a_missing_expert_is_a_missing_tensor(tmp_path):
    make_zoo_model("mixtral").save_pretrained(tmp_path)
    edit(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight"),
    )
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.experts\.gate_up_proj', nor its experts"):
        read_shape(ModelSource(str(tmp_path)))


def test_a_tensor_that_the_model_does_not_use_is_named_and_left(several_files, caplog):
    """As transformers does it."""
    file, extra = file_of(several_files, UP), "model.layers.7.mlp.up_proj.weight"
    edit(file, lambda tensors: tensors.update({extra: torch.zeros(3, 4)}))
    index = several_files / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][extra] = file.name
    index.write_text(json.dumps(content))
    read_shape(ModelSource(str(several_files)))
    assert any(extra in record.message and file.name in record.message for record in caplog.records)
    assert torch.equal(chain_logits(several_files), whole_logits(several_files))


@torch.no_grad()
def chain_logits(folder: Path) -> torch.Tensor:
    shard = ModelShard.load(ModelSource(str(folder)))
    hidden = shard.embed(IDS)
    for block in shard.blocks:
        hidden = block.run(hidden)
    return shard.logits(hidden)


@torch.no_grad()
def whole_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def stored_twice(folder: Path, change: float) -> Path:
    """A tied Llama with its head as a tensor of its own, `change` off."""
    make_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    edit(
        folder / "model.safetensors",
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"] + torch.tensor(change)}
        ),
    )
    return folder


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path, caplog):
    folder = stored_twice(tmp_path, 0.0)
    read_shape(ModelSource(str(folder)))
    assert not caplog.records
    assert torch.equal(chain_logits(folder), whole_logits(folder))


def test_tied_weights_that_differ_are_refused_by_name(tmp_path):
    folder = stored_twice(tmp_path, 0.5)
    with pytest.raises(UsageError, match="hold different numbers") as caught:
        read_shape(ModelSource(str(folder)))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.safetensors", "tie_word_embeddings"):
        assert name in str(caught.value)


def test_what_the_message_says_mends_it(tmp_path):
    folder = stored_twice(tmp_path, 0.5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    read_shape(ModelSource(str(folder)))
    assert torch.equal(chain_logits(folder), whole_logits(folder))


def test_quantized_weights_are_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    said = {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(UsageError, match=r"is quantized \(mxfp4\)"):
        read_shape(ModelSource(str(folder)))
