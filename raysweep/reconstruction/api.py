"""Prunes and reconstructs an ordinary Hugging Face model in one process: the Python calls `prune` and `reconstruct`."""

# O outputs, I inputs of a linear; S samples, T tokens of a sample

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from raysweep.config.trial import Trial
from raysweep.errors import UsageError
from raysweep.model.shard import ModelShard, survey
from raysweep.model.structure import find_blocks
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.range import CALIBRATION, BlockRange, MaskRecipe, Weights
from raysweep.reconstruction.recovery import recover_unit, unit_names

TRIAL = "trial"


@dataclass(frozen=True)
class Pruned:
    """Masks and weights of a pruned model.

    masks:   by linear, bool (O, I), True = kept
    weights: by full parameter name, the pruned tensors as the model stores them
    linears: one row per linear: realized sparsity, dead inputs, error of its output on the calibration set
    """

    masks: dict[str, Tensor]
    weights: Weights
    linears: pd.DataFrame
    trial: Trial

    def apply(self, model: nn.Module) -> None:
        """Writes the weights into `model`."""
        _write(model, self.weights)


@dataclass(frozen=True)
class Recovered:
    """Weights of a reconstructed model, by full parameter name, and one row per reconstruction unit."""

    weights: Weights
    units: pd.DataFrame
    trial: Trial

    def apply(self, model: nn.Module) -> None:
        """Writes the weights into `model`; removed weights are exactly zero."""
        _write(model, self.weights)


def prune(
    model: nn.Module,
    calibration: Tensor | np.ndarray[Any, Any],
    *,
    criterion: str,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    comparison_group: str | None = None,
    seed: int = 0,
) -> Pruned:
    """Computes masks for every linear of the decoder blocks of `model`, which is left untouched.

    calibration: token ids, integers (S, T), on which the dense model's activations are taken
    The other arguments are the fields of a search space. Raises UsageError for what they do not allow.
    """
    fields: dict[str, Any] = {"criterion": criterion, "sparsity": sparsity, "pattern": pattern, "seed": seed}
    if comparison_group is not None:
        fields["comparison_group"] = comparison_group
    trial = Trial(recovery="none", **fields)
    recipe = MaskRecipe.of(trial)
    with _blocks_of(model, calibration, keep_halves=False) as blocks:
        rows: list[dict[str, object]] = []
        for block in blocks.blocks.values():
            blocks.prune(TRIAL, recipe, block)
            rows += blocks.linear_rows(recipe, block)
        masks = {
            name: blocks.mask(recipe, block, linear)
            for block in blocks.blocks.values()
            for name, linear in block.linears.items()
        }
        return Pruned(masks, blocks.weights[TRIAL], pd.DataFrame(rows), trial)


def reconstruct(
    model: nn.Module,
    pruned: Pruned,
    calibration: Tensor | np.ndarray[Any, Any],
    *,
    granularity: str,
    learning_rate: float,
    **fields: Any,
) -> Recovered:
    """Reconstructs every unit of `model` under the masks of `pruned`; both are left untouched.

    calibration: token ids, integers (S, T);  fields: others of a search space, such as epochs or trainable
    Raises UsageError for what they do not allow, NumericalError when training diverges.
    """
    mask_fields = pruned.trial.model_dump(include={"criterion", "sparsity", "pattern", "comparison_group", "seed"})
    settings = {"seed": 0} | {name: value for name, value in mask_fields.items() if value is not None} | fields
    trial = Trial(recovery="reconstruct", granularity=granularity, learning_rate=learning_rate, **settings)
    with _blocks_of(model, calibration, keep_halves=granularity == "subblock") as blocks:
        blocks.given_masks = pruned.masks
        blocks.weights[TRIAL] = {name: tensor.clone() for name, tensor in pruned.weights.items()}
        results = [recover_unit(blocks, TRIAL, trial, name) for name in unit_names(blocks, granularity)]
        return Recovered(blocks.weights[TRIAL], pd.DataFrame([r.as_dict() for r in results]), trial)


@contextmanager
def _blocks_of(model: nn.Module, calibration: Tensor | np.ndarray[Any, Any], keep_halves: bool) -> Iterator[BlockRange]:
    """All blocks of `model` with the calibration set passed through them; the model is itself again afterwards."""
    ids_ST = torch.as_tensor(calibration)
    if ids_ST.dim() != 2 or ids_ST.is_floating_point() or 0 in ids_ST.shape:
        raise UsageError(
            f"calibration has shape {tuple(ids_ST.shape)} and type {ids_ST.dtype}",
            allowed="token ids: integers, samples x tokens, at least one of each",
        )
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        shard = ModelShard(model, 0, len(find_blocks(model)[1]), survey(model))
        blocks = BlockRange(shard)
        blocks.keep_halves = keep_halves
        for rows in batches(ids_ST.shape[0], ids_ST.shape[1], shard.device):
            blocks.dense_pass(CALIBRATION, ids_ST.shape[0], rows, shard.embed(ids_ST[rows]))
        yield blocks
    finally:
        model.train(training)
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _write(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)
