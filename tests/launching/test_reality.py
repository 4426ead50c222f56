"""What a launch took beside what was planned."""

from __future__ import annotations

import threading

import pytest

from raysweep.cluster.nodes import this_node
from raysweep.launching.launch import launch
from raysweep.launching.reality import Peak, Reality


def test_peaks_are_of_the_process_and_a_file_is_left(make_space, tmp_path):
    space = make_space(sweep=[{"recovery": "none", "criterion": "wanda", "sparsity": 0.5}])
    before = set(threading.enumerate())
    launch(space, in_process=True, storage=tmp_path)
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)  # a program may launch as often as it likes
    found = Reality.read(tmp_path / "tiny")
    assert found is not None
    assert found.in_process
    assert 0 < found.seconds < 600
    assert found.host is not None
    assert 100 << 20 < found.host.measured <= this_node().memory_bytes
    assert found.device is None


def test_it_is_read_as_it_was_written(tmp_path):
    reality = Reality(12.5, None, Peak(3, 4), Peak(5, 6))
    reality.write(tmp_path)
    assert Reality.read(tmp_path) == reality


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seconds": 1, "planned_seconds": 2, "host": 3}'])
def test_a_damaged_file_says_nothing(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    assert Reality.read(tmp_path) is None
    assert Reality.read(tmp_path / "nowhere") is None
