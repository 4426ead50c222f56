"""Ranges of blocks through which a text has passed, and trials on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysweep.config.trial import Trial
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shard import ModelShard
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION, UnitResult
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import recover_unit, unit_names
from tests.families import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES, TOKENS = 7, 16
IDS = token_ids(SAMPLES, TOKENS)
VALIDATION_IDS = token_ids(3, TOKENS, seed=2)


def pass_text(ranges: Sequence[BlockRange], text: str, ids_ST: torch.Tensor) -> None:
    """The dense pass of one text through ranges that follow one another."""
    for rows in batches(ids_ST.shape[0], ids_ST.shape[1], ranges[0].device):
        hidden_BTH = ranges[0].shard.embed(ids_ST[rows])
        for blocks in ranges:
            hidden_BTH = blocks.dense_pass(text, ids_ST.shape[0], rows, hidden_BTH)


def range_of(model: PreTrainedModel, validation: bool = False, keep_halves: bool = True) -> BlockRange:
    """All blocks of a model in memory, with the calibration set passed through them."""
    blocks = BlockRange(ModelShard.whole(model.eval().requires_grad_(False)))
    blocks.keep_halves = keep_halves
    pass_text([blocks], CALIBRATION, IDS)
    if validation:
        pass_text([blocks], VALIDATION, VALIDATION_IDS)
    return blocks


def load_ranges(folder: Path, cuts: Sequence[int]) -> list[BlockRange]:
    """Ranges of a model on disk, cut at `cuts`, with both texts passed through them."""
    source = ModelSource(str(folder))
    ranges = [BlockRange(ModelShard.load(source, start, stop)) for start, stop in pairwise(cuts)]
    pass_text(ranges, CALIBRATION, IDS)
    pass_text(ranges, VALIDATION, VALIDATION_IDS)
    return ranges


def reconstruct_trial(**fields: Any) -> Trial:
    """A trial that reconstructs under Wanda 0.5, in two epochs of three samples a step."""
    defaults = {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.5,
        "granularity": "subblock",
        "learning_rate": 0.01,
        "epochs": 2,
        "batch_size": 3,
    }
    return Trial(**defaults | fields)


def prune_all(blocks: BlockRange, name: str, trial: Trial) -> None:
    blocks.begin(name)
    for block in blocks.blocks.values():
        blocks.prune(name, MaskRecipe.of(trial), block)


def recover_all(blocks: BlockRange, name: str, trial: Trial) -> list[UnitResult]:
    """Prunes the blocks and recovers all units of a trial."""
    prune_all(blocks, name, trial)
    results = [recover_unit(blocks, name, trial, unit) for unit in unit_names(blocks, str(trial.granularity))]
    return [result for result in results if result is not None]


def mask_of(blocks: BlockRange, recipe: MaskRecipe, linear_name: str) -> torch.Tensor:
    """The mask (O, I) that a recipe gives one of the linears."""
    block = next(block for block in blocks.blocks.values() if linear_name in block.linears)
    layer = blocks.pruner.layer(recipe, block, block.linears[linear_name])
    assert layer is not None
    return layer.mask_OI


def masks_of(blocks: BlockRange, trial: Trial) -> dict[str, torch.Tensor]:
    """By full parameter name, in the layout of the parameter."""
    recipe = MaskRecipe.of(trial)
    return {
        f"{name}.weight": linear.as_stored(mask_of(blocks, recipe, name))
        for block in blocks.blocks.values()
        for name, linear in block.linears.items()
    }
