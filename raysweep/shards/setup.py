"""Brings a group to the point where trials can run: texts in place, dense activations and statistics taken once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape import ModelShape
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.reconstruction.placement import Placement
from raysweep.shards.activity import Activity
from raysweep.shards.group_info import GroupInfo, ShardGroup, ShardSpec, TextInfo
from raysweep.shards.peaks import Peaks
from raysweep.shards.plan import ShardPlan
from raysweep.shards.trace import Span

Ids = npt.NDArray[np.int64]
BATCHES_AHEAD = 4


class OwnedGroup(ShardGroup, Protocol):
    """A group in the hands of whoever started it."""

    name: str

    @property
    def shards(self) -> int: ...

    @property
    def replicas(self) -> Sequence[OwnedGroup]:
        """Groups with the same model that trials are spread over, this one first."""
        ...

    def forget_shared(self) -> None: ...

    def forget_trial(self, trial_id: str, order: int) -> None:
        """Cleans up after a trial whose process is gone: its claims and its weights, in whichever replica.

        order: the trial's own, so that this comes behind the calls of it that still wait
        """
        ...

    def portable(self, own_criteria: Mapping[str, Any]) -> dict[str, Any]:
        """Functions and paths as they reach the shards, also where modules cannot be imported."""
        ...

    def check(self) -> None:
        """Raises ShardLostError when a shard of any replica is gone."""
        ...

    def spans(self) -> list[list[Span]]:
        """By shard of all replicas, what it has done, where the specs ask for it."""
        ...

    def activities(self) -> list[Activity]:
        """By shard of all replicas, what it has done and does now. Any thread may ask. Raises ShardLostError."""
        ...

    def peaks(self) -> list[Peaks]:
        """By shard of all replicas, the most memory that it has held. Raises ShardLostError."""
        ...

    def close(self) -> None: ...


def shard_specs(plan: ShardPlan, source: ModelSource, traces: bool = False) -> list[ShardSpec]:
    """What every shard of the plan is to load. Its process works in another folder, so paths are absolute."""
    return [
        ShardSpec(
            model_path=source.portable_path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=plan.dtype,
            start=start,
            stop=stop,
            head=shard in plan.heads,
            device=plan.device,
            threads=plan.threads,
            knowledge_bytes=plan.knowledge_bytes,
            placement=plan.placement,
            compiles=plan.compiles,
            traces=traces,
        )
        for shard, (start, stop) in enumerate(plan.ranges)
    ]


def set_up(
    group: OwnedGroup,
    ranges: Sequence[tuple[int, int]],
    texts: Mapping[str, Ids],
    granularities: Sequence[str],
    model: ModelShape,
    own_criteria: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> GroupInfo:
    """Passes the kept texts through the dense model and tells the group what its trials need to know; in all replicas
    at once.

    texts: token ids (samples, tokens) by name: calibration, perhaps validation, and those of evaluation
    own_criteria: functions and paths of mask files that users bring along, by the text that names them
    placement: of the shards
    May be called again with another calibration set; weights are not read again.
    """
    groups, placement = group.replicas, placement or Placement()
    portable = group.portable(own_criteria or {})
    group.forget_shared()
    for one in groups:
        _all(one, "forget_texts", "subblock" in granularities, "matrix" in granularities)
        _all(one, "set_own_criteria", portable)
    infos: dict[str, TextInfo] = {}
    for name, ids_ST in texts.items():
        infos[name], *_ = [_set_text(one, name, ids_ST) for one in groups]
    kept = [infos[name] for name in (CALIBRATION, VALIDATION) if name in infos]
    if placement.by_block:
        for text in kept:
            _pass_blocks(groups, ranges, text)
    else:
        _dense_pass(groups, kept)
    group.info = replace(_describe(group, ranges, infos, granularities, model), together=placement.together)
    return group.info


def _all(group: ShardGroup, method: str, *arguments: Any) -> list[Any]:
    shards = group.shards  # type: ignore[attr-defined]
    refs = [
        group.submit(shard, 0, method, *arguments, label=method.replace("_", " ")) for shard in range(shards)
    ]
    return [group.result(ref) for ref in refs]


def _set_text(group: OwnedGroup, name: str, ids_ST: Ids) -> TextInfo:
    """Only the first shard embeds tokens and only the ends of the chain compare with them."""
    for shard in {0, group.shards - 1}:
        group.result(group.submit(shard, 0, "set_text", name, ids_ST))
    samples, tokens = ids_ST.shape
    batches = group.result(group.submit(0, 0, "text_batches", samples, tokens))
    return TextInfo(name, tuple(batches), tokens)


def _dense_pass(groups: Sequence[OwnedGroup], texts: Sequence[TextInfo]) -> None:
    """Batches of one text and then of the next follow one another through the chain of every group; hidden states go
    from shard to shard, not through here."""
    ahead: deque[tuple[OwnedGroup, Any]] = deque()
    for text in texts:
        # Sums are by text, so that only batches of one text wait for one another.
        before: list[list[Any]] = [[None] * group.shards for group in groups]
        for start, stop in text.batches:
            for group, last in zip(groups, before, strict=True):
                ref = None
                for shard in range(group.shards):
                    label = f"dense {text.name}[{start}:{stop}]"
                    arguments = (text.name, text.samples, start, stop, ref, last[shard])
                    ref = last[shard] = group.submit(shard, 0, "dense_pass", *arguments, label=label)
                ahead.append((group, ref))
            while len(ahead) > BATCHES_AHEAD * len(groups):
                _take(ahead)
    while ahead:
        _take(ahead)


def _pass_blocks(groups: Sequence[OwnedGroup], ranges: Sequence[tuple[int, int]], text: TextInfo) -> None:
    """The text as a whole through one block after another, so that each is in hand once."""
    for shard, (start, stop) in enumerate(ranges):
        ahead: deque[tuple[OwnedGroup, Any]] = deque()
        for first, last in text.batches:
            for group in groups:
                rows = (text.name, first, last)
                given = group.submit(shard - 1, 0, "leave_dense", *rows) if shard else None
                arguments = (text.name, text.samples, first, last, given)
                ahead.append((group, group.submit(shard, 0, "enter_dense", *arguments)))
            while len(ahead) > BATCHES_AHEAD * len(groups):
                _take(ahead)
        while ahead:
            _take(ahead)
        before: list[Any] = [None] * len(groups)
        for index in range(start, stop):
            for number, group in enumerate(groups):
                label = f"dense {text.name} block {index}"
                behind = (text.name, index, before[number])
                before[number] = group.submit(shard, 0, "pass_block", *behind, label=label)
                ahead.append((group, before[number]))
        while ahead:
            _take(ahead)


def _take(ahead: deque[tuple[OwnedGroup, Any]]) -> None:
    group, ref = ahead.popleft()
    group.result(ref)


def _describe(
    group: OwnedGroup,
    ranges: Sequence[tuple[int, int]],
    texts: Mapping[str, TextInfo],
    granularities: Sequence[str],
    model: ModelShape,
) -> GroupInfo:
    facts = _all(group, "describe", list(granularities))
    return GroupInfo(
        ranges=tuple(ranges),
        units={
            # a unit that reaches over several shards is named by each of them
            name: tuple(dict.fromkeys(unit for shard in facts for unit in shard["units"][name]))
            for name in granularities
        },
        texts=dict(texts),
        device_name=facts[0]["device_name"],
        versions=facts[0]["versions"],
        prunable={
            name: outputs * inputs for b in model.blocks for name, (outputs, inputs) in b.linears.items()
        },
        heads=tuple(shard for shard in reversed(range(group.shards)) if facts[shard]["has_head"]),
    )
