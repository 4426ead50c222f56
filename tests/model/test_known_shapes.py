"""A shape that is kept is the one that was read, and is read again once anything has changed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysweep.errors import UsageError
from raysweep.model import checkpoint, known, shape_reading
from raysweep.model.checkpoint import ModelSource
from raysweep.model.known_shapes import known_shape
from raysweep.model.shape import ModelShape
from raysweep.model.shape_reading import read_shape
from tests.zoo import make_zoo_model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The models that were read, with a cache of this test's own in `cache`."""
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "UNSETTLED_S", 0.0)
    read: list[str] = []

    def reading(source: ModelSource, dtype: str = "auto") -> ModelShape:
        read.append(source.path)
        return read_shape(source, dtype)

    monkeypatch.setattr(shape_reading, "read_shape", reading)
    return read


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_is_kept_is_what_was_read(family, reads, tmp_path):
    make_zoo_model(family).save_pretrained(tmp_path / "model")
    source = ModelSource(str(tmp_path / "model"))
    first, again = known_shape(source), known_shape(source)
    assert first == again == read_shape(source)
    assert [type(sizes) for sizes in again.linears.values()] == [tuple] * len(again.linears)
    assert len(reads) == 1
    assert known_shape(source, "bfloat16").dtype_on_cpu == "bfloat16"
    assert len(reads) == 2


def test_a_change_of_any_file_is_seen(reads, model):
    source = ModelSource(str(model))
    assert known_shape(source).max_positions == 64
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 32}))
    assert known_shape(source).max_positions == 32
    weights, before = model / "model.safetensors", (model / "model.safetensors").stat()
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].reshape(tensors[name].shape[::-1]).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copies that keep times do
    assert weights.stat().st_size == before.st_size
    with pytest.raises(UsageError, match="has shape"):
        known_shape(source)
    weights.unlink()
    with pytest.raises(UsageError, match="no safetensors weights"):
        known_shape(source)


def test_other_code_reads_again(reads, model, monkeypatch):
    source = ModelSource(str(model))
    known_shape(source)
    monkeypatch.setattr(known, "version", lambda name: "another")
    known_shape(source)
    monkeypatch.setattr(known, "__file__", str(model / "other.py"))
    known_shape(source)
    assert len(reads) == 3


def test_a_model_with_code_of_its_own_is_always_read(reads, model):
    for _ in range(2):
        known_shape(ModelSource(str(model), trust_remote_code=True))
    assert len(reads) == 2


LISTS = '{"blocks": [{"linears": [], "transposed": [], "parameters": 1}], "unused": []}'


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"blocks": [1], "unused": []}', LISTS, "[" * 100_000])
def test_a_damaged_file_is_read_anew_and_replaced(damage, reads, model, tmp_path):
    source = ModelSource(str(model))
    shape = known_shape(source)
    (kept,) = (tmp_path / "cache" / "shapes").glob("*.json")
    kept.write_text(damage)
    assert known_shape(source) == shape == known_shape(source)
    assert len(reads) == 2


def test_where_nothing_can_be_kept_models_are_read(reads, model, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        known_shape(ModelSource(str(model)))
    assert len(reads) == 2


def test_the_warning_of_unused_tensors_comes_every_time(reads, model, caplog):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"stray": torch.ones(2)}, model / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            known_shape(ModelSource(str(model)))
    said = [record.message for record in caplog.records if "does not use: 'stray'" in record.message]
    assert len(said) == 2
    assert len(reads) == 1


@pytest.mark.parametrize("path", ["./nowhere", "~/nowhere/at/all", "/nowhere", "no/where/here", "no where"])
def test_a_folder_that_is_not_there_is_not_asked_for_on_the_hub(path, reads, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(checkpoint, "_download", lambda source, name: asked.append(name))
    with pytest.raises(UsageError, match="is no folder with a config.json"):
        known_shape(ModelSource(path))
    assert (asked, reads) == ([], [])
