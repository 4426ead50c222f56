"""A launch shown line by line, and as a live picture on a terminal that keeps nothing running."""

from __future__ import annotations

import io
import re
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from raysweep.analysis.rows import trial_label
from raysweep.cli.display import LiveDisplay, PlainDisplay, shown
from raysweep.cli.tally import Tally
from raysweep.config.space import SearchSpace
from tests.analysis.rows import failed, row


@pytest.fixture
def tally() -> Tally:
    return Tally.of(
        SearchSpace.from_dict(
            {
                "name": "a",
                "model": {"path": "builtin:pystdlib"},
                "calibration": {"dataset": "builtin:pystdlib"},
                "sweep": [
                    {
                        "recovery": ["none", "reconstruct"],
                        "criterion": "wanda",
                        "sparsity": [n / 20 for n in range(8, 12)],
                        "granularity": "subblock",
                        "learning_rate": 1e-3,
                    }
                ],
            }
        )
    )


def labeled(one: dict[str, Any]) -> dict[str, Any]:
    return one | {"label": trial_label(one)}


def a_launch(display: Any) -> None:
    display.stage("Checking model and data")
    display.stage("Starting Ray on this machine")
    display.begin(10, 1, 0, "http://127.0.0.1:8265", 0)
    display.row(labeled(row(0, "none", perplexity=9.114, validation_perplexity=6.81, seconds_total=12.2)))
    display.row(labeled(failed(1, "perplexity is inf [not a style]", learning_rate=10.0)))


def test_a_line_for_every_step(tally):
    stream = io.StringIO()
    display = PlainDisplay(tally, Console(file=stream, width=40))
    a_launch(display)
    display.end()
    display.close()
    assert stream.getvalue().splitlines() == [
        "Checking model and data",
        "Starting Ray on this machine",
        "10 trials, 1 finished before; dashboard http://127.0.0.1:8265",
        "[ 2/10] wanda/row 0.6  perplexity 9.11  validation 6.81  12 s",
        "[ 3/10] wanda/row 0.6 subblock lr=10  failed: perplexity is inf [not a style]",
        "Cleaning up",
    ]


def test_lines_where_no_terminal_is(tally, capsys):
    with shown(tally) as display:
        a_launch(display)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 5
    assert "\x1b" not in captured.err


def terminal(width: int = 100) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=width, height=24, legacy_windows=False), stream


def test_the_picture_has_counts_best_trials_and_the_dashboard(tally):
    console, stream = terminal()
    display = LiveDisplay(tally, console)
    threads = threading.active_count()
    try:
        a_launch(display)
        display.stage("Dense pass")
        recorder = Console(width=100, height=24, file=io.StringIO(), record=True)
        recorder.print(display._picture())
        picture = recorder.export_text()
        display.end()
    finally:
        display.close()
    assert_threads_end(threads)
    for words in ("Dense pass", "3 of 10 trials", "1 failed", "http://127.0.0.1:8265", "best so far"):
        assert words in picture
    assert re.search(r"0\.6 none +wanda/row 0\.6 +6\.81 +9\.11", picture)
    kept = stream.getvalue()
    assert "Checking model and data" in kept
    assert "perplexity is inf [not a style]" in kept


def test_more_cells_than_lines_are_counted(tally):
    console, _ = terminal()
    display = LiveDisplay(tally, console)
    tally.begin(10, 0, 0)
    for number in range(40):
        tally.row(labeled(row(number, "none", sparsity=number / 100)))
    recorder = Console(width=60, height=24, file=io.StringIO(), record=True)
    recorder.print(display._picture())
    picture = recorder.export_text()
    assert "more cells" in picture
    assert len(picture.splitlines()) < 24


def a_launch_with_a_bug(tally: Tally) -> None:
    with shown(tally) as display:
        a_launch(display)
        raise ZeroDivisionError


def assert_threads_end(before: int) -> None:
    """The thread that refreshes the picture notices the end with its next refresh."""
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_an_error_leaves_no_picture_behind(tally, monkeypatch):
    console, _ = terminal()
    monkeypatch.setattr("raysweep.cli.display.messages", lambda: console)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        a_launch_with_a_bug(tally)
    assert_threads_end(threads)
