"""Batches of an evaluation that are measured already: lines of a file, so that none is lost with a process."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raysweep.errors import first_line
from raysweep.fingerprint import ID_LENGTH
from raysweep.reconstruction.measures import BatchMeasures
from raysweep.shards.group_info import TextInfo

Place = tuple[str, int, int]
"""Text, and its samples from where to where."""

log = logging.getLogger(__name__)


class MeasuredBatches:
    """What is known of the batches of one evaluation: those that earlier launches have measured, and those of this one.

    A line takes a tenth of a millisecond on a local disk, so that every batch is kept as soon as it is there.
    """

    def __init__(self, file: Path | None) -> None:
        """file: where they are kept; nowhere with None"""
        self._file = file
        self._known = {} if file is None else _read(file)

    @classmethod
    def of(cls, folder: Path | None, what: str, weights: Any = None) -> MeasuredBatches:
        """The file of the evaluation `what` in a folder that holds what is unfinished.

        weights: what JSON can hold and tells the evaluated weights from those that another attempt, on another device
        say, would have come to
        """
        if folder is None:
            return cls(None)
        digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        return cls(folder / f"{what}-{digest[:ID_LENGTH]}.jsonl")

    def missing(self, text: TextInfo, together: int = 1) -> TextInfo:
        """The text with those of its batches that are not known; up to `together` that follow one another as one."""
        unknown: list[tuple[int, int]] = []
        joined = together
        for start, stop in text.batches:
            if (text.name, start, stop) in self._known:
                continue
            if joined < together and unknown[-1][1] == start:
                unknown[-1], joined = (unknown[-1][0], stop), joined + 1
            else:
                unknown.append((start, stop))
                joined = 1
        return replace(text, batches=tuple(unknown))

    def of_text(self, text: TextInfo) -> list[BatchMeasures]:
        """The batches of a text, of which none is missing, in order."""
        return [self._known[(text.name, *place)] for place in text.batches]

    def add(self, measured: BatchMeasures, text: TextInfo) -> None:
        """Takes in what was measured of one batch of the text, or of several that `missing` has joined."""
        for batch in measured.parts(text.batches):
            self._known[batch.place] = batch
            if self._file is not None:
                _append(self._file, json.dumps(asdict(batch)))


def _append(file: Path, line: str) -> None:
    """Writes a line at once. What cannot be written is measured again, should it come to that."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab", buffering=0) as stream:
            stream.write(f"\n{line}\n".encode())  # the last line may be half a one
    except OSError as error:
        log.warning("%s is not kept for a later launch: %s", file.name, first_line(error))


def _read(file: Path) -> dict[Place, BatchMeasures]:
    """Past what a crash of the machine may have left of a line."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            stored = json.loads(line)
            errors = {int(index): sums for index, sums in stored.pop("errors").items()}
            batch = BatchMeasures(**stored, errors=errors)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        found[batch.place] = batch
    return found
