"""The criteria by name: the one place to add a rule that decides which weights go.

A criterion is a function of a layer (`LayerView`) to a score tensor (O, I), higher is kept, and says what it
reads. Add it to CRITERIA and to the field `criterion` of `raysweep.config.trial.Trial` (one that reads
statistics also to CALIBRATED_CRITERIA there); a test keeps them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from raysweep.pruning.masks import MaskRule, pruning_mask
from raysweep.pruning.scores import magnitude_score, random_score, wanda_score
from raysweep.pruning.statistics import InputStatistics


@dataclass(frozen=True)
class LayerView:
    """What a criterion may look at: a layer's name, weight (O, I), input statistics and the trial's seed."""

    name: str
    weight_OI: Tensor
    statistics: InputStatistics
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """score: float32 (O, I), on any device;  needs_statistics, needs_seed: whether it reads these"""

    score: Callable[[LayerView], Tensor]
    needs_statistics: bool = False
    needs_seed: bool = False


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(lambda layer: magnitude_score(layer.weight_OI)),
    "random": Criterion(
        lambda layer: random_score(layer.weight_OI.shape, layer.seed, layer.name),
        needs_seed=True,
    ),
    "wanda": Criterion(
        lambda layer: wanda_score(layer.weight_OI, layer.statistics.norm_I), needs_statistics=True
    ),
}


def mask_of(criterion: str, layer: LayerView, rule: MaskRule) -> Tensor:
    """The mask (O, I), bool, True = kept, of one layer on the layer's device.

    Raises NumericalError when a score is not finite, UsageError when the rule does not fit the layer.
    """
    score_OI = CRITERIA[criterion].score(layer).to(layer.weight_OI.device)
    return pruning_mask(score_OI, rule)
