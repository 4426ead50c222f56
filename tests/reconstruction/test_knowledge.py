"""What is shared is made once, forgotten by size, and charged once to every trial that uses it."""

from __future__ import annotations

import time

import pytest
import torch

from raysweep.reconstruction import knowledge as module
from raysweep.reconstruction.knowledge import Knowledge, Stopwatch

CPU = torch.device("cpu")


def kilobyte() -> torch.Tensor:
    return torch.zeros(1024, dtype=torch.uint8)


class Clock:
    """Stands in for a stopwatch: time passes only when it is told to."""

    now = 0.0

    def __init__(self, _device: torch.device) -> None:
        self.start = Clock.now

    def seconds(self) -> float:
        return Clock.now - self.start


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "Stopwatch", Clock)
    Clock.now = 0.0
    return Clock


def test_a_value_is_made_once():
    known = Knowledge(CPU, limit_bytes=1 << 20)
    made: list[str] = []

    def value(name: str) -> str:
        return known.get(name, lambda: made.append(name) or name.upper())

    assert [value("a"), value("b"), value("a"), value("a")] == ["A", "B", "A", "A"]
    assert made == ["a", "b"]
    assert known.made == 2


def test_what_must_be_kept_counts_and_never_goes():
    known = Knowledge(CPU, limit_bytes=2 * 1024)
    known.keep("kept", kilobyte())
    known.keep("kept", kilobyte())
    for key in "ab":
        known.get(key, kilobyte)
    assert (known.made, known.nbytes) == (2, 2 * 1024)
    known.get("kept", kilobyte)
    known.get("a", kilobyte)  # it had to go
    assert known.made == 3


def test_the_least_recently_used_goes_first():
    known = Knowledge(CPU, limit_bytes=3 * 1024)
    for key in "abc":
        known.get(key, kilobyte)
    known.get("a", kilobyte)
    known.get("d", kilobyte)  # b goes
    assert (known.made, known.nbytes) == (4, 3 * 1024)
    for key in "acd":
        known.get(key, kilobyte)
    assert known.made == 4
    known.get("b", kilobyte)
    assert known.made == 5


def test_a_value_above_the_limit_is_kept_alone():
    known = Knowledge(CPU, limit_bytes=10)
    known.get("small", lambda: torch.zeros(8, dtype=torch.uint8))
    known.get("large", kilobyte)
    assert known.nbytes == 1024
    known.get("large", kilobyte)
    assert known.made == 2


def test_bytes_of_nested_tensors_count():
    known = Knowledge(CPU, limit_bytes=1 << 20)
    known.get("nested", lambda: {"a": kilobyte(), "b": [kilobyte(), (kilobyte(), 3.0)], "c": "text"})
    assert known.nbytes == 3 * 1024


def test_what_fails_is_not_kept():
    known = Knowledge(CPU, limit_bytes=1 << 20)
    with pytest.raises(ZeroDivisionError):
        known.get("a", lambda: 1 / 0)
    assert known.get("a", lambda: 2) == 2


def slow(clock, seconds: float, value: str = "value"):
    def make() -> str:
        clock.now += seconds
        return value

    return make


def test_a_trial_is_charged_once_for_what_others_made_and_never_for_what_it_made(clock):
    known = Knowledge(CPU, limit_bytes=1 << 20)
    with known.charged_to("maker"):
        for _ in range(3):
            known.get("key", slow(clock, 5))
    assert known.saved_seconds == 0
    for number, user in enumerate(["first", "second"], start=1):
        with known.charged_to(user):
            for _ in range(3):
                known.get("key", slow(clock, 5))
        assert known.saved_seconds == 5 * number
    assert clock.now == 5


def test_an_account_goes_on_until_it_is_closed(clock):
    known = Knowledge(CPU, limit_bytes=1 << 20)
    known.get("key", slow(clock, 5))
    for _ in range(2):
        with known.charged_to("user"):
            known.get("key", slow(clock, 5))
    assert known.saved_seconds == 5
    known.close_account("user")
    with known.charged_to("user"):
        known.get("key", slow(clock, 5))
    assert known.saved_seconds == 10


def test_what_a_value_needed_is_charged_with_it_and_only_once(clock):
    known = Knowledge(CPU, limit_bytes=1 << 20)

    def outer() -> str:
        return known.get("inner", slow(clock, 10)) + slow(clock, 2)()

    with known.charged_to("maker"):
        known.get("outer", outer)
    with known.charged_to("user"):
        known.get("outer", outer)
        known.get("inner", slow(clock, 10))
    assert known.saved_seconds == 12
    with known.charged_to("user of a part"):
        known.get("inner", slow(clock, 10))
    assert known.saved_seconds == 12 + 10


def test_what_was_found_while_a_value_was_made_is_charged_too(clock):
    known = Knowledge(CPU, limit_bytes=1 << 20)
    with known.charged_to("first"):
        known.get("inner", slow(clock, 10))
    with known.charged_to("second"):
        known.get("outer", lambda: known.get("inner", slow(clock, 10)) + slow(clock, 2)())
    assert known.saved_seconds == 10
    with known.charged_to("third"):
        known.get("outer", slow(clock, 99))
    assert known.saved_seconds == 10 + 12


def test_after_clearing_values_are_made_anew():
    known = Knowledge(CPU, limit_bytes=1 << 20)
    known.get("a", kilobyte)
    known.clear()
    assert known.nbytes == 0
    known.get("a", kilobyte)
    assert known.made == 2


def test_a_stopwatch_on_a_cpu_counts_work_not_waiting():
    watch = Stopwatch(CPU)
    time.sleep(0.2)
    assert watch.seconds() < 0.1
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert watch.seconds() >= 0.1
