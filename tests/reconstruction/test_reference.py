"""Masks, pruned perplexities and reconstruction on a small trained model, against what public codes gave."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import raysweep
from raysweep.config.trial import Trial
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.range import CALIBRATION, BlockRange, MaskRecipe, Weights
from raysweep.reconstruction.recovery import UnitResult, recover_unit, unit_names
from tests.reconstruction.ranges import pass_text, prune_all

SPARSITIES = ("0.5", "0.7")


def windows(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.stack(pd.read_parquet(path)["input_ids"])).long()


class Reference:
    """The shared folder opened: its model and texts, and what was found with them."""

    def __init__(self, shared: Path) -> None:
        folder = shared / "reference/stories260K"
        self.numbers: dict[str, Any] = json.loads((folder / "reference.json").read_text())
        self.masks, self.statistics = np.load(folder / "masks.npz"), np.load(folder / "statistics.npz")
        self.calibration = windows(folder / "calibration.parquet")
        self.evaluation = windows(folder / "evaluation.parquet")
        path = shared / "data/models/stories260K"
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def mask(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        bits = np.unpackbits(self.masks[key], count=math.prod(shape))
        return torch.from_numpy(bits.reshape(shape).astype(bool))

    @torch.no_grad()
    def perplexity(self, weights: dict[str, torch.Tensor]) -> float:
        """Of the model with these tensors in it, on the evaluation windows, by transformers alone."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights, strict=False)
        total = 0.0
        for ids_BT in self.evaluation.split(8):
            logits_BTV = model(ids_BT).logits[:, :-1]
            loss = functional.cross_entropy(
                logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
            )
            total += loss.double().sum().item()
        return math.exp(total / self.evaluation[:, 1:].numel())


@pytest.fixture(scope="module")
def reference(shared: Path) -> Reference:
    return Reference(shared)


@pytest.fixture(scope="module")
def blocks(reference) -> BlockRange:
    """All blocks of the reference's model with its calibration windows passed through them."""
    reference.model.requires_grad_(False)
    blocks = BlockRange(ModelShard.whole(reference.model))
    pass_text([blocks], CALIBRATION, reference.calibration)
    return blocks


def mask_fields(criterion: str, sparsity: str) -> dict[str, Any]:
    name, group = {"magnitude-row": ("magnitude", "row"), "magnitude": ("magnitude", "matrix")}.get(
        criterion, (criterion, "row")
    )
    if ":" in sparsity:
        return {"criterion": name, "pattern": sparsity}
    return {"criterion": name, "sparsity": float(sparsity), "comparison_group": group}


def prune(blocks: BlockRange, criterion: str, sparsity: str) -> tuple[dict[str, torch.Tensor], Weights]:
    """Masks by linear, and pruned weights by name."""
    trial = Trial(recovery="none", **mask_fields(criterion, sparsity))
    blocks.release("pruned")
    prune_all(blocks, "pruned", trial)
    masks = {
        name: blocks.mask(MaskRecipe.of(trial), block, linear)
        for block in blocks.blocks.values()
        for name, linear in block.linears.items()
    }
    return masks, blocks.weights["pruned"]


EXACT = [("magnitude-row", sparsity, "none") for sparsity in SPARSITIES]
EXACT += [("wanda", sparsity, "dense") for sparsity in (*SPARSITIES, "0.6", "2:4")]
EXACT += [("magnitude", "2:4", "none")]


@pytest.mark.parametrize(("criterion", "sparsity", "stream"), EXACT)
def test_masks_and_perplexities_are_the_references(blocks, reference, criterion, sparsity, stream):
    masks, weights = prune(blocks, criterion, sparsity)
    for name, mask_OI in masks.items():
        key = f"{criterion}/{sparsity}/{stream}/{name}"
        if key in reference.masks:
            assert torch.equal(mask_OI, reference.mask(key, tuple(mask_OI.shape))), name
    expected = reference.numbers["criteria"][criterion][sparsity][stream]["perplexity"]
    assert reference.perplexity(weights) == pytest.approx(expected, rel=1e-3)


def test_the_reference_holds_the_masks_that_are_compared(reference):
    linears = len(reference.numbers["linears"])
    for criterion, sparsity, stream in EXACT:
        prefix = f"{criterion}/{sparsity}/{stream}/"
        assert sum(key.startswith(prefix) for key in reference.masks) in (0, linears)
    assert sum(key.startswith("wanda/0.5/dense/") for key in reference.masks) == linears
    assert sum(key.startswith("magnitude-row/0.5/none/") for key in reference.masks) == linears


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_magnitude_over_the_whole_matrix_removes_one_entry_less_than_the_public_code(
    blocks, reference, sparsity
):
    masks, weights = prune(blocks, "magnitude", sparsity)
    for mask_OI in masks.values():
        assert int((~mask_OI).sum()) == int(mask_OI.numel() * float(sparsity))
    expected = reference.numbers["criteria"]["magnitude"][sparsity]["none"]["perplexity"]
    assert reference.perplexity(weights) == pytest.approx(expected, rel=0.02)


