"""Signals end a launch once and cleanly; what was installed before is there again afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from raysweep.cli.ending import Terminated, clean_interruptions, interruption_status


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_is_raised_and_has_its_exit_status(number, status):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as caught, clean_interruptions():
        os.kill(os.getpid(), number)
    assert interruption_status(caught.value) == status
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_does_not_disturb_the_clean_up_but_a_third_one_does(capsys):
    steps = []

    def interrupted_thrice() -> None:
        with clean_interruptions():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                steps.append(capsys.readouterr().err)
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("not reached")

    with pytest.raises(Terminated):
        interrupted_thrice()
    assert len(steps) == 1
    assert "cleaning up" in steps[0]
