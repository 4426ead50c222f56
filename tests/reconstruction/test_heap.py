"""What was freed goes back to the system."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.reconstruction import hand, heap
from raysweep.reconstruction import range as range_module
from raysweep.reconstruction.placement import Placement
from raysweep.reconstruction.range import BlockRange
from raysweep.shards.peaks import memory_in_use


@pytest.mark.skipif(heap._trim is None, reason="another C library than glibc")
def test_holes_between_what_is_held_go_back():
    pieces = [torch.ones(4096) for _ in range(8192)]  # 128 MiB, too small to lie anywhere but in the heap
    full, kept = memory_in_use(), pieces[::64]
    del pieces
    gc.collect()
    heap.give_back()
    assert memory_in_use() < full - (96 << 20)
    assert all(bool((piece == 1).all()) for piece in kept)


def test_a_trial_is_gone_when_the_heap_is_given_back_behind_it(tiny_llama: Path, monkeypatch):
    there: list[bool] = []
    shard = ModelShard.load(ModelSource(str(tiny_llama)), dtype="float32", waits=True)
    blocks = BlockRange(shard, placement=Placement(weights="files"))
    monkeypatch.setattr(range_module, "give_back", lambda: there.append("trial" in blocks.weights))
    blocks.begin("trial")
    blocks.release("trial")
    assert there == [False]


def test_blocks_that_were_put_away_give_back_now_and_then(tiny_llama: Path, monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(hand, "give_back", lambda: given.append(1))
    shard = ModelShard.load(ModelSource(str(tiny_llama)), dtype="float32", waits=True)
    blocks = BlockRange(shard, placement=Placement(weights="files"))
    nbytes = sum(tensor.nbytes for tensor in shard.read_block(0).values())
    monkeypatch.setattr(hand, "GIVE_BACK_BYTES", 2 * nbytes)
    for _ in range(2):
        for block in blocks.blocks.values():
            with blocks.using(None, block):
                pass
    assert len(given) == 3  # of eight blocks the last two are in hand


def test_weights_of_trials_that_were_put_away_count_as_well(tiny_llama: Path, tmp_path: Path, monkeypatch):
    """While a trial is evaluated, next to nothing of a block is dense."""
    given: list[int] = []
    monkeypatch.setattr(hand, "give_back", lambda: given.append(1))
    shard = ModelShard.load(ModelSource(str(tiny_llama)), dtype="float32", waits=True)
    blocks = BlockRange(shard, placement=Placement(weights="files", trials="disk", scratch=tmp_path))
    blocks.begin("trial")
    for index in blocks.blocks:
        blocks.weights["trial"] |= shard.read_block(index)
    monkeypatch.setattr(hand, "GIVE_BACK_BYTES", 1)
    for count in (
        3,
        7,
    ):  # first they are put away, then what waits is used where it lies; one block is always in hand
        for block in blocks.blocks.values():
            with blocks.using("trial", block):
                pass
        assert len(given) == count
