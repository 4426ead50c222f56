"""The calls of one trial to the shards of a group: interleaved, or batch by batch along the chain. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from raysweep.shards.group_info import GroupInfo, Ref, ShardGroup, TextInfo

CALLS_AHEAD = (
    2  # calls of one trial that wait at every shard: enough to keep it busy, few enough to interleave
)

Call = tuple[str, tuple[Any, ...], str]
"""Method, arguments and label."""

Stop = tuple[int, str, tuple[Any, ...]]
"""Of a batch on its way: shard, method, and arguments that come first."""


class Calls:
    """Knows which of its calls nobody has heard of yet, so that it can wait for them before it cleans up.

    name: of the trial, unlike that of any other in flight;  order: lower goes first at every shard
    label: of the trial for people, who see it in Ray's dashboard and in `raysweep status`
    """

    def __init__(self, group: ShardGroup, name: str, order: int, label: str) -> None:
        self.group, self.name, self.order, self.label = group, name, order, label
        self.info: GroupInfo = group.info
        self._open: set[Ref] = set()

    def submit(self, shard: int, method: str, *arguments: Any, label: str = "") -> Ref:
        label = f"{self.label}: {label or method.replace('_', ' ')}"
        ref = self.group.submit(shard, self.order, method, *arguments, label=label)
        self._open.add(ref)
        return ref

    def result(self, ref: Ref) -> Any:
        """Waits for a result. Raises what the call raised."""
        result = self.group.result(ref)
        self._open.discard(ref)
        return result

    def ask(self, shard: int, method: str, *arguments: Any, label: str = "") -> Any:
        """Calls and waits."""
        return self.result(self.submit(shard, method, *arguments, label=label))

    def everywhere(self, method: str, *arguments: Any, shards: Iterable[int] | None = None) -> list[Any]:
        """Calls all shards, or those of `shards`, at once, and waits."""
        chosen = range(self.info.shards) if shards is None else shards
        return [self.result(ref) for ref in [self.submit(shard, method, *arguments) for shard in chosen]]

    def interleaved(self, calls: Sequence[Sequence[Call]]) -> list[Any]:
        """Makes every shard's calls, in order at each, at all shards at once; results by shard and call."""
        waiting = [deque(enumerate(shard_calls)) for shard_calls in calls]
        results: dict[tuple[int, int], Any] = {}
        ahead: deque[tuple[int, int, Ref]] = deque()

        def send(shard: int) -> None:
            if waiting[shard]:
                number, (method, arguments, label) = waiting[shard].popleft()
                ahead.append((shard, number, self.submit(shard, method, *arguments, label=label)))

        for _ in range(CALLS_AHEAD):
            for shard in range(len(calls)):
                send(shard)
        while ahead:
            position = self.group.first_done([ref for _, _, ref in ahead])
            shard, number, ref = ahead[position]
            del ahead[position]
            results[shard, number] = self.result(ref)
            send(shard)
        return [results[place] for place in sorted(results)]

    def along(
        self,
        texts: Iterable[TextInfo],
        method: str,
        *lead: Any,
        shards: range | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Passes texts through shards that follow one another, with the same method of each; yields like `routed`."""
        route = [(shard, method, lead) for shard in (range(self.info.shards) if shards is None else shards)]
        return self.routed(texts, lambda text: route)

    def routed(
        self, texts: Iterable[TextInfo], route: Callable[[TextInfo], Sequence[Stop]]
    ) -> Iterator[tuple[str, Any]]:
        """Sends every batch on the way that `route` tells when its turn comes; yields what the last stop says, batch by
        batch, each with the name of its text.

        Each call is `method(*lead, text, start, stop, hidden)`, with what the stop before gave. Several batches are on
        their way at once, so that every shard works on another one; what is there is yielded before more is asked for.
        """
        at_once = CALLS_AHEAD if self.info.together == 1 else 1  # what is on its way takes room, and lasts
        ahead: deque[tuple[str, Ref]] = deque()
        for text in texts:
            for start, stop in text.batches:
                refs: list[Ref] = [None]
                for shard, method, lead in route(text):
                    arguments = (*lead, text.name, start, stop, refs[-1])
                    label = f"{method.replace('_', ' ')} {text.name}[{start}:{stop}]"
                    refs.append(self.submit(shard, method, *arguments, label=label))
                self._open.difference_update(
                    refs[1:-1]
                )  # are over with the last, and hidden states need room
                ahead.append((text.name, refs[-1]))
                while ahead and (len(ahead) > at_once * (len(refs) - 1) or self.group.is_there(ahead[0][1])):
                    yield self._taken(*ahead.popleft())
        while ahead:
            yield self._taken(*ahead.popleft())

    def done(self, refs: list[Ref], last: int = 1) -> None:
        """Waits for the `last` of `refs`, which come after all the others. Raises what any of them raised."""
        for ref in refs[-last:]:
            self.result(ref)
        self._open.difference_update(refs)

    def settle(self) -> None:
        """Waits for all calls that could still bring something, whatever becomes of them."""
        self.group.settle(list(self._open))
        self._open.clear()

    def release(self, name: str) -> None:
        """Forgets all that lies under `name` in the shards, after every call that could still bring some."""
        self.settle()
        for shard in range(self.info.shards):
            self.submit(shard, "release", name)
        self.settle()

    def _taken(self, text: str, ref: Ref) -> tuple[str, Any]:
        result = self.result(ref)
        self._open.discard(ref)
        return text, result
