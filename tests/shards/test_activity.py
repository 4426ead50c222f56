"""A shard's account of what it does can be read at any time."""

import time

import pytest

from raysweep.shards.activity import Account, Activity
from raysweep.shards.counts import Counts


def test_the_call_in_hand_counts_and_is_named():
    account, counts = Account(), Counts(units=2)
    assert account.read(counts, 5) == Activity(Counts(units=2), 0.0, 5, "")
    with account.call("one: recover 0.mlp"):
        time.sleep(0.02)
        in_hand = account.read(counts, 5)
    over = account.read(counts, 5)
    assert (in_hand.doing, over.doing) == ("one: recover 0.mlp", "")
    assert 0.02 <= in_hand.busy_seconds <= over.busy_seconds
    assert account.read(counts, 5) == over


def test_a_call_that_raises_is_over():
    account = Account()
    with pytest.raises(RuntimeError), account.call("x"):
        raise RuntimeError
    assert account.read(Counts(), 0).doing == ""


def test_what_was_read_does_not_change_with_the_counts():
    account, counts = Account(), Counts(units=2)
    read = account.read(counts, 0)
    counts.units = 3
    assert read.counts.units == 2
