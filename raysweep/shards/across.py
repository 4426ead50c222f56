"""Recovers a unit that reaches over several shards: no block moves, activations and gradients do. No torch."""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysweep.config.trial import Trial
from raysweep.errors import StorageError
from raysweep.reconstruction.measures import Cost, Errors, TextError, UnitResult
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import across_file
from raysweep.shards.calls import Calls
from raysweep.shards.group_info import Ref, TextInfo, UnitSpan
from raysweep.shards.streams import kept_texts

STEPS_AHEAD = (
    4  # that are asked for before the first of them is done, so that no shard waits for the trial's process
)


def recover_across(
    calls: Calls, trial: Trial, unit: UnitSpan, unfinished: Path | None = None
) -> dict[str, Any] | None:
    """The row of the unit, None where nothing in it is pruned. The trial's weights are pruned; a stream of its name, if
    it has one, is at the unit's door and leaves behind it.

    unfinished: as in `ShardWorker.recover`
    Raises NumericalError when the weights or the errors of the unit are not finite.
    """
    shards, row = calls.info.shards_of(unit), None
    if any(calls.everywhere("open_part", calls.name, trial, unit.name, shards=shards)):
        if unfinished is not None:
            row = _taken_over(calls, unit, shards, unfinished)
        row = row or _recovered(calls, trial, unit, shards, unfinished)
    if trial.is_sequential:
        for _ in calls.along(_kept(calls), "pass_stream", calls.name, shards=shards):
            pass  # it waits in the last shard
    calls.everywhere("close_part", calls.name, shards=shards)
    return row


def _taken_over(calls: Calls, unit: UnitSpan, shards: range, folder: Path) -> dict[str, Any] | None:
    """The row of a unit that was recovered before, whose weights become the trial's; its seconds count again."""
    found = calls.everywhere("find_part", calls.name, unit.name, folder, shards=shards)
    if None in found:
        return None
    row: dict[str, Any] = found[0]["row"]
    seconds = (row["seconds"] / len(shards), found[0]["standalone"] / len(shards))
    calls.everywhere("take_part", calls.name, *seconds, shards=shards)
    return row


def _recovered(
    calls: Calls, trial: Trial, unit: UnitSpan, shards: range, unfinished: Path | None
) -> dict[str, Any]:
    row = UnitResult.of(unit.name, unit.start, *_trained(calls, trial, shards)).as_dict()
    seconds = calls.everywhere("part_seconds", calls.name, shards=shards)
    row |= {"seconds": sum(seconds), "peak_device_bytes": None}
    if unfinished is not None:
        _leave(calls, unit, shards, unfinished, {"row": row, "standalone": row["seconds"]})
    return row


def _leave(calls: Calls, unit: UnitSpan, shards: range, folder: Path, about: dict[str, Any]) -> None:
    """Keeps the unit: the file about it vouches for its parts, so it comes last. What is not kept is recovered anew."""
    file = across_file(folder, unit.name)
    with suppress(OSError, StorageError):
        file.unlink(missing_ok=True)  # it would vouch for parts of two attempts
        if all(calls.everywhere("leave_part", calls.name, unit.name, folder, shards=shards)):
            write_atomically(file, json.dumps(about).encode())


def _trained(calls: Calls, trial: Trial, shards: range) -> tuple[Errors, Errors, list[Cost]]:
    """Errors before and after the training of a unit, and what each of its parts took."""
    if trial.target_stream == "pruned":
        for _ in calls.along(_kept(calls), "pass_dense", calls.name, shards=shards):
            pass  # what comes out stays in the last shard
    before = _errors(calls, shards)
    steps = calls.everywhere("begin_training", calls.name, shards=shards)[0]
    _train(calls, shards, steps, clipped=trial.max_grad_norm is not None)
    costs: list[Cost] = calls.everywhere("end_training", calls.name, shards=shards)
    return before, _errors(calls, shards), costs


def _errors(calls: Calls, shards: range) -> Errors:
    errors = {text: TextError() for text in kept_texts(calls)}
    for text, error in calls.along(_kept(calls), "pass_recovered", calls.name, shards=shards):
        errors[text] += error
    return errors


def _kept(calls: Calls) -> list[TextInfo]:
    return [calls.info.texts[text] for text in kept_texts(calls)]


def _train(calls: Calls, shards: range, steps: int, clipped: bool) -> None:
    """Every step forward along the chain, back, and on. Calls overtake one another on their way to a shard, so each is
    handed the result of what must be over before it."""
    before: dict[int, Ref] = dict.fromkeys(shards)
    ahead: deque[list[Ref]] = deque()
    for number in range(steps):
        refs: list[Ref] = [None]
        for shard in shards:
            refs.append(calls.submit(shard, "step_forward", calls.name, number, before[shard], refs[-1]))
            before[shard] = refs[-1]
        for shard in reversed(shards[:-1]):
            refs.append(calls.submit(shard, "step_backward", calls.name, number, refs[-1]))
            before[shard] = refs[-1]
        if clipped:
            refs += [
                calls.submit(shard, "gradient_squares", calls.name, refs[len(shards) * 2 - 1])
                for shard in shards
            ]
            squares = refs[-len(shards) :]
            before = {
                shard: calls.submit(shard, "step_clipped", calls.name, number, *squares) for shard in shards
            }
            refs += before.values()
        ahead.append(refs[1:])
        if len(ahead) > STEPS_AHEAD:
            calls.done(ahead.popleft(), len(shards) if clipped else 1)
    while ahead:
        calls.done(ahead.popleft(), len(shards) if clipped else 1)
