"""Activations on their way through the chain with a trial's weights, and masks that are made behind them. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from raysweep.config.trial import Trial
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.shards.calls import CALLS_AHEAD, Calls
from raysweep.shards.group_info import Ref


class Stream:
    """Texts at the door of one shard, and later behind blocks of it. name: under which the shards know them."""

    def __init__(self, calls: Calls, name: str, texts: Iterable[str], shard: int = 0) -> None:
        self.calls, self.name, self.shard = calls, name, shard
        self.texts = [calls.info.texts[text] for text in texts]

    @classmethod
    def enter(cls, calls: Calls, name: str, texts: Iterable[str]) -> Stream:
        """A stream of texts that the first shard embeds."""
        stream = cls(calls, name, texts)
        stream._receive(0, lambda *_: None)
        return stream

    def fork(self, name: str) -> Stream:
        """A copy of its calibration set, to be sent ahead."""
        self.calls.ask(self.shard, "fork_stream", self.name, name)
        return Stream(self.calls, name, [CALIBRATION], self.shard)

    def reach(self, shard: int) -> None:
        """Goes on to a later shard, once it has passed all blocks of those before."""
        while self.shard < shard:
            here = self.shard

            def leave(text: str, start: int, stop: int, here: int = here) -> Ref:
                return self.calls.submit(here, "leave_stream", self.name, text, start, stop)

            self._receive(here + 1, leave)
            self.calls.ask(here, "drop_stream", self.name)
            self.shard = here + 1

    def prune(self, name: str, trial: Trial, start: int, stop: int) -> None:
        """Prunes the blocks `start` to `stop` under `name`, each on what comes out of the pruned ones before it."""
        for index in range(start, stop):
            self.reach(self.calls.info.shard_of(index))
            passes = index + 1 < stop
            arguments = (name, self.name, trial, index, passes)
            self.calls.ask(self.shard, "prune_on_stream", *arguments, label=f"prune {index}")

    def has_moved(self, shard: int) -> None:
        """Something else, a unit that reaches over several shards, has taken it to a later shard."""
        if shard != self.shard:
            self.calls.ask(self.shard, "drop_stream", self.name)
        self.shard = shard

    def drop(self) -> None:
        self.calls.ask(self.shard, "drop_stream", self.name)

    def _receive(self, shard: int, hidden_of: Callable[[str, int, int], Ref]) -> None:
        """Takes in all batches at a shard; `hidden_of(text, start, stop)` is what the shard before gave."""
        ahead: deque[list[Ref]] = deque()  # few, because the object store holds what is on its way
        for text in self.texts:
            for start, stop in text.batches:
                hidden = hidden_of(text.name, start, stop)
                arguments = (self.name, text.name, text.samples, start, stop, hidden)
                ahead.append([hidden, self.calls.submit(shard, "enter_stream", *arguments)])
                if len(ahead) > CALLS_AHEAD:
                    self.calls.done(ahead.popleft())
        while ahead:
            self.calls.done(ahead.popleft())


def kept_texts(calls: Calls) -> list[str]:
    """The texts on which errors are measured."""
    return [text for text in (CALIBRATION, VALIDATION) if text in calls.info.texts]
