"""Models cut into shards: the chain gives the whole model's numbers, a shard reads its own tensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from tests.families import BLOCKS, FAMILIES, Family, make_model, token_ids

CUTS = ((0, 3), (0, 1, 3), (0, 1, 2, 3))
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1, "U8": 1}

families = pytest.mark.parametrize("family", FAMILIES)


def load_chain(folder: Path, cuts: Sequence[int]) -> list[ModelShard]:
    return [ModelShard.load(ModelSource(str(folder)), start, stop) for start, stop in pairwise(cuts)]


@pytest.fixture(scope="module")
def chain(family_folder) -> Callable[[str, tuple[int, ...]], list[ModelShard]]:
    """chain(family, cuts): a model of the family in shards, loaded once."""
    return cache(lambda family, cuts: load_chain(family_folder(family), cuts))


@torch.no_grad()
def chain_logits(shards: list[ModelShard], ids: torch.Tensor) -> torch.Tensor:
    hidden = shards[0].embed(ids)
    for shard in shards:
        for block in shard.blocks:
            hidden = block.run(hidden)
    return shards[-1].logits(hidden)


@torch.no_grad()
def whole_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@families
def test_logits_through_the_shards_are_the_models(chain, family_folder, family, cuts):
    ids = token_ids(2, 16)
    assert torch.equal(chain_logits(chain(family, cuts), ids), whole_logits(family_folder(family), ids))


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, 3)), shape=st.tuples(st.integers(1, 3), st.integers(1, 20)))
def test_any_cut_and_any_shape_of_input(tiny_llama, cuts, shape):
    ids = token_ids(*shape)
    shards = load_chain(tiny_llama, [0, *sorted(cuts), 4])
    assert torch.equal(chain_logits(shards, ids), whole_logits(tiny_llama, ids))
    assert [shard.is_first for shard in shards] == [True, *[False] * len(cuts)]
    assert [shard.is_last for shard in shards] == [*[False] * len(cuts), True]


def test_one_shard_takes_inputs_of_several_shapes_in_turn(tiny_llama):
    shards = load_chain(tiny_llama, [0, 2, 4])
    for shape in ((2, 16), (1, 5), (2, 16), (3, 16)):
        ids = token_ids(*shape)
        assert torch.equal(chain_logits(shards, ids), whole_logits(tiny_llama, ids))


@families
def test_any_shard_can_have_the_head(chain, family_folder, family):
    folder, known = family_folder(family), FAMILIES[family]
    shards = [ModelShard.load(ModelSource(str(folder)), start, start + 1, head=True) for start in (0, 1)]
    assert [shard.has_head for shard in chain(family, (0, 1, 2, 3))] == [False, False, True]
    ids = token_ids(2, 16)
    with torch.no_grad():
        hidden = shards[0].embed(ids)
        for shard in chain(family, (0, 1, 2, 3)):
            hidden = shard.blocks[0].run(hidden)
    for shard in shards:
        assert torch.equal(shard.logits(hidden), whole_logits(folder, ids))
        assert shard.bytes_read == needed_bytes(folder, known, shard.start, shard.stop, head=True)


# What is read: bytes by tensor name, from the header of the file as its specification has it


def stored_bytes(folder: Path) -> dict[str, int]:
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {
        name: SIZES[entry["dtype"]] * math.prod(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def needed_bytes(folder: Path, known: Family, start: int, stop: int, head: bool = False) -> int:
    """Of the blocks, of the modules before them for the first shard, of those after them for one with the head."""
    modules = [f"{known.blocks}.{index}" for index in range(start, stop)]
    modules += known.first * (start == 0) + known.last * (head or stop == BLOCKS)
    if known.tied:
        modules = [known.first[0] if module == known.last[-1] else module for module in modules]
    stored = stored_bytes(folder)
    assert all(any(name.startswith(f"{module}.") for name in stored) for module in modules)
    return sum(size for name, size in stored.items() if name.startswith(tuple(f"{m}." for m in modules)))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@families
def test_a_shard_reads_its_blocks_and_what_its_place_needs(chain, family_folder, family, cuts):
    folder, known = family_folder(family), FAMILIES[family]
    for shard in chain(family, cuts):
        assert shard.bytes_read == needed_bytes(folder, known, shard.start, shard.stop)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path, family, tied):
    make_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path)
    ids = token_ids(2, 16)
    shards = load_chain(tmp_path, [0, 2, 3])
    assert torch.equal(chain_logits(shards, ids), whole_logits(tmp_path, ids))
    total = sum(stored_bytes(tmp_path).values())
    embedding = 64 * 32 * 4
    assert sum(shard.bytes_read for shard in shards) == total + embedding * tied  # read by both ends
    assert load_chain(tmp_path, [0, 3])[0].bytes_read == total  # and once by a shard that is both


def test_what_belongs_to_other_shards_takes_no_memory(family_folder):
    shard = ModelShard.load(ModelSource(str(family_folder("gpt2"))), 1, 2)
    owned = {id(parameter) for parameter in shard.blocks[0].module.parameters()}
    foreign = [parameter for parameter in shard.model.parameters() if id(parameter) not in owned]
    real = sum(parameter.nbytes for parameter in foreign if not parameter.is_meta)
    positions_and_last_norm = (64 * 32 + 2 * 32) * 4
    assert real == positions_and_last_norm


def test_embedding_narrower_than_the_hidden_states(tmp_path):
    """OPT-350m embeds into 512 of 1024 dimensions, and projects on both ends."""
    make_model("opt", word_embed_proj_dim=16).save_pretrained(tmp_path)
    ids = token_ids(2, 16)
    assert torch.equal(chain_logits(load_chain(tmp_path, [0, 1, 3]), ids), whole_logits(tmp_path, ids))


def test_the_model_has_its_blocks_back_after_an_error(tiny_llama):
    (shard,) = load_chain(tiny_llama, [0, 4])
    blocks = shard.model.model.layers
    with pytest.raises(IndexError):
        shard.embed(torch.tensor([[10**6]]))
    assert shard.model.model.layers is blocks
    ids = token_ids(1, 4)
    with torch.no_grad():
        assert torch.equal(shard.model(ids).logits, whole_logits(tiny_llama, ids))


def test_a_whole_model_in_memory_shares_its_weights():
    model = make_model("llama")
    blocks = model.model.layers
    shard = ModelShard.whole(model)
    assert model.model.layers is blocks
    assert [block.module for block in shard.blocks] == list(blocks)
    assert shard.bytes_read == 0
    ids = token_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(chain_logits([shard], ids), model(ids).logits)
