"""Criteria that users bring along, read and checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.config.criterion import function_parts, is_mask_file
from raysweep.config.trial import Trial
from raysweep.model.shape import ModelShape
from raysweep.pruning.mask_file import MaskFile
from raysweep.pruning.own import function_hash, load_function

if TYPE_CHECKING:
    from raysweep.pruning.criteria import OwnFunction


@dataclass(frozen=True)
class OwnCriterion:
    """A criterion that a user brings along. content_hash: what stands for it in identities

    source: a function, or a file of masks
    """

    content_hash: str
    source: OwnFunction | MaskFile

    @property
    def for_shards(self) -> OwnFunction | Path:
        """What shards need of it: the function, or where the file is."""
        return self.source.path if isinstance(self.source, MaskFile) else self.source

    def check(self, model: ModelShape) -> None:
        """Refuses a file that does not fit the model."""
        if isinstance(self.source, MaskFile):
            self.source.check(model.stored_shapes)


def own_criteria(trials: Iterable[Trial]) -> dict[str, OwnCriterion]:
    """The users' own criteria among those of the trials, by the text that names them. Raises UsageError."""
    named = dict.fromkeys(trial.criterion for trial in trials if trial.criterion is not None)
    found: dict[str, OwnCriterion] = {}
    for text in named:
        if is_mask_file(text):
            file = MaskFile.of(text)
            found[text] = OwnCriterion(f"file:{file.content_hash}", file)
        elif function_parts(text) is not None:
            found[text] = OwnCriterion(f"function:{function_hash(text)}", load_function(text))
    return found
