"""The Python calls `prune` and `reconstruct`, on an ordinary Hugging Face model in one process."""

# O outputs, I inputs of a linear; S samples, T tokens of a sample

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from raysweep.config.criterion import function_parts, is_mask_file
from raysweep.config.field_groups import MASK_FIELDS
from raysweep.config.trial import Trial
from raysweep.config.validation import validated
from raysweep.errors import UsageError
from raysweep.model.experts import tensor_of
from raysweep.model.shard import ModelShard
from raysweep.pruning.criteria import PrunedLayer
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.own import load_function
from raysweep.pruning.packed_mask import PackedMask
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.fitting import check_trial
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.range import BlockRange, Weights
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
    weights: by full parameter name, the pruned tensors as the model stores them; those of experts that it keeps in one
        tensor each by names of their own (experts.3.down_proj), and `apply` puts them in their place
    linears: one row per linear: realized sparsity, dead inputs, error of its output on the calibration set
    """

    masks: dict[str, Tensor] = field(repr=False)
    weights: Weights = field(repr=False)
    linears: pd.DataFrame = field(repr=False)
    trial: Trial

    def apply(self, model: nn.Module) -> None:
        """Writes the weights into `model`."""
        _write(model, self.weights)


@dataclass(frozen=True)
class Recovered:
    """Weights of a reconstructed model, by full parameter name, and one row per reconstruction unit."""

    weights: Weights = field(repr=False)
    units: pd.DataFrame = field(repr=False)
    trial: Trial

    def apply(self, model: nn.Module) -> None:
        """Writes the weights into `model`; removed weights are exactly zero."""
        _write(model, self.weights)


def prune(
    model: PreTrainedModel,
    calibration: TokenIds,
    *,
    criterion: str,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    **fields: Any,
) -> Pruned:
    """Computes masks for the linears of the decoder blocks of `model`, which is left untouched.

    calibration: token ids, integers (S, T), on which activations are taken
    fields: others of a search space, such as comparison_group, statistics_stream or dampening
    Raises UsageError for values that they do not take, and NumericalError when scores are not finite.
    """
    given = {
        "recovery": "none",
        "criterion": criterion,
        "sparsity": sparsity,
        "pattern": pattern,
        "seed": 0,
    } | fields
    trial = validated(Trial, given)
    recipe = MaskRecipe.of(trial)
    with _blocks_of(model, calibration, keep_halves=False) as (blocks, ids_ST):
        _check_fit(trial, blocks)
        if function_parts(criterion) is not None:
            blocks.pruner.own_criteria[criterion] = load_function(criterion)
        if is_mask_file(criterion):
            file = MaskFile.of(criterion)
            blocks.pruner.own_criteria[criterion] = file.path
            linears = {
                name: linear for block in blocks.blocks.values() for name, linear in block.linears.items()
            }
            file.check({name: one.stored_shape for name, one in linears.items()})
        blocks.begin(TRIAL)
        on_stream = recipe.stream == "pruned"
        if on_stream:
            _enter(blocks, ids_ST)
        rows: list[dict[str, object]] = []
        for block in blocks.blocks.values():
            if on_stream:
                blocks.prune_on_stream(TRIAL, TRIAL, recipe, block)
                blocks.advance_block(TRIAL, TRIAL, block)
            else:
                blocks.prune(TRIAL, recipe, block)
            rows += blocks.linear_rows(TRIAL, block)
        masks = {name: layer.mask_OI for name, layer in blocks.layers[TRIAL].items()}
        return Pruned(masks, blocks.weights[TRIAL], pd.DataFrame(rows), trial)


def reconstruct(
    model: PreTrainedModel,
    pruned: Pruned,
    calibration: TokenIds,
    *,
    granularity: str,
    **fields: Any,
) -> Recovered:
    """Reconstructs every unit of `model` under the masks of `pruned`; both are left untouched.

    calibration: token ids, integers (S, T)
    fields: others of a search space, such as learning_rate (required but for optimizer exact), epochs or trainable
    Raises UsageError for what they do not allow and for masks of another model, NumericalError when training
    diverges.
    """
    mask_fields = {name: getattr(pruned.trial, name) for name in (*MASK_FIELDS, "seed")}
    settings = {"recovery": "reconstruct", "granularity": granularity, "seed": 0}
    settings |= {name: _plain(value) for name, value in mask_fields.items() if value is not None} | fields
    trial = validated(Trial, settings)
    if trial.statistics_stream == "recovered":
        raise UsageError(
            "statistics_stream 'recovered' would make other masks than those that are given",
            where="statistics_stream",
            allowed="that of `pruned`",
        )
    with _blocks_of(model, calibration, keep_halves=granularity == "subblock") as (blocks, ids_ST):
        _check_same_linears(blocks, pruned.masks)
        _check_dense(blocks, pruned.masks)
        _check_fit(trial, blocks)
        blocks.begin(TRIAL)
        blocks.layers[TRIAL] = {
            name: PrunedLayer(PackedMask.of(mask_OI)) for name, mask_OI in pruned.masks.items()
        }
        blocks.weights[TRIAL] = {name: tensor.clone() for name, tensor in pruned.weights.items()}
        if trial.is_sequential:
            _enter(blocks, ids_ST)
        results = [recover_unit(blocks, TRIAL, trial, name) for name in unit_names(blocks, granularity)]
        units = [result.as_dict() for result in results if result is not None]
        return Recovered(blocks.weights[TRIAL], pd.DataFrame(units), trial)


def _plain(value: Any) -> Any:
    """As `validated` takes it: lists and mappings instead of tuples."""
    if not isinstance(value, tuple):
        return value
    return dict(value) if isinstance(value[0], tuple) else list(value)


def _enter(blocks: BlockRange, ids_ST: Tensor) -> None:
    """The calibration set at the door of the first block, as the trial's stream."""
    for rows in batches(ids_ST.shape[0], ids_ST.shape[1], blocks.device):
        blocks.enter_stream(TRIAL, CALIBRATION, ids_ST.shape[0], rows, blocks.shard.embed(ids_ST[rows]))


