"""Sizes and identity of a model from its files, against the loaded model and small changes of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raysweep.errors import UsageError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape import model_hash
from raysweep.model.shape_reading import read_shape
from tests.families import FAMILIES, HIDDEN, VOCABULARY, make_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_sizes_are_those_of_the_loaded_model(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    shape = read_shape(ModelSource(str(tmp_path)))
    blocks = model.get_submodule(FAMILIES[family].blocks)
    assert [block.parameters for block in shape.blocks] == [
        sum(parameter.numel() for parameter in block.parameters()) for block in blocks
    ]
    assert (shape.hidden, shape.vocabulary) == (HIDDEN, VOCABULARY)
    assert shape.vocabulary_parameters == model.get_input_embeddings().weight.numel()
    assert shape.parameters == sum(block.parameters for block in shape.blocks) + shape.vocabulary_parameters
    for name, (outputs, inputs) in shape.blocks[1].linears.items():
        module = model.get_submodule(name)
        assert module(torch.zeros(1, inputs)).shape == (1, outputs)
    assert sum(len(names) for names in FAMILIES[family].groups) == len(shape.blocks[1].linears)


def test_the_longest_sequence_is_the_models_or_unlimited(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "llama")
    assert read_shape(ModelSource(str(tmp_path / "llama"))).max_positions == 64
    config = tmp_path / "llama" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"max_position_embeddings": 4096}))
    assert read_shape(ModelSource(str(tmp_path / "llama"))).max_positions == 4096


@pytest.mark.parametrize(
    ("stored", "wanted", "on_cpu", "on_device"),
    [
        (torch.bfloat16, "auto", "float32", "bfloat16"),
        (torch.float16, "auto", "float32", "float16"),
        (torch.bfloat16, "float32", "float32", "float32"),
        (torch.float32, "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_dtypes_are_resolved_for_a_cpu_and_for_a_device(tmp_path, stored, wanted, on_cpu, on_device):
    make_model("llama").to(stored).save_pretrained(tmp_path)
    shape = read_shape(ModelSource(str(tmp_path)), wanted)
    assert (shape.dtype_on_cpu, shape.dtype_on_device) == (on_cpu, on_device)


@pytest.fixture
def model_folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_identity_is_of_the_content_not_of_its_place_or_writer(tiny_llama, model_folder):
    expected = model_hash(ModelSource(str(tiny_llama)))
    assert len(expected) == 16
    edit_config(model_folder, transformers_version="99.0", _name_or_path="/elsewhere")
    (model_folder / "README.md").write_text("not part of the model")
    assert model_hash(ModelSource(str(model_folder))) == expected


def test_identity_changes_with_one_weight(tiny_llama, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    model.save_pretrained(model_folder)
    assert model_hash(ModelSource(str(model_folder))) != model_hash(ModelSource(str(tiny_llama)))


def test_identity_changes_with_the_configuration(tiny_llama, model_folder):
    edit_config(model_folder, rms_norm_eps=1e-3)
    assert model_hash(ModelSource(str(model_folder))) != model_hash(ModelSource(str(tiny_llama)))


def test_identity_changes_with_code_that_may_run(model_folder):
    trusted = ModelSource(str(model_folder), trust_remote_code=True)
    (model_folder / "modeling.py").write_text("HEADS = 4\n")
    before, untrusted = model_hash(trusted), model_hash(ModelSource(str(model_folder)))
    (model_folder / "modeling.py").write_text("HEADS = 8\n")
    assert model_hash(trusted) != before
    assert model_hash(ModelSource(str(model_folder))) == untrusted


def test_a_file_of_the_hugging_face_cache_is_known_by_its_name(tiny_llama, model_folder, tmp_path):
    """There a weight file is a link to a blob that is called by its SHA-256, so it need not be read again."""
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    weights = model_folder / "model.safetensors"
    shutil.move(weights, blob)
    weights.symlink_to(blob)
    by_name = model_hash(ModelSource(str(model_folder)))
    assert by_name != model_hash(ModelSource(str(tiny_llama)))
    blob.rename(blob.with_name("cd" * 32))
    weights.unlink()
    weights.symlink_to(blob.with_name("cd" * 32))
    assert model_hash(ModelSource(str(model_folder))) != by_name


@pytest.mark.parametrize("kind", ["encoder-decoder", "unknown"])
def test_what_is_no_causal_language_model_is_refused(tmp_path, kind, model_folder):
    from transformers import T5Config

    if kind == "unknown":
        edit_config(model_folder, model_type="no_such_model")
    else:
        T5Config().save_pretrained(model_folder)
    with pytest.raises(UsageError, match="allowed: "):
        read_shape(ModelSource(str(model_folder)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size: 1000000000000"),
        ({"head_dim": 10**9}, "head_dim: 1000000000"),
        ({"hidden_size": 33}, r"hidden size \(33\) is not a multiple"),
        ({"num_attention_heads": 0}, "is no causal language model|cannot be read"),
        ({"rope_parameters": 5}, "cannot be read"),
        ({"use_cache": "x"}, "cannot be read.*use_cache"),
        ({"hidden_act": "nothing"}, "is no causal language model: .*nothing"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings"),
        ({"vocab_size": 100}, r"has shape \(128, 32\), and config.json asks for \(100, 32\)"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "trust_remote_code"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_be_is_refused_before_a_model_is_built(model_folder, fields, named):
    """In a moment: a billion blocks would take hours, and wide ones all memory."""
    (model_folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    edit_config(model_folder, **fields)
    with pytest.raises(UsageError, match=named):
        read_shape(ModelSource(str(model_folder)))
    assert not (model_folder / "ran").exists()


def test_weights_of_whole_numbers_are_refused(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, model_folder / "model.safetensors")
    with pytest.raises(UsageError, match=f"{name} holds numbers of type I8"):
        read_shape(ModelSource(str(model_folder)))


def test_a_list_of_weights_that_lies_is_refused_before_anything_starts(model_folder):
    """It names a file for a tensor that lies in another one."""
    tensors = load_file(model_folder / "model.safetensors")
    names = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "other.safetensors"}
    save_file({"spare": torch.zeros(3)}, model_folder / "other.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match=r"other.safetensors has no tensor 'lm_head.weight'"):
        read_shape(ModelSource(str(model_folder)))
