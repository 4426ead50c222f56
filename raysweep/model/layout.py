"""Which stored tensors the tensors of a model are made of, and how: data that is read both ways.

Checkpoints spell names as older versions did, keep experts one by one or all in one tensor, or fuse what a model keeps
apart. So every tensor of the model is a list of parts of stored ones (`conversions.find_layout` finds them), and what
is read can be written back under the checkpoint's own names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
ROTARY = r"rotary_emb\.inv_freq$"  # angles, which models work out for themselves


@dataclass(frozen=True)
class Part:
    """A part of a stored tensor.

    stored: its name in the checkpoint
    index: which one of its first dimension, that then is gone; None for all of it
    rows: first and past the last of the first dimension that is left; None for all of them
    transposed: whether the model has the two dimensions that are left the other way round
    """

    stored: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, stored: Any) -> Any:
        """The part of a tensor, a view; of a slice of a file (safetensors), which is read no further than this."""
        key: list[Any] = [] if self.index is None else [self.index]
        if self.rows is not None:
            key.append(slice(*self.rows))
        part = stored[tuple(key)] if key else stored[...]
        return part.T if self.transposed else part

    def shape(self, stored: Shape) -> Shape:
        """Its shape, as the model has it, from that of the stored tensor; of no rows where it is not there."""
        shape = stored
        if self.index is not None:
            shape = stored[1:] if stored and self.index < stored[0] else (0, *stored[2:])
        if self.rows is not None and shape:
            stop = min(self.rows[1], shape[0])
            shape = (max(stop - self.rows[0], 0), *shape[1:])
        return shape[::-1] if self.transposed else shape


Layout = dict[str, tuple[Part, ...]]
"""For every tensor of a model, by its full name, the parts that it is made of, one below the other."""


@dataclass(frozen=True)
class Use:
    """Where a part of a stored tensor lies in the model: from row `first` of the tensor `own` on."""

    own: str
    first: int
    part: Part


def uses_of(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, list[Use]]:
    """The layout read the other way: by stored tensor, what of the model lies in it. shapes: of stored tensors."""
    uses: dict[str, list[Use]] = defaultdict(list)
    for own, parts in layout.items():
        first = 0
        for part in parts:
            uses[part.stored].append(Use(own, first, part))
            first += (part.shape(shapes[part.stored]) or (0,))[0]
    return dict(uses)


def write_back(uses: Iterable[Use], stored: Tensor, own: Mapping[str, Tensor]) -> None:
    """Puts the model's tensors into a stored one, in its dtype; what `own` lacks stays as it is.

    Of two that are tied both are put there; they are the same.
    """
    for use in uses:
        if use.own in own:
            place = use.part.of(stored)
            tensor = own[use.own]
            rows = tensor[use.first : use.first + place.shape[0]] if place.dim() else tensor
            place.copy_(rows)


def shape_of(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> Shape:
    """Of the parts one below the other, where they fit; else of the first one."""
    found = [part.shape(shapes[part.stored]) for part in parts]
    if len(found) == 1 or len({shape[1:] for shape in found}) > 1:
        return found[0]
    return (sum(shape[0] for shape in found), *found[0][1:])


def unused(layout: Layout, stored: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Stored tensors that the model does not use, but for those that its class says are no fault."""
    used = {part.stored for parts in layout.values() for part in parts}
    known = {ROTARY, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())}
    extra = (name for name in stored if name not in used)
    return sorted(name for name in extra if not any(re.search(pattern, name) for pattern in known))


def assembled(parts: Sequence[Tensor]) -> Tensor:
    """The parts one below the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
