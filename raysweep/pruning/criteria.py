"""The criteria by name: the one place to add a rule that decides which weights go.

A criterion is a function of a layer (`LayerView`) and a recipe to a score tensor (O, I), higher is kept. Add it to
SCORES and to `raysweep.config.criterion.CRITERIA` (one that reads statistics also to CALIBRATED_CRITERIA there); a test
keeps them equal. SparseGPT is none of them, because it chooses while it updates, and neither are masks from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raysweep.config.criterion import function_parts
from raysweep.errors import RaysweepError
from raysweep.pruning.masks import pruning_mask
from raysweep.pruning.packed_mask import PackedMask
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.scores import magnitude_score, random_score, ria_score, wanda_score
from raysweep.pruning.sparsegpt import InverseFactor, sparsegpt
from raysweep.pruning.statistics import InputStatistics

OwnFunction = Callable[[Tensor, InputStatistics], Any]
"""A user's criterion: weight (O, I) and statistics of its inputs to scores (O, I), higher is kept."""


@dataclass(frozen=True)
class LayerView:
    """What a criterion may look at.

    weight_OI: as (outputs, inputs);  factor: makes or finds the factor of the inputs' Gram matrix for a dampening
    """

    name: str
    weight_OI: Tensor
    statistics: InputStatistics
    factor: Callable[[float], InverseFactor]


@dataclass(frozen=True)
class PrunedLayer:
    """mask: of what is kept;  weight_OI: updated, or None where the kept weights stay as they are

    dead_inputs: inputs that were never active in the statistics;  dampening, fallback: of the factorization, if any
    """

    mask: PackedMask
    weight_OI: Tensor | None = None
    dead_inputs: int | None = None
    dampening: float | None = None
    fallback: str | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> PrunedLayer:
        """The same with its tensors elsewhere."""
        weight_OI = None if self.weight_OI is None else move(self.weight_OI)
        return replace(self, mask=self.mask.moved(move), weight_OI=weight_OI)

    @property
    def mask_OI(self) -> Tensor:
        """bool, True = kept; where its bits lie."""
        return self.mask.on(self.mask.bits.device)

    def masked(self, dense_OI: Tensor) -> Tensor:
        """The weights (O, I) after pruning, in the dtype of the dense ones; removed ones are exactly zero.

        In storage of their own: trials train on them, and the layer is shared.
        """
        return (
            dense_OI * self.mask.on(dense_OI.device)
            if self.weight_OI is None
            else self.weight_OI.to(dense_OI.device, dense_OI.dtype, copy=True)
        )


Score = Callable[[LayerView, MaskRecipe], Tensor]

SCORES: dict[str, Score] = {
    "magnitude": lambda layer, _: magnitude_score(layer.weight_OI),
    "random": lambda layer, recipe: random_score(layer.weight_OI.shape, recipe.seed or 0, layer.name),
    "wanda": lambda layer, _: wanda_score(layer.weight_OI, layer.statistics.norm_I),
    "ria": lambda layer, recipe: ria_score(layer.weight_OI, layer.statistics.norm_I, recipe.ria_power or 0.0),
}


def prune_layer(
    recipe: MaskRecipe, layer: LayerView, own_criteria: Mapping[str, Any] | None = None
) -> PrunedLayer:
    """Prunes one layer on the layer's device. own_criteria: users' functions, by the text that names them.

    Raises NumericalError when a score is not finite or a Gram matrix cannot be factorized, UsageError when the rule
    does not fit the layer, RaysweepError when a user's function fails or returns no scores of the weight's shape.
    """
    dead_inputs, rule = layer.statistics.dead_inputs, recipe.rule(layer.name)
    if recipe.criterion == "sparsegpt":
        factor = layer.factor(recipe.dampening or 0.0)
        mask_OI, weight_OI = sparsegpt(
            layer.weight_OI, factor, rule, recipe.column_block or layer.weight_OI.shape[1]
        )
        weight_OI = weight_OI.to(layer.weight_OI.dtype)
        mask = PackedMask.of(mask_OI)
        return PrunedLayer(mask, weight_OI, dead_inputs, factor.dampening, factor.fallback)
    score_OI = _score(recipe, layer, own_criteria or {})
    mask = PackedMask.of(pruning_mask(score_OI.to(layer.weight_OI.device), rule))
    return PrunedLayer(mask, dead_inputs=dead_inputs)


def _score(recipe: MaskRecipe, layer: LayerView, own_criteria: Mapping[str, Any]) -> Tensor:
    if function_parts(recipe.criterion) is None:
        return SCORES[recipe.criterion](layer, recipe)
    try:
        score_OI = own_criteria[recipe.criterion](layer.weight_OI.clone(), layer.statistics)
    except Exception as error:  # the user's own code may raise anything
        raise RaysweepError(f"{recipe.criterion} failed: {type(error).__name__}: {error}") from error
    if not isinstance(score_OI, Tensor) or score_OI.shape != layer.weight_OI.shape:
        raise RaysweepError(
            f"{recipe.criterion} returned {_described(score_OI)}, not scores of shape {tuple(layer.weight_OI.shape)}"
        )
    return score_OI.detach().to(torch.float32)


def _described(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )
