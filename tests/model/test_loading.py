"""Reading a checkpoint: every layout that is in use, and a clear refusal of everything else."""

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
from raysweep.model.checkpoint import Checkpoint, ModelSource
from raysweep.model.shape import model_hash
from raysweep.model.shape_reading import read_shape
from raysweep.model.shard import ModelShard
from tests.families import make_model, token_ids

IDS = token_ids(2, 16)


def chain_logits(folder: Path | str, **options: str) -> torch.Tensor:
    shard = ModelShard.load(ModelSource(str(folder)), **options)
    hidden = shard.embed(IDS)
    for block in shard.blocks:
        hidden = block.run(hidden)
    return shard.logits(hidden)


@torch.no_grad()
def whole_logits(folder: Path | str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_in_several_files(tmp_path, tied):
    make_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(Checkpoint.open(ModelSource(str(tmp_path))).file_names()) > 3
    assert torch.equal(chain_logits(tmp_path), whole_logits(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_checkpoint_of_the_base_model_without_its_prefix(tmp_path, family):
    model = make_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    names = Checkpoint.open(ModelSource(str(tmp_path))).files
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in names)
    assert torch.equal(chain_logits(tmp_path), model(IDS).logits)


def test_a_checkpoint_with_the_head_in_place_of_the_embedding_tied_to_it(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(chain_logits(tmp_path), model(IDS).logits)


def test_a_bfloat16_checkpoint_is_raised_to_float32_exactly(tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    shard = ModelShard.load(ModelSource(str(tmp_path)))
    assert shard.dtype == torch.float32
    for block in shard.blocks:
        for name, linear in block.linears.items():
            stored = model.get_parameter(f"{name}.weight")
            assert torch.equal(linear.weight_OI, stored.float())
    assert torch.equal(chain_logits(tmp_path), whole_logits(tmp_path))


def test_a_float32_checkpoint_is_rounded_to_bfloat16_on_demand(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(chain_logits(tmp_path, dtype="bfloat16"), expected(IDS).logits)


def test_no_tensor_lies_where_the_file_put_it(tiny_llama):
    """A view into a file mapped into memory would be aligned as the file is, which can change bits."""
    shard = ModelShard.load(ModelSource(str(tiny_llama)))
    for parameter in shard.model.parameters():
        assert parameter.data_ptr() % 64 == 0
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert not parameter.requires_grad


def test_a_folder_in_the_home_directory(tiny_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert ModelSource(f"~/{tiny_llama.name}").load_config().model_type == "llama"


Breakage = Callable[[Path], object]


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_safetensors_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{ not json")


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_of_missing_file(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_of_missing_tensor(folder: Path) -> None:
    names = dict.fromkeys([*load_file(folder / "model.safetensors"), "spare"], "model.safetensors")
    del names["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def head_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    save_file(tensors, folder / "model.safetensors")


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_damaged(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


BREAKAGES: dict[Breakage, str] = {
    truncated: r"model\.safetensors of model .* is damaged",
    no_safetensors_at_all: r"model\.safetensors of model .* is damaged",
    index_of_nothing: r"model\.safetensors\.index\.json of model .* is damaged",
    index_without_map: r"model\.safetensors\.index\.json of model .* is damaged",
    index_of_missing_file: r"model-00001-of-00002\.safetensors is not there",
    index_of_missing_tensor: r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    tensor_missing: r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    head_missing: r"has no tensor 'lm_head\.weight'",
    wrong_shape: r"up_proj\.weight has shape \(3, 4\) in the checkpoint, not \(48, 32\)",
    pickled_only: r"has no safetensors weights\n(.|\n)*save_pretrained",
    config_missing: r"is no folder with a config\.json",
    config_damaged: r"cannot be read|is damaged",
}


@pytest.mark.parametrize("break_it", BREAKAGES, ids=lambda function: function.__name__)
def test_what_cannot_be_loaded_is_refused_with_its_cause(tiny_llama, tmp_path, break_it):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    break_it(folder)
    with pytest.raises(UsageError, match=BREAKAGES[break_it]):
        ModelShard.load(ModelSource(str(folder)))


@pytest.mark.parametrize("file_name", ["../x.safetensors", "/etc/passwd", "a\0b", "", "x" * 5000, 5, None])
def test_a_list_of_weights_names_files_beside_it_only(tiny_llama, tmp_path, file_name):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match="names of safetensors files beside it"):
        Checkpoint.open(ModelSource(str(folder)))


@pytest.mark.parametrize("break_it", [config_missing, config_damaged, pickled_only, index_of_missing_file])
def test_what_cannot_be_loaded_has_no_identity(tiny_llama, tmp_path, break_it):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    break_it(folder)
    with pytest.raises(UsageError):
        model_hash(ModelSource(str(folder)))


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./neither", "~/nor-this", "no-such-owner/no-such-model"]
)
def test_what_is_not_there_is_refused(path):
    with pytest.raises(UsageError, match=f"model {path!r}") as caught:
        read_shape(ModelSource(path))
    assert "a Hugging Face id" in str(caught.value.allowed)


def test_a_shard_reads_a_missing_tensor_of_another_shard_as_a_fault_all_the_same(tiny_llama, tmp_path):
    """The first shard alone would not notice; every launch checks the whole model before it starts."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    head_missing(folder)
    with pytest.raises(UsageError, match="lm_head"):
        ModelShard.load(ModelSource(str(folder)), 0, 1)
    with pytest.raises(UsageError, match="lm_head"):
        read_shape(ModelSource(str(folder)))
