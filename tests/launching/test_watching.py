"""What shards do is told every few seconds, in rates of the last minute."""

import threading
import time

import pytest

from raysweep.errors import ShardLostError
from raysweep.launching import watching as module
from raysweep.launching.launch import launch
from raysweep.launching.progress import Silent
from raysweep.launching.watching import Rates, watching
from raysweep.results.state import ShardState, SweepState
from raysweep.shards.activity import Activity
from raysweep.shards.counts import Counts


def test_rates_are_those_of_the_last_minute():
    rates = Rates()
    moments = {  # seconds: units, trained tokens, evaluated tokens, busy seconds
        100: (5, 1_000, 0, 50.0),
        130: (8, 4_000, 300, 80.0),
        160: (11, 7_000, 600, 95.0),
        190: (12, 7_000, 900, 95.0),
    }
    states = {}
    for moment, (units, trained, evaluated, busy) in moments.items():
        doing = "wanda 0.5: forward x[0:1]" if moment < 190 else ""
        (states[moment],) = rates.after(moment, [Activity(Counts(units, trained, evaluated), busy, 9, doing)])
    assert states[100] == ShardState(5, 9, "wanda 0.5: forward x[0:1]")
    assert states[130] == ShardState(8, 9, "wanda 0.5: forward x[0:1]", 1.0, 0.1, 100.0, 10.0)
    assert states[160] == ShardState(11, 9, "wanda 0.5: forward x[0:1]", 0.75, 0.1, 100.0, 10.0)
    assert states[190] == ShardState(12, 9, "", 0.25, pytest.approx(4 / 60), 50.0, 10.0)


class _Group:
    """Says what it has done, except when it is asked for the third time."""

    def __init__(self):
        self.asked = 0

    def activities(self):
        self.asked += 1
        if self.asked == 3:
            raise ShardLostError("gone")
        return [Activity(Counts(units=self.asked), float(self.asked), 0, "load")]


def test_shards_are_asked_until_the_end_and_what_fails_costs_one_answer(monkeypatch):
    monkeypatch.setattr(module, "ASK_EVERY_S", 0.01)
    group, units, enough = _Group(), [], threading.Event()

    def tell(states):
        units.append(states[0].units if states else None)
        if len(units) == 2:
            raise OSError("no space left")
        if len(units) == 4:
            enough.set()

    with watching(group, tell):
        assert enough.wait(30)
    asked = group.asked
    assert units[:4] == [1, 2, 4, 5]
    assert units[-1] is None, "what was told last is that there are no shards"
    assert not any(thread.name == "raysweep watch" for thread in threading.enumerate())
    time.sleep(0.1)
    assert group.asked == asked


def test_the_state_of_a_launch_tells_what_its_shards_do(make_space, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ASK_EVERY_S", 0.005)
    told, labels = [], set()

    class Looking(Silent):
        def row(self, row):
            told.append(SweepState.read(tmp_path / "tiny").activity)
            labels.add(row["label"])

    launch(make_space(), storage=tmp_path, in_process=True, progress=Looking())
    seen = [state for states in told for state in states]
    assert seen[-1].units > 0
    assert seen[-1].stored_bytes > 0
    assert {state.doing.rpartition(": ")[0] for state in seen if ": " in state.doing} <= labels
    assert any(state.busy for state in seen)
    assert SweepState.read(tmp_path / "tiny").activity == ()
