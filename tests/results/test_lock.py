"""A sweep is held by one process at a time, and by nobody once that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysweep.errors import UsageError
from raysweep.results.lock import LOCK_FILE, Holder, holder_of, launch_lock, refuse_where_held

HOLD = """
import sys, time
from pathlib import Path
from raysweep.results.lock import launch_lock
with launch_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_comes_second_is_refused_and_told_who_was_first(other, tmp_path):
    holder = holder_of(tmp_path)
    assert holder is not None
    assert holder.pid == other.pid
    with pytest.raises(UsageError, match=f"as process {other.pid} on {holder.host}"), launch_lock(tmp_path):
        pass
    assert holder_of(tmp_path) == holder


def test_a_killed_process_holds_nothing(other, tmp_path):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK_FILE).exists()
    assert holder_of(tmp_path) is None
    with launch_lock(tmp_path):
        assert holder_of(tmp_path).pid == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_an_error_ends_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), launch_lock(tmp_path):
        raise ZeroDivisionError
    refuse_where_held(tmp_path)
    with launch_lock(tmp_path):
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with launch_lock(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        assert holder_of(tmp_path) == Holder()
        assert str(holder_of(tmp_path)) == "a process on another host"


def test_of_many_that_begin_at_once_one_gets_it(tmp_path):
    code = "import sys; from pathlib import Path; from raysweep.results.lock import launch_lock\n"
    code += "with launch_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(6)
    ]
    losers = [process for process in processes if process.stdout.readline() != "held\n"]
    assert len(losers) == 5
    for process in processes:
        process.stdin.close()
        process.wait()
        process.stdout.close()
    assert holder_of(tmp_path) is None
