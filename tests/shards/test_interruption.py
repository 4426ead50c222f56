"""What is in hand comes to its end after a first interruption, and nothing else begins; a second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from raysweep.launching.launch import launch
from raysweep.results.folders import unfinished_units
from raysweep.shards import unfinished, worker
from raysweep.shards.interruption import SIGNALS, finishing_first, not_waiting_longer
from raysweep.shards.priority import PriorityExecutor


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    """Python's own, which processes that run tests side by side have switched off."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    signal.signal(signal.SIGINT, outside)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interruption_comes_at_the_end():
    steps = []

    def work() -> None:
        with finishing_first():
            interrupt()
            steps.append("in hand")
        steps.append("next")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["in hand"]


def test_the_second_one_comes_at_once():
    steps = []

    def work() -> None:
        with finishing_first():
            interrupt()
            steps.append("in hand")
            interrupt()
            steps.append("too late")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["in hand"]


def test_an_interruption_is_not_lost_where_the_work_in_hand_fails():
    def work() -> None:
        with finishing_first():
            interrupt()
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_other_threads_work_as_ever():
    done = []

    def work() -> None:
        with finishing_first():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_waiting_ends_in_silence_by_an_interruption():
    with not_waiting_longer():
        interrupt()
        raise AssertionError("it went on")
    with not_waiting_longer():
        pass
    with pytest.raises(ZeroDivisionError), not_waiting_longer():
        raise ZeroDivisionError


def test_a_drained_queue_finishes_what_it_has_in_hand_and_refuses_the_rest():
    executor, begun, gate = PriorityExecutor(), threading.Event(), threading.Event()
    in_hand = executor.submit(0, lambda: (begun.set(), gate.wait(), "done")[-1])
    begun.wait()
    waiting = executor.submit(0, lambda: "never")
    threading.Timer(0.1, gate.set).start()
    start = time.monotonic()
    executor.drain(InterruptedError("the end"))
    assert time.monotonic() - start > 0.05
    assert in_hand.result(timeout=0) == "done"
    for refused in (waiting, executor.submit(0, lambda: "never")):
        with pytest.raises(InterruptedError, match="the end"):
            refused.result(timeout=5)


def test_an_idle_queue_is_drained_at_once():
    executor = PriorityExecutor()
    executor.submit(0, lambda: None).result(timeout=5)
    executor.drain(InterruptedError())


def test_the_unit_in_hand_is_kept(make_space, tmp_path, monkeypatch):
    """In process; over Ray tests/sweep/test_ray.py has it."""
    monkeypatch.setattr(unfinished, "WRITING_BYTES_S", float("inf"))
    for clock in ("perf_counter", "thread_time"):  # nothing is learned of what files cost
        monkeypatch.setattr(unfinished, clock, lambda: 0.0)
    recover, begun = worker.recover_unit, []

    def interrupted(blocks, name, trial, unit, *more):
        begun.append(unit)
        if len(begun) == 2:
            interrupt()
        return recover(blocks, name, trial, unit, *more)

    monkeypatch.setattr(worker, "recover_unit", interrupted)
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    space = make_space(sweep=[group | {"granularity": "block"}])
    with pytest.raises(KeyboardInterrupt):
        launch(space, storage=tmp_path, in_process=True)
    assert len(begun) == 2
    assert unfinished_units(tmp_path / "tiny") == 2
