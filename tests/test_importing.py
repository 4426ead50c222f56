"""Imports without the collector: it is as before afterwards, and what they made is old."""

from __future__ import annotations

import gc

import pytest

from raysweep.importing import without_collecting


class Loop:
    """Can only be collected by the collector."""

    alive = 0

    def __init__(self) -> None:
        Loop.alive += 1
        self.own = self

    def __del__(self) -> None:
        Loop.alive -= 1


def is_in(generation: int, thing: object) -> bool:
    return any(other is thing for other in gc.get_objects(generation))


def test_what_is_made_within_is_old_and_can_still_be_collected() -> None:
    with without_collecting():
        assert not gc.isenabled()
        kept = [object]
        Loop()
        with without_collecting():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    assert is_in(2, kept)
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert Loop.alive == 0


def test_the_collector_is_on_again_after_an_error() -> None:
    with pytest.raises(ImportError), without_collecting():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_so() -> None:
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
