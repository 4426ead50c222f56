"""Peaks of trials: of those that were alone with their worker, and of nobody else."""

from __future__ import annotations

import pandas as pd
import pytest

from raysweep.launching.launch import launch
from raysweep.shards.peaks import Peaks
from raysweep.shards.trial_peaks import TrialPeaks, trial_of


class Memory:
    """That stands at a number until it is looked at anew."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def hold(self, nbytes: int) -> None:
        self.held, self.most = nbytes, max(self.most, nbytes)

    def restart(self) -> None:
        self.most = self.held

    def read(self) -> Peaks:
        return Peaks(self.most)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def peaks(memory: Memory) -> TrialPeaks:
    return TrialPeaks(memory.restart, memory.read)


def test_a_name_belongs_to_the_trial_behind_the_last_at() -> None:
    assert trial_of("a") == trial_of("masks@a") == trial_of("ahead@pruned@a") == "a"


def test_each_trial_has_the_most_of_its_own_time(memory: Memory, peaks: TrialPeaks) -> None:
    memory.hold(9)
    for trial, most in (("a", 7), ("b", 5)):
        memory.hold(1)
        peaks.enter(trial)
        memory.hold(most)
        memory.hold(2)
        assert peaks.of(trial) == {"host": most, "device": None}
        peaks.leave(trial)
    assert peaks.of("b") is None


def test_what_a_trial_does_under_other_names_is_its_own(memory: Memory, peaks: TrialPeaks) -> None:
    peaks.enter("masks@a")
    memory.hold(8)
    peaks.enter("a")
    assert peaks.of("a") == peaks.of("masks@a") == {"host": 8, "device": None}
    peaks.leave("a")  # and what ends in its name
    memory.hold(1)
    peaks.enter("b")
    assert peaks.of("b") == {"host": 1, "device": None}


def test_trials_that_share_a_worker_have_none_until_both_are_gone(peaks: TrialPeaks) -> None:
    peaks.enter("a")
    peaks.enter("b")
    assert peaks.of("a") is None
    peaks.leave("b")
    assert peaks.of("a") is None
    peaks.leave("a")
    peaks.enter("b")
    assert peaks.of("b") is not None


def test_rows_of_trials_one_after_another_have_them(make_space, tmp_path) -> None:
    space = make_space(
        sweep=[
            {"recovery": "none", "criterion": "wanda", "sparsity": 0.5},
            {
                "recovery": "reconstruct",
                "granularity": "block",
                "criterion": "wanda",
                "sparsity": 0.5,
                "learning_rate": 1e-3,
            },
        ]
    )
    rows = launch(space, in_process=True, storage=tmp_path).set_index("recovery")
    assert pd.isna(rows.peak_host_bytes["dense"])
    for recovery in ("none", "reconstruct"):
        assert 100 << 20 < rows.peak_host_bytes[recovery] < 64 << 30
    assert rows.peak_device_bytes.isna().all()
