"""Weights that were retrained become a trial's, wherever the blocks of its shards wait."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from raysweep.model.block_files import write_block
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.placement import Placement
from raysweep.results.folders import OUTSIDE, block_file
from raysweep.shards.group_info import ShardSpec
from raysweep.shards.worker import ShardWorker
from tests.families import token_ids

TEXT, IDS = "evaluation/own", token_ids(4, 16)
PLACEMENTS = (Placement(), Placement(weights="files", trials="disk", activations="disk"))


def retrained(model: Path, folder: Path) -> None:
    """Weights of all blocks and of what lies outside, none as it was."""
    shard = ModelShard.load(ModelSource(str(model)), dtype="float32")
    prefixes = [f"{block.prefix}." for block in shard.blocks]
    own = {name: parameter * 1.25 for name, parameter in shard.model.named_parameters()}
    for index, prefix in enumerate(prefixes):
        write_block(folder, index, {name: tensor for name, tensor in own.items() if name.startswith(prefix)})
    outside = {name: tensor for name, tensor in own.items() if not name.startswith(tuple(prefixes))}
    write_block(folder, OUTSIDE, outside)


def test_retrained_weights_are_measured_wherever_blocks_wait(tiny_llama, tmp_path):
    retrained(tiny_llama, tmp_path / "retrained")
    found = []
    for number, placement in enumerate(PLACEMENTS):
        spec = ShardSpec(str(tiny_llama), None, False, "float32", 0, 4, placement=placement)
        worker = ShardWorker(spec)
        worker.set_text(TEXT, IDS.numpy())
        worker.begin("trial")
        dense = worker.forward(None, True, TEXT, 0, len(IDS), None).losses
        worker.read_weights("trial", tmp_path / "retrained")
        found.append(worker.forward("trial", True, TEXT, 0, len(IDS), None).losses)
        assert found[-1] != dense
        worker.write_weights("trial", tmp_path / f"again-{number}")
        for index in range(4):
            one, other = (
                load_file(block_file(tmp_path / folder, index)) for folder in ("retrained", f"again-{number}")
            )
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert worker.forward(None, True, TEXT, 0, len(IDS), None).losses == dense
    assert found[0] == found[1]
