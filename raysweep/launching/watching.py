"""Asks the shards of a launch every few seconds what they do, so that `raysweep status` can tell."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from raysweep.errors import StorageError, first_line
from raysweep.results.state import ShardState
from raysweep.shards.activity import Activity
from raysweep.shards.setup import OwnedGroup

ASK_EVERY_S = 5.0
WINDOW_S = 60.0  # that rates are taken over
LEAVE_S = 2.0  # for an answer that is on its way; one of a node that hangs is not waited for
log = logging.getLogger(__name__)

Shards = tuple[ShardState, ...]


@contextmanager
def watching(group: OwnedGroup, tell: Callable[[Shards], None]) -> Iterator[None]:
    """Tells the state of the group's shards within the context, and at its end that there are none."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(group, tell, ended), name="raysweep watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LEAVE_S)
        with suppress(StorageError):  # as below
            tell(())


def _watch(group: OwnedGroup, tell: Callable[[Shards], None], ended: threading.Event) -> None:
    rates = Rates()
    while not ended.wait(ASK_EVERY_S):
        try:
            activities = group.activities()
            if activities and not ended.is_set():
                tell(rates.after(time.monotonic(), activities))
        except Exception as error:  # a shard that is gone, a full disk: for those to tell who run trials
            log.debug("shards do not say what they do: %s", first_line(error))


class Rates:
    """What shards did in the last minute, from what they say that they have done since they were loaded."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Sequence[Activity]]] = deque()

    def after(self, moment: float, activities: Sequence[Activity]) -> Shards:
        """moment: of `activities`, in seconds of any clock. The first one says nothing of rates yet."""
        while self._seen and self._seen[0][0] < moment - WINDOW_S:
            self._seen.popleft()
        self._seen.append((moment, activities))
        since, before = self._seen[0]
        seconds = moment - since
        return tuple(self._state(now, then, seconds) for now, then in zip(activities, before, strict=True))

    def _state(self, now: Activity, then: Activity, seconds: float) -> ShardState:
        state = ShardState(units=now.counts.units, stored_bytes=now.stored_bytes, doing=now.doing)
        if seconds <= 0:
            return state
        return replace(
            state,
            busy=min(1.0, (now.busy_seconds - then.busy_seconds) / seconds),
            units_per_second=(now.counts.units - then.counts.units) / seconds,
            trained_tokens_per_second=(now.counts.trained_tokens - then.counts.trained_tokens) / seconds,
            evaluated_tokens_per_second=(now.counts.evaluated_tokens - then.counts.evaluated_tokens)
            / seconds,
        )