def test_wandas_statistics_are_the_references(blocks, reference):
    tokens = reference.calibration.shape[1]
    for block in blocks.blocks.values():
        for name, linear in block.linears.items():
            sum_over_window = blocks.statistics(CALIBRATION, linear, block).mean_square_I.numpy() * tokens
            np.testing.assert_allclose(sum_over_window, reference.statistics[f"dense/{name}"], rtol=1e-4)


# Reconstruction: Wanda 0.6 on dense statistics, five epochs of two windows a step in file order

SETTINGS = {"epochs": 5, "batch_size": 2, "shuffle": False}
TRAINABLE = {"all": "weights and norms", "weights": "weights"}


def reference_rows(
    reference: Reference, granularity: str, rate: float, trainable: str
) -> list[dict[str, Any]]:
    """One or more processes of the public code with these settings; some recorded the losses of their units."""
    known = reference.numbers["reconstruction"]["wanda"]["0.6"]
    wanted = (granularity, rate, TRAINABLE[trainable])
    rows = [
        row
        for row in known["runs"] + known["further_runs"]
        if (row["granularity"], row["learning_rate"], row["trainable"]) == wanted
        and row["stream"].startswith("dense inputs")
    ]
    assert rows
    return rows


def recover(
    blocks: BlockRange, unit: str, granularity: str, rate: float, trainable: str = "all"
) -> UnitResult:
    fields = {
        "recovery": "reconstruct",
        "granularity": granularity,
        "learning_rate": rate,
        "trainable": trainable,
    }
    trial = Trial(**mask_fields("wanda", "0.6") | fields | SETTINGS)
    blocks.release("trial")
    prune_all(blocks, "trial", trial)
    return recover_unit(blocks, "trial", trial, unit)


def check_losses(
    blocks: BlockRange, reference: Reference, unit: str, granularity: str, trainable: str
) -> None:
    """Of one unit before and after recovery at learning rate 1e-3; the reference numbers subblocks 0, 1, 2, ..."""
    index, _, half = unit.partition(".")
    key = str(2 * int(index) + (half == "mlp")) if half else index
    name = "mean_squared_error_per_window_before_after"
    known = [row[name] for row in reference_rows(reference, granularity, 1e-3, trainable) if name in row]
    assert known
    result = recover(blocks, unit, granularity, 1e-3, trainable)
    for losses in known:
        assert result.loss_before == pytest.approx(losses[key][0], rel=1e-4)
        assert result.loss_after == pytest.approx(losses[key][1], rel=1e-3)


def test_losses_of_one_unit_are_the_references(blocks, reference):
    check_losses(blocks, reference, "1.attention", "subblock", "all")


@pytest.mark.long
@pytest.mark.parametrize("trainable", ["all", "weights"])
@pytest.mark.parametrize("granularity", ["subblock", "block"])
def test_losses_of_all_units_are_the_references(blocks, reference, granularity, trainable):
    for unit in unit_names(blocks, granularity):
        check_losses(blocks, reference, unit, granularity, trainable)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.gate_proj"])
def test_a_matrix_starts_at_the_references_error_and_comes_near_its_optimum(blocks, reference, name):
    """The optimum was found in float64 without steps: none can pass it."""
    known = reference.numbers["per_matrix_optimum"][name]
    unit = name.removeprefix("model.layers.")
    result = recover(blocks, unit, "matrix", 3e-3)
    assert result.error_before == pytest.approx(known["relative_masked"], rel=1e-4)
    assert known["relative_optimum"] < result.error_after
    gain = (result.error_before - result.error_after) / (known["relative_masked"] - known["relative_optimum"])
    assert gain > 0.9


@pytest.mark.long
@pytest.mark.parametrize(
    ("granularity", "rate", "trainable"),
    [
        ("subblock", 1e-3, "all"),
        ("subblock", 1e-4, "all"),
        ("subblock", 1e-3, "weights"),
        ("block", 1e-3, "all"),
        ("block", 1e-4, "all"),
        ("block", 1e-3, "weights"),
    ],
)
def test_perplexities_after_reconstruction_are_the_references(reference, granularity, rate, trainable):
    pruned = raysweep.prune(reference.model, reference.calibration, **mask_fields("wanda", "0.6"))
    recovered = raysweep.reconstruct(
        reference.model,
        pruned,
        reference.calibration,
        granularity=granularity,
        learning_rate=rate,
        trainable=trainable,
        **SETTINGS,
    )
    perplexity = reference.perplexity(recovered.weights)
    for row in reference_rows(reference, granularity, rate, trainable):
        assert perplexity == pytest.approx(row["perplexity"], rel=0.02)
