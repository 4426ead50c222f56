"""The Python calls `prune` and `reconstruct`, on an ordinary Hugging Face model in one process."""

# O outputs, I inputs of a linear; S samples, T tokens of a sample

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from raysweep.config.trial import MASK_FIELDS, Trial
from raysweep.config.validation import validated
from raysweep.errors import UsageError
from raysweep.model.shard import ModelShard
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.range import CALIBRATION, BlockRange, MaskRecipe, Weights
from raysweep.reconstruction.recovery import recover_unit, unit_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAL = "trial"  # the name under which the blocks hold the weights

TOKEN_IDS = "token ids: integers, samples x tokens, at least one of each"
TokenIds = Tensor | np.ndarray[Any, Any]


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
    model: PreTrainedModel,
    calibration: TokenIds,
    *,
    criterion: str,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    comparison_group: str | None = None,
    seed: int = 0,
) -> Pruned:
    """Computes masks for every linear of the decoder blocks of `model`, which is left untouched.

    calibration: token ids, integers (S, T), on which the dense model's activations are taken
    The other arguments are fields of a search space. Raises UsageError for values that they do not take, and
    NumericalError when scores are not finite.
    """
    fields = {"criterion": criterion, "sparsity": sparsity, "pattern": pattern, "seed": seed}
    if comparison_group is not None:
        fields["comparison_group"] = comparison_group
    trial = validated(Trial, {"recovery": "none"} | fields)
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
    model: PreTrainedModel,
    pruned: Pruned,
    calibration: TokenIds,
    *,
    granularity: str,
    learning_rate: float,
    **fields: Any,
) -> Recovered:
    """Reconstructs every unit of `model` under the masks of `pruned`; both are left untouched.

    calibration: token ids, integers (S, T);  fields: others of a search space, such as epochs or trainable
    Raises UsageError for what they do not allow and for masks of another model, NumericalError when training
    diverges.
    """
    mask_fields = {name: getattr(pruned.trial, name) for name in (*MASK_FIELDS, "seed")}
    settings = {
        "recovery": "reconstruct",
        "granularity": granularity,
        "learning_rate": learning_rate,
        "seed": 0,
    }
    settings |= {name: value for name, value in mask_fields.items() if value is not None} | fields
    trial = validated(Trial, settings)
    with _blocks_of(model, calibration, keep_halves=granularity == "subblock") as blocks:
        _check_same_linears(blocks, pruned.masks)
        blocks.given_masks = pruned.masks
        blocks.weights[TRIAL] = {name: tensor.clone() for name, tensor in pruned.weights.items()}
        units = [recover_unit(blocks, TRIAL, trial, name) for name in unit_names(blocks, granularity)]
        return Recovered(blocks.weights[TRIAL], pd.DataFrame([unit.as_dict() for unit in units]), trial)


@contextmanager
def _blocks_of(model: PreTrainedModel, calibration: TokenIds, keep_halves: bool) -> Iterator[BlockRange]:
    """All blocks of `model` after a pass of the calibration set; the model is itself again afterwards."""
    ids_ST = _checked_ids(calibration, model.config.get_text_config().vocab_size)
    with _frozen(model):
        shard = ModelShard.whole(model)
        blocks = BlockRange(shard)
        blocks.keep_halves = keep_halves
        for rows in batches(ids_ST.shape[0], ids_ST.shape[1], shard.device):
            blocks.dense_pass(CALIBRATION, ids_ST.shape[0], rows, shard.embed(ids_ST[rows]))
        yield blocks


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients within the context, as it was afterwards."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None  # the caller's gradients are put back, not added to
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, gradient in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _check_same_linears(blocks: BlockRange, masks: dict[str, Tensor]) -> None:
    linears = {name: linear for block in blocks.blocks.values() for name, linear in block.linears.items()}
    shapes = {name: linear.weight_OI.shape for name, linear in linears.items()}
    if {name: mask_OI.shape for name, mask_OI in masks.items()} != shapes:
        raise UsageError(
            "the masks are those of another model: names or shapes of its linears differ",
            remedy="Prune the model that is to be reconstructed.",
        )


def _checked_ids(calibration: TokenIds, vocabulary: int) -> Tensor:
    """Token ids as int64 (S, T). Raises UsageError for anything else."""
    try:
        ids_ST = torch.as_tensor(calibration)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"calibration is a {type(calibration).__name__}", allowed=TOKEN_IDS) from error
    whole = not (ids_ST.is_floating_point() or ids_ST.is_complex() or ids_ST.dtype == torch.bool)
    if ids_ST.dim() != 2 or not whole or 0 in ids_ST.shape:
        raise UsageError(
            f"calibration has shape {tuple(ids_ST.shape)} and type {ids_ST.dtype}",
            allowed=TOKEN_IDS,
        )
    ids_ST = ids_ST.long()
    lowest, highest = int(ids_ST.min()), int(ids_ST.max())
    if lowest < 0 or highest >= vocabulary:
        raise UsageError(
            f"calibration holds token {lowest if lowest < 0 else highest}",
            allowed=f"0 to {vocabulary - 1}, the tokens of the model",
        )
    return ids_ST


def _write(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)
