"""Signals end a launch once and cleanly; what was installed before is there again afterwards."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

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

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted_thrice()
    assert interruption_status(caught.value) == 130  # the first one says what it was
    assert len(steps) == 1
    assert "cleaning up" in steps[0]


@pytest.mark.parametrize("made_of_it", [KeyboardInterrupt, RuntimeError, None], ids=str)
def test_sigterm_stays_sigterm_whatever_was_made_of_it(made_of_it):
    """Ray raises a plain KeyboardInterrupt for any signal; what was interrupted may fail or just return."""

    def launch() -> None:
        with clean_interruptions():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                if made_of_it is not None:
                    raise made_of_it from None

    with pytest.raises(Terminated):
        launch()


def test_the_exit_by_which_ray_answers_sigterm_is_sigterm():
    def launch(code: int) -> None:
        with clean_interruptions():
            sys.exit(code)

    with pytest.raises(Terminated):
        launch(signal.SIGTERM)
    with pytest.raises(SystemExit):
        launch(3)


def test_other_errors_pass():
    def launch() -> None:
        with clean_interruptions():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch()


@pytest.fixture
def slow_module(tmp_path, monkeypatch) -> str:
    """The name of a module whose import takes a second, and that is interrupted at its beginning."""
    name = "imported_slowly"
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nDONE = True\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_import_is_not_interrupted_but_what_comes_after_it_is(slow_module):
    steps = []

    def launch() -> None:
        with clean_interruptions():
            steps.append(importlib.import_module(slow_module).DONE)
            time.sleep(10)
            steps.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        launch()
    assert steps == [True]


def test_an_import_that_does_not_end_is_ended_by_the_third_signal(tmp_path, monkeypatch, capsys):
    text = "import os, signal, time\nfor _ in range(3):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.3)\n"
    (tmp_path / "imported_for_ever.py").write_text(text + "raise AssertionError('it went on')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def launch() -> None:
        with clean_interruptions():
            importlib.import_module("imported_for_ever")

    with pytest.raises(KeyboardInterrupt):
        launch()
    assert capsys.readouterr().err.count("ends when") == 1


def test_two_signals_during_an_import_are_one_afterwards(tmp_path, monkeypatch, capsys):
    text = "import os, signal, time\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.2)\n"
    (tmp_path / "imported_impatiently.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def launch() -> None:
        with clean_interruptions():
            try:
                importlib.import_module("imported_impatiently")
                time.sleep(10)
            finally:
                time.sleep(0.5)  # cleans up

    with pytest.raises(KeyboardInterrupt):
        launch()
    assert "still cleaning up" not in capsys.readouterr().err


def test_a_signal_is_not_lost_where_python_swallows_what_is_raised():
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def launch() -> None:
        with clean_interruptions():
            one = Finalized()
            del one
            time.sleep(10)
            raise AssertionError("it was lost")

    hook = sys.unraisablehook
    with pytest.raises(Terminated):
        launch()
    assert sys.unraisablehook is hook
