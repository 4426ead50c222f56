"""Next-token losses against a naive float64 loop; a real model's perplexity against plain transformers."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from raysweep import at_once
from raysweep.model.checkpoint import ModelSource
from raysweep.model.evaluation import window_losses
from raysweep.model.shard import ModelShard
from tests.families import token_ids


def losses_through(shards: list[ModelShard], ids_BT: torch.Tensor, batch: int) -> list[float]:
    losses: list[float] = []
    for rows_BT in ids_BT.split(batch):
        with torch.no_grad():
            hidden_BTH = shards[0].embed(rows_BT)
            for block in (block for shard in shards for block in shard.blocks):
                hidden_BTH = block.run(hidden_BTH)
        losses += window_losses(shards[-1], hidden_BTH, rows_BT)
    return losses


@torch.no_grad()
def naive_losses(model: torch.nn.Module, ids_BT: torch.Tensor) -> list[float]:
    """Minus the log of the probability of every next token, one after another, from float64 probabilities."""
    losses = []
    for window in ids_BT:
        probabilities = torch.softmax(model(window[None]).logits[0].double(), dim=-1)
        losses.append(-sum(math.log(probabilities[t, window[t + 1]]) for t in range(len(window) - 1)))
    return losses


def test_losses_equal_a_naive_sum_over_targets(tiny_llama):
    ids_BT = token_ids(3, 20)
    shard = ModelShard.load(ModelSource(str(tiny_llama)))
    expected = naive_losses(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), ids_BT)
    losses = losses_through([shard], ids_BT, batch=3)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert min(losses) > 19 * math.log(128) * 0.5  # a sum over 19 targets, not a mean


def test_the_head_takes_few_windows_at_once_and_gives_the_same(tiny_llama, monkeypatch):
    ids_BT = token_ids(5, 12)
    shard = ModelShard.load(ModelSource(str(tiny_llama)))
    together = losses_through([shard], ids_BT, batch=5)
    sizes: list[int] = []
    logits = ModelShard.logits

    def counted(self: ModelShard, hidden_BTH: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden_BTH.shape[0])
        return logits(self, hidden_BTH)

    monkeypatch.setattr(ModelShard, "logits", counted)
    monkeypatch.setattr(at_once, "HEAD_TOKENS", 1)
    monkeypatch.setattr(at_once, "CPU_LOGITS", 2 * 12 * 128 + 1)
    assert losses_through([shard], ids_BT, batch=5) == pytest.approx(together, rel=1e-6)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(at_once, "CPU_LOGITS", 5 * 128)  # less than a window: in pieces of five tokens
    assert losses_through([shard], ids_BT, batch=5) == pytest.approx(together, rel=1e-6)
    assert sizes[3:] == [1] * 5 * 3


@pytest.fixture(scope="module")
def reference_windows(shared) -> torch.Tensor:
    frame = pd.read_parquet(shared / "reference/stories260K/evaluation.parquet")
    return torch.from_numpy(np.stack(frame["input_ids"])).long()


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 3, 5)], ids=str)
def test_perplexity_of_a_real_model_equals_plain_transformers(shared, reference_windows, cuts):
    folder = shared / "data/models/stories260K"
    ids_BT = reference_windows[:8]
    shards = [ModelShard.load(ModelSource(str(folder)), start, stop) for start, stop in pairwise(cuts)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = [float(model(rows, labels=rows).loss) for rows in ids_BT.split(1)]
    targets = ids_BT.numel() - len(ids_BT)
    perplexity = math.exp(math.fsum(losses_through(shards, ids_BT, batch=8)) / targets)
    assert perplexity == pytest.approx(math.exp(math.fsum(plain) / len(plain)), rel=1e-6)


def test_dense_perplexity_is_that_of_the_reference(shared, reference_windows):
    reference = json.loads((shared / "reference/stories260K/reference.json").read_text())
    shards = [
        ModelShard.load(ModelSource(str(shared / "data/models/stories260K")), start, stop)
        for start, stop in ((0, 3), (3, 5))
    ]
    losses = losses_through(shards, reference_windows, batch=8)
    perplexity = math.exp(math.fsum(losses) / (reference_windows.numel() - len(reference_windows)))
    assert perplexity == pytest.approx(reference["dense"]["perplexity"], rel=1e-6)
