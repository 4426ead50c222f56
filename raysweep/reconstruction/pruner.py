"""What recipes do to the linears of a range of blocks, worked out once for all its trials."""

# O outputs of a linear

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from raysweep.config.criterion import is_mask_file, reads_statistics
from raysweep.errors import NumericalError, RaysweepError
from raysweep.model.linears import Linear
from raysweep.model.structure import Block
from raysweep.pruning.criteria import LayerView, OwnFunction, PrunedLayer, prune_layer
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.packed_mask import PackedMask
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.sparsegpt import InverseFactor, inverse_factor
from raysweep.pruning.statistics import InputStatistics, alike
from raysweep.reconstruction.dense_statistics import (
    FEWEST_TOKENS,
    DenseStatistics,
    Statistics,
    of_linear,
    starved,
)
from raysweep.reconstruction.knowledge import Knowledge
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.stores import Store


class LayerPruner:
    """own_criteria: functions and paths of mask files that users bring along, by the text that names them"""

    def __init__(self, knowledge: Knowledge, statistics: DenseStatistics, waiting: Store) -> None:
        """waiting: where masks and weights of trials wait"""
        self._knowledge, self._statistics, self._waiting = knowledge, statistics, waiting
        self.own_criteria: dict[str, OwnFunction | Path] = {}

    def layer(self, recipe: MaskRecipe, block: Block, linear: Linear) -> PrunedLayer | None:
        """What a recipe does to a linear; None where it leaves it dense. Worked out once for all trials.

        Raises NumericalError when scores are not finite or a Gram matrix cannot be factorized.
        """
        key = ("layer", recipe, linear.name)
        if is_mask_file(recipe.criterion):
            read = partial(self._of_file, self.own_criteria[recipe.criterion], linear)
            of_file: PrunedLayer | None = self._knowledge.get(key, read)
            return of_file
        if not recipe.prunes(linear.name):
            return None
        if recipe.stream == "pruned":
            return self._knowledge.get(key, _not_passed)

        def factor(dampening: float) -> InverseFactor:
            make = partial(self._factor_on_host, linear, block, dampening)
            found = self._knowledge.get(("factor", block.leader_of(linear.name), dampening), make)
            return found.to(self._waiting.device)

        def make() -> PrunedLayer:
            statistics = self._statistics.of(CALIBRATION, linear, block)
            return self._pruned(recipe, block, linear, statistics, factor).moved(self._waiting.put)

        return self._knowledge.get(key, make)

    def layers_on_stream(
        self, recipe: MaskRecipe, block: Block, statistics: Statistics
    ) -> Iterator[tuple[Linear, PrunedLayer]]:
        """The same of all linears of a block at once, by statistics of what the block takes in on a stream. Layers that
        depend on the recipe alone (stream `pruned`) are kept for other trials."""
        factors: dict[tuple[str, float], InverseFactor] = {}

        def factor(leader: str, dampening: float) -> InverseFactor:
            if (leader, dampening) not in factors:
                factors[leader, dampening] = inverse_factor(statistics[leader], dampening)
            return factors[leader, dampening]

        for linear in block.linears.values():
            if recipe.prunes(linear.name):
                own = of_linear(statistics, block, linear)
                by_leader = partial(factor, block.leader_of(linear.name))
                layer = self._pruned(recipe, block, linear, own, by_leader).moved(self._waiting.put)
                if recipe.stream == "pruned":
                    self._knowledge.keep(("layer", recipe, linear.name), layer)
                yield linear, layer

    def _of_file(self, path: OwnFunction | Path, linear: Linear) -> PrunedLayer | None:
        """Only this linear's tensors are read."""
        file = MaskFile(Path(str(path)))
        mask, weight = file.mask(linear.name), file.weight(linear.name)
        if mask is None:
            return None
        dense_OI = linear.weight_OI
        mask_OI = linear.from_stored(mask.to(dense_OI.device)).contiguous()
        if weight is None:
            return PrunedLayer(PackedMask.of(mask_OI)).moved(self._waiting.put)
        weight_OI = linear.from_stored(weight.to(dense_OI.device, dense_OI.dtype)) * mask_OI
        return PrunedLayer(PackedMask.of(mask_OI), weight_OI.contiguous()).moved(self._waiting.put)

    def _factor_on_host(self, linear: Linear, block: Block, dampening: float) -> InverseFactor:
        """Kept where memory is plenty: copying it costs little beside making it again."""
        return inverse_factor(self._statistics.of(CALIBRATION, linear, block), dampening).to("cpu")

    def _pruned(
        self,
        recipe: MaskRecipe,
        block: Block,
        linear: Linear,
        statistics: InputStatistics,
        factor: Callable[[float], InverseFactor],
    ) -> PrunedLayer:
        view = LayerView(linear.name, linear.weight_OI, statistics, factor)
        if starved(linear, block, statistics.rows) and reads_statistics(recipe.criterion):
            return self._pruned_blindly(recipe, view)
        return self._pruned_seeing(recipe, view)

    def _pruned_seeing(self, recipe: MaskRecipe, view: LayerView) -> PrunedLayer:
        try:
            return prune_layer(recipe, view, self.own_criteria)
        except NumericalError as error:
            raise NumericalError(f"{view.name}: {error}") from error

    def _pruned_blindly(self, recipe: MaskRecipe, view: LayerView) -> PrunedLayer:
        """As if all its inputs were alike; the row says so."""
        unknown = alike(view.weight_OI.shape[1], view.weight_OI.device)
        layer = self._pruned_seeing(
            recipe, replace(view, statistics=unknown, factor=partial(inverse_factor, unknown))
        )
        rows, dead = view.statistics.rows, view.statistics.dead_inputs
        said = f"inputs taken as alike: {rows} of {FEWEST_TOKENS} routed tokens"
        return replace(layer, dead_inputs=dead, dampening=None, fallback=said)


def _not_passed() -> PrunedLayer:
    raise RaysweepError("masks behind pruned blocks were asked for before the activations had passed by")
