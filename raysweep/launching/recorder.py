"""The state file of a sweep while it runs, and what the display hears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from raysweep.launching.prepared import Launch
from raysweep.launching.progress import Progress
from raysweep.launching.runners import Runner
from raysweep.results.state import ShardState, SweepState
from raysweep.shards.plan import ShardPlan


class Recorder:
    """Keeps the sweep's state file up to date while rows arrive, and tells the display."""

    def __init__(
        self, prepared: Launch, state: SweepState, progress: Progress, check: Callable[[], None]
    ) -> None:
        """check: raises StorageError where rows do not reach their storage

        is_incomplete: whether something beside trials has failed
        """
        self._folder, self.progress, self._check = prepared.folder, progress, check
        self.state = state.write(self._folder)
        self._begun, self._concurrent, self.is_incomplete = False, 0, False
        self._lock = threading.Lock()

    def begin(self, plan: ShardPlan) -> None:
        self._concurrent = plan.all_concurrent_trials
        with self._lock:
            self.state = replace(self.state, shards=plan.all_shards)
        if not self._begun:
            self._begun = True
            state = self.state
            self.progress.begin(state.planned, state.finished, state.failed, state.dashboard, state.others)

    def row(self, row: dict[str, Any]) -> None:
        failed = row.get("status") == "failed"
        finished, failures = self.state.finished + (not failed), self.state.failed + failed
        running = min(self._concurrent, self.state.planned - finished - failures)
        self._write(finished=finished, failed=failures, running=running)
        self.progress.row(row)
        self._check()

    def shards(self, activity: tuple[ShardState, ...]) -> None:
        """What they do now; may be told from another thread."""
        self._write(activity=activity)

    def end(self, state: str) -> None:
        self._write(state=state, running=0, activity=())
        self.progress.end()

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self.state = replace(self.state, **changes).write(self._folder)


@contextmanager
def recorded(
    prepared: Launch, runner: Runner, shards: int, progress: Progress, check: Callable[[], None]
) -> Iterator[Recorder]:
    """The state file says `running` within the context, and afterwards how it ended. check: as of `Recorder`"""
    state = SweepState(
        prepared.space.name,
        planned=prepared.planned,
        finished=prepared.finished,
        failed=prepared.failed,
        others=prepared.others,
        shards=shards,
        dashboard=runner.dashboard,
    )
    recorder = Recorder(prepared, state, progress, check)
    outcome = "failed"
    try:
        yield recorder
        outcome = "failed" if recorder.state.failed or recorder.is_incomplete else "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        recorder.end(outcome)
