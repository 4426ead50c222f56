"""A model by one process: the perplexity of plain transformers, whatever ranges of blocks are in memory at once."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysweep.errors import CapacityError
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.model.tokens import TokenSet
from raysweep.shards.alone import perplexities, ranges_that_fit, shards_one_by_one
from tests.families import token_ids

CPU = torch.device("cpu")


@pytest.fixture
def texts() -> dict[str, TokenSet]:
    """One of more than a batch, one of few short windows."""
    ids = token_ids(70, 40).numpy()
    return {"long": TokenSet(ids), "short": TokenSet(ids[:3, :7])}


@torch.no_grad()
def naive_perplexity(folder, tokens: TokenSet) -> float:
    """Window by window from float64 probabilities of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in torch.tensor(tokens.input_ids):
        probabilities = torch.softmax(model(window[None]).logits[0].double(), dim=-1)
        losses += [-math.log(probabilities[t, window[t + 1]]) for t in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]], ids=str)
def test_perplexity_is_that_of_the_whole_model(tiny_llama, texts, ranges):
    found = perplexities(shards_one_by_one(ModelSource(str(tiny_llama)), "float32", CPU, ranges), texts)
    assert found == {
        name: pytest.approx(naive_perplexity(tiny_llama, tokens), rel=1e-6) for name, tokens in texts.items()
    }


def test_the_ranges_change_no_bit(tiny_llama, texts):
    source = ModelSource(str(tiny_llama))
    at_once, in_parts = (
        perplexities(shards_one_by_one(source, "float32", CPU, ranges), texts)
        for ranges in ([(0, 4)], [(0, 1), (1, 2), (2, 4)])
    )
    assert at_once == in_parts


def test_a_range_is_gone_before_the_next_one_is_read(tiny_llama, texts):
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def watched():
        nonlocal most
        for shard in shards_one_by_one(
            ModelSource(str(tiny_llama)), "float32", CPU, [(0, 2), (2, 3), (3, 4)]
        ):
            alive.append(weakref.ref(shard.model))
            most = max(most, sum(ref() is not None for ref in alive))
            yield shard
            del shard

    perplexities(watched(), texts)
    assert most == 1


def test_as_many_blocks_as_fit_are_read_at_once(tiny_llama):
    shape = read_shape(ModelSource(str(tiny_llama)))
    assert ranges_that_fit(shape, "float32", CPU, 32, 0) == [(0, 4)]
    small, large = 1, 1 << 40  # too small for a block, large enough for all
    assert ranges_that_fit(shape, "float32", CPU, 32, large) == [(0, 4)]
    while large - small > 1:
        middle = (small + large) // 2
        try:
            fits = len(ranges_that_fit(shape, "float32", CPU, 32, middle)) == 1
        except CapacityError:
            fits = False
        small, large = (small, middle) if fits else (middle, large)
    ranges = ranges_that_fit(shape, "float32", CPU, 32, small)  # one byte less than all of it takes
    assert len(ranges) > 1
    assert [index for start, stop in ranges for index in range(start, stop)] == [0, 1, 2, 3]
    with pytest.raises(CapacityError, match=r"block \d alone needs .* are free"):
        ranges_that_fit(shape, "float32", CPU, 32, small // 2)