@contextmanager
def _blocks_of(
    model: PreTrainedModel, calibration: TokenIds, keep_halves: bool
) -> Iterator[tuple[BlockRange, Tensor]]:
    """All blocks of `model` after a pass of the calibration set, and its ids; the model is itself again afterwards."""
    ids_ST = _checked_ids(calibration, model.config.get_text_config().vocab_size)
    with _frozen(model):
        shard = ModelShard.whole(model)
        if shard.device.type == "cpu" and shard.dtype != torch.float32:
            warnings.warn(
                f"the model is {str(shard.dtype).removeprefix('torch.')} on a CPU, most of which are several times "
                "faster in float32: from_pretrained(..., dtype=torch.float32)",
                stacklevel=4,  # of the caller of `prune` or `reconstruct`, behind the context manager
            )
        blocks = BlockRange(shard)
        blocks.keep_halves = keep_halves
        for rows in batches(ids_ST.shape[0], ids_ST.shape[1], shard.device):
            blocks.dense_pass(CALIBRATION, ids_ST.shape[0], rows, shard.embed(ids_ST[rows]))
        yield blocks, ids_ST


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


def _check_dense(blocks: BlockRange, masks: Mapping[str, Tensor]) -> None:
    """The dense outputs are what units are reconstructed towards: a pruned model would be its own target."""
    linears = {name: linear for block in blocks.blocks.values() for name, linear in block.linears.items()}
    removed = {name: ~mask_OI for name, mask_OI in masks.items() if not bool(mask_OI.all())}
    if removed and not any(
        bool(linears[name].weight_OI[gone].count_nonzero()) for name, gone in removed.items()
    ):
        raise UsageError(
            "the model is pruned already: all weights that the masks remove are zero",
            where="model",
            allowed="the dense model, whose outputs are the targets",
            remedy="Load it again, and apply only what `reconstruct` returns.",
        )


def _check_fit(trial: Trial, blocks: BlockRange) -> None:
    linears = {name: linear for block in blocks.blocks.values() for name, linear in block.linears.items()}
    shapes = {name: (one.weight_OI.shape[0], one.weight_OI.shape[1]) for name, one in linears.items()}
    routed = frozenset[str]().union(*(block.routed for block in blocks.blocks.values()))
    check_trial(trial, shapes, len(blocks.blocks), routed)


def _check_same_linears(blocks: BlockRange, masks: dict[str, Tensor]) -> None:
    linears = {name: linear for block in blocks.blocks.values() for name, linear in block.linears.items()}
    shapes = {name: linear.weight_OI.shape for name, linear in linears.items()}
    if any(shapes.get(name) != mask_OI.shape for name, mask_OI in masks.items()):
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
            tensor_of(model, name).copy_(tensor)
