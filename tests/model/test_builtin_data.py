"""The shipped data of builtin:pystdlib: splits, size, tokenizer and a model that is better than xz."""

from __future__ import annotations

import lzma
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import raysweep

DATA = Path(raysweep.__file__).parent / "model" / "builtin" / "pystdlib"
SPLITS = ("train", "validation", "test")
WINDOWS, LENGTH = 24, 256


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, list[str]]]:
    return {split: pq.read_table(DATA / "text" / f"{split}.parquet").to_pydict() for split in SPLITS}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DATA / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DATA / "model")


@pytest.mark.parametrize("column", ["path", "text"])
def test_no_file_is_in_two_splits(rows: dict[str, dict[str, list[str]]], column: str) -> None:
    values = [value for split in SPLITS for value in rows[split][column]]
    assert len(values) > 1000
    assert len(set(values)) == len(values)


def test_splits_are_about_90_5_5(rows: dict[str, dict[str, list[str]]]) -> None:
    files = {split: len(rows[split]["path"]) for split in SPLITS}
    assert 0.85 < files["train"] / sum(files.values()) < 0.95
    assert min(files["validation"], files["test"]) > 50
    assert all(set(rows[split]) == {"text", "path"} for split in SPLITS)


def test_the_folder_is_at_most_16_mib() -> None:
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) <= 16 * 2**20


def test_the_licence_of_text_and_model_is_beside_the_model_and_goes_with_it() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DATA / "model" / "LICENSE").read_text()


def test_the_tokenizer_keeps_every_text(tokenizer: Any) -> None:
    @settings(max_examples=300, deadline=None)
    @given(text=st.text(max_size=200))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    round_trip()


def test_the_tokenizer_adds_no_token(tokenizer: Any) -> None:
    assert tokenizer("").input_ids == []
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer("<|endoftext|>").input_ids == [0]


def test_the_model_has_the_promised_shape(model: Any) -> None:
    assert 5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert config.num_key_value_heads < config.num_attention_heads
    with safe_open(DATA / "model" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_model_needs_fewer_bits_than_xz(
    rows: dict[str, dict[str, list[str]]], model: Any, tokenizer: Any
) -> None:
    """Windows spread over the validation text, without context before them, against one xz stream of it."""
    text = "\n\n".join(rows["validation"]["text"])
    data = text.encode()
    xz_bits_per_byte = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    starts = torch.linspace(0, len(tokens) - LENGTH, WINDOWS).long()
    window_BT = tokens[starts[:, None] + torch.arange(LENGTH)]
    with torch.no_grad():
        logits = model(window_BT[:, :-1]).logits
    nats = float(functional.cross_entropy(logits.flatten(0, 1), window_BT[:, 1:].flatten(), reduction="sum"))
    predicted_bytes = sum(len(tokenizer.decode(window[1:]).encode()) for window in window_BT)
    assert nats / math.log(2) / predicted_bytes < xz_bits_per_byte
