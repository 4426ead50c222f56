"""The layout of a model in a checkpoint, found by transformers' own tables of renamings and conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raysweep.errors import UsageError
from raysweep.model.experts import FusedPlace, fused_places
from raysweep.model.layout import Layout, Part, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_layout(model: PreTrainedModel, stored: Iterable[str], source: str) -> Layout:
    """The layout of `model`, whose experts are apart, in a checkpoint with the tensors `stored`.

    source: the model's path, for messages. Raises UsageError when a tensor is nowhere to be found, or is stored in a
    way that is not known here.
    """
    places = fused_places(model)
    state = dict(model.state_dict(keep_vars=True))
    fused = _Fused(model, state, places)
    found = fused.find(stored)
    tied: dict[str, str] = model.all_tied_weights_keys
    twins = tied | {source: target for target, source in tied.items()}
    layout: Layout = {}
    for name in state:
        parts = _parts_of(name, found, places) or _parts_of(twins.get(name, ""), found, places)
        if parts is None:
            raise _missing(name, places, source)
        layout[name] = parts
    return layout


def _missing(name: str, places: Mapping[str, FusedPlace], source: str) -> UsageError:
    place = places.get(name)
    what = f"{name!r}" if place is None else f"{place.name!r}, nor its experts one by one"
    return UsageError(
        f"model {source!r} has no tensor {what}",
        allowed="a checkpoint with every weight of its config.json",
        remedy="Save the model again with save_pretrained of an up-to-date transformers.",
    )


@dataclass(frozen=True)
class _Stack:
    """A tensor whose first dimension is that of experts: the parts of each."""

    experts: tuple[tuple[Part, ...], ...]


_Made = tuple[Part, ...] | _Stack


def _parts_of(
    name: str, found: Mapping[str, _Made], places: Mapping[str, FusedPlace]
) -> tuple[Part, ...] | None:
    place = places.get(name)
    made = found.get(name if place is None else place.name)
    if made is None or place is None:
        return made if isinstance(made, tuple) else None
    if isinstance(made, _Stack):
        if place.index >= len(made.experts):
            return None
        parts = made.experts[place.index]
    else:
        parts = tuple(replace(part, index=place.index) for part in made)
    if place.transposed and len(parts) > 1:  # they would lie side by side
        return None
    return tuple(replace(part, transposed=part.transposed != place.transposed) for part in parts)


class _Fused:
    """The model as transformers builds it, with the tables that say what its tensors are made of."""

    def __init__(
        self, model: PreTrainedModel, state: Mapping[str, Tensor], places: Mapping[str, FusedPlace]
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.prefix: str = model.base_model_prefix
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.shapes |= {place.name: () for place in places.values()}  # fused: theirs is never asked for

    def find(self, stored: Iterable[str]) -> dict[str, _Made]:
        """What every tensor is made of, as far as the checkpoint has it."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, _Made] = {}
        collected: dict[str, tuple[Any, dict[str, list[Part]]]] = {}
        for key in sorted(stored, key=dot_natural_key):  # as transformers: so experts are in order
            name, pattern = self._renamed(key)
            if name not in self.shapes:
                continue
            if pattern is None:
                found.setdefault(name, (Part(key),))
                continue
            _, parts = collected.setdefault(name, (self.by_pattern[pattern], {}))
            parts.setdefault(pattern, []).append(Part(key))
        for name, (rule, parts) in collected.items():
            for own, made in self._converted(name, rule, parts).items():
                found.setdefault(own, made)
        return found

    def _renamed(self, key: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.shapes)
        if name not in self.shapes and key in self.shapes:  # it has its own name already
            name, pattern = rename_source_key(key, [], [], self.prefix, self.shapes)
        return name, pattern

    def _converted(self, name: str, rule: Any, collected: dict[str, list[Part]]) -> dict[str, _Made]:
        """What a conversion of transformers' makes of its sources: by name, of all its targets; nothing where some of
        the sources are missing."""
        if len({len(collected.get(pattern, ())) for pattern in rule.source_patterns}) > 1:
            return {}
        made: dict[str, _Made | list[Part]] = {
            pattern: collected[pattern] for pattern in rule.source_patterns
        }
        targets = [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
        for operation in rule.operations:
            convert = OPERATIONS.get(type(operation).__name__)
            result = None if convert is None else convert(operation, made, targets, self.shapes)
            if result is None:
                key, kind = next(iter(collected.values()))[0].stored, type(operation).__name__
                raise UsageError(
                    f"{key!r} is stored in a way ({kind}) that cannot be read block by block",
                    allowed="weights that are stacked, joined or cut along their rows, or transposed",
                    remedy="Load the model with transformers, and save it with "
                    "save_pretrained(..., save_original_format=False).",
                )
            made = result
        final = [_alone(value) for value in made.values()]
        return dict(zip(targets, final, strict=False))


def _alone(value: _Made | list[Part]) -> _Made:
    return tuple(value) if isinstance(value, list) else value


_Values = dict[str, "_Made | list[Part]"]
_Operation = Callable[[Any, _Values, list[str], Mapping[str, Shape]], "_Values | None"]


def _stacked(
    operation: Any, made: _Values, _targets: list[str], _shapes: Mapping[str, Shape]
) -> _Values | None:
    """One tensor of each expert to one of all."""
    if operation.dim != 0 or not all(isinstance(parts, list) for parts in made.values()):
        return None
    return {key: _Stack(tuple((part,) for part in parts)) for key, parts in made.items()}  # type: ignore[union-attr]


def _joined(
    operation: Any, made: _Values, _targets: list[str], _shapes: Mapping[str, Shape]
) -> _Values | None:
    """Tensors below one another; of experts, each expert's."""
    values = [_alone(value) for value in made.values()]
    stacks = [value for value in values if isinstance(value, _Stack)]
    if not stacks and operation.dim == 0:
        plain = [value for value in values if isinstance(value, tuple)]
        return {next(iter(made)): tuple(part for parts in plain for part in parts)}
    if len(stacks) < len(values) or operation.dim != 1 or len({len(stack.experts) for stack in stacks}) > 1:
        return None
    pairs = zip(*(stack.experts for stack in stacks), strict=True)
    return {next(iter(made)): _Stack(tuple(tuple(p for parts in each for p in parts) for each in pairs))}


def _cut(operation: Any, made: _Values, targets: list[str], shapes: Mapping[str, Shape]) -> _Values | None:
    """One tensor to several, by their rows."""
    parts = _alone(next(iter(made.values())))
    if operation.dim != 0 or getattr(operation, "num_shards_attribute", None) is not None:
        return None
    if isinstance(parts, _Stack) or len(parts) > 1 or not all(shapes.get(target) for target in targets):
        return None
    cut: _Values = {}
    first = 0
    for target in targets:
        stop = first + shapes[target][0]
        cut[target] = (replace(parts[0], rows=(first, stop)),)
        first = stop
    return cut


def _turned(operation: Any, made: _Values, targets: list[str], shapes: Mapping[str, Shape]) -> _Values | None:
    """Rows and columns change places; of a fused tensor of experts, each expert's."""
    parts = _alone(next(iter(made.values())))
    if operation.check_dims or isinstance(parts, _Stack) or len(parts) > 1:
        return None
    of_experts = shapes.get(targets[0]) == ()
    if {operation.dim0, operation.dim1} != ({1, 2} if of_experts else {0, 1}):
        return None
    return {next(iter(made)): (replace(parts[0], transposed=not parts[0].transposed),)}


OPERATIONS: dict[str, _Operation] = {
    "MergeModulelist": _stacked,
    "Concatenate": _joined,
    "Chunk": _cut,
    "Split": _cut,
    "Transpose": _turned,
}
