"""Claims on shared results, and the queue that serves the oldest trial first."""

import threading
import time

import pytest

from raysweep.shards.priority import PriorityExecutor
from raysweep.shards.shared import SharedResults, share


def _share(table, key, owner, make):
    return share(key, owner, make, table.claim, table.publish, table.abandon)


def test_a_value_is_made_once_however_many_ask_at_once():
    table, made = SharedResults(), []

    def make():
        made.append(threading.get_ident())
        time.sleep(0.1)
        return "value"

    results = []
    threads = [
        threading.Thread(target=lambda k=k: results.append(_share(table, "key", f"trial-{k}", make)))
        for k in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["value"] * 6
    assert len(made) == 1


def test_arrivals_are_counted_once_each():
    table = SharedResults()
    assert [table.arrive(who) for who in ("a", "b", "a", "c")] == [1, 2, 2, 3]
    table.clear()
    assert table.arrive("a") == 1


def test_a_failure_passes_the_work_on_to_whoever_waits():
    table, begun = SharedResults(), threading.Event()

    def fail():
        begun.set()
        time.sleep(0.1)
        raise ValueError("first")

    failures = []

    def first():
        try:
            _share(table, "key", "first", fail)
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    assert _share(table, "key", "second", lambda: 2) == 2
    thread.join()
    assert len(failures) == 1


def test_waiting_calls_run_oldest_trial_first_and_in_order_of_arrival_within_a_trial():
    executor, begun, gate, order = PriorityExecutor(), threading.Event(), threading.Event(), []
    first = executor.submit(9, lambda: (begun.set(), gate.wait()))
    begun.wait()
    futures = [
        executor.submit(trial, lambda call=(trial, number): order.append(call))
        for number, trial in enumerate([5, 2, 7, 2, 5])
    ]
    gate.set()
    for future in (first, *futures):
        future.result(timeout=5)
    assert order == [(2, 1), (2, 3), (5, 0), (5, 4), (7, 2)]


def test_errors_reach_the_caller_and_do_not_stop_the_queue():
    executor = PriorityExecutor()
    failing = executor.submit(0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(timeout=5)
    assert executor.submit(0, lambda: "next").result(timeout=5) == "next"
