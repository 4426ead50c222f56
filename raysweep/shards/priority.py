"""One thread that does waiting work oldest trial first, whatever the order in which it arrived."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class PriorityExecutor:
    """Runs calls one at a time; of those that wait, the one with the lowest order, then the first that came.

    All calls run in one thread, so that thread-local state of numeric libraries is set up once.
    """

    def __init__(self, name: str = "compute") -> None:
        self._waiting: list[tuple[int, int, Callable[[], Any], Future[Any]]] = []
        self._arrivals = itertools.count()
        self._is_working = False
        self._refusal: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, order: int, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._refusal is not None:
                future.set_exception(self._refusal)
                return future
            heapq.heappush(self._waiting, (order, next(self._arrivals), call, future))
            self._changed.notify_all()
        return future

    def drain(self, refusal: Exception) -> None:
        """Returns once the call in hand is over. Those that wait, and those that still come, raise `refusal`."""
        with self._changed:
            self._refusal = refusal
            for *_, future in self._waiting:
                future.set_exception(refusal)
            self._waiting.clear()
            while self._is_working:
                self._changed.wait()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                _, _, call, future = heapq.heappop(self._waiting)
                self._is_working = True
            _run(call, future)
            with self._changed:
                self._is_working = False
                self._changed.notify_all()


def _run(call: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # handed on to whoever waits for the future
        future.set_exception(error)
