"""What is shared is made once, and its cost is charged once to every trial that uses it."""

import time

import pytest
import torch

from raysweep.reconstruction.knowledge import Knowledge

CPU = torch.device("cpu")


def busy(seconds: float) -> str:
    """Burns CPU time, which is what the stopwatch counts."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return "value"


def test_a_value_is_made_once():
    knowledge, made = Knowledge(CPU, 1 << 20), []
    for _ in range(3):
        assert knowledge.get("key", lambda: made.append(1) or "value") == "value"
    assert made == [1]
    assert knowledge.made == 1


def test_the_least_recently_used_go_first():
    knowledge = Knowledge(CPU, 100)
    for name in "ab":
        knowledge.get(name, lambda: torch.zeros(10))
    knowledge.get("a", lambda: torch.ones(10))
    knowledge.get("c", lambda: torch.zeros(10))
    assert knowledge.nbytes == 80
    assert knowledge.get("a", lambda: torch.ones(10)).sum() == 0  # still there
    assert knowledge.get("b", lambda: torch.ones(10)).sum() == 10  # made again


def test_a_trial_is_charged_once_for_what_others_made_and_never_for_what_it_made():
    knowledge = Knowledge(CPU, 1 << 20)
    with knowledge.charged_to("maker"):
        for _ in range(3):
            knowledge.get("key", lambda: busy(0.05))
    assert knowledge.saved_seconds == 0
    with knowledge.charged_to("user"):
        for _ in range(3):
            knowledge.get("key", lambda: busy(0.05))
    assert knowledge.saved_seconds == pytest.approx(0.05, rel=0.5)


def test_what_a_value_needed_is_charged_with_it_and_only_once():
    knowledge = Knowledge(CPU, 1 << 20)

    def outer() -> str:
        return knowledge.get("inner", lambda: busy(0.1)) + busy(0.02)

    with knowledge.charged_to("maker"):
        knowledge.get("outer", outer)
    with knowledge.charged_to("user"):
        knowledge.get("outer", outer)
        knowledge.get("inner", lambda: busy(0.1))
    assert knowledge.saved_seconds == pytest.approx(0.12, rel=0.3)


def test_clearing_forgets_values_and_bytes():
    knowledge = Knowledge(CPU, 1 << 20)
    knowledge.get("key", lambda: torch.zeros(10))
    knowledge.clear()
    assert knowledge.nbytes == 0
    assert knowledge.get("key", lambda: "new") == "new"
