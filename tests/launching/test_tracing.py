"""`launch --trace` leaves what launch and shards did when, in the format of Chrome's and Perfetto's viewers."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest

from raysweep.launching.launch import launch
from raysweep.results.folders import TRACE_FILE


def test_a_trace_tells_every_call_of_every_shard(make_space, tmp_path):
    before = time.time()
    space = make_space(execution={"shards": 2})
    rows = launch(space, storage=tmp_path, in_process=True, trace=True)
    events = json.loads((tmp_path / "tiny" / TRACE_FILE).read_text())["traceEvents"]
    lines = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(lines.values()) == ["launch", "shard 0", "shard 1"]
    spans = [event for event in events if event["ph"] == "X"]
    for event in spans:
        assert before <= event["ts"] / 1e6 <= event["ts"] / 1e6 + event["dur"] / 1e6 <= time.time() + 0.1
    recovered = [event for event in spans if event["cat"] == "recover"]
    units = sum(rows.granularity.map({"matrix": 28, "subblock": 8, "block": 4}).dropna())
    assert len(recovered) == units
    trials = {event["args"]["trial"] for event in recovered}
    assert len(trials) == (rows.recovery == "reconstruct").sum()
    assert all(
        "subblock" in trial or "block" in trial or "matrix" in trial for trial in trials
    )  # labels, not ids
    for shard in (1, 2):
        mine = sorted((event for event in spans if event["pid"] == shard), key=lambda event: event["ts"])
        assert mine[0]["name"] == "load"
        for first, second in pairwise(mine):  # one call at a time
            assert first["ts"] + first["dur"] <= second["ts"] + 1e3
    stages = [event["name"] for event in spans if event["pid"] == 0]
    assert "trials" in stages
    assert any(stage.startswith("Dense pass") for stage in stages)


def test_no_trace_unless_asked_for(make_space, tmp_path):
    launch(make_space(), storage=tmp_path, in_process=True)
    assert not (tmp_path / "tiny" / TRACE_FILE).exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_launch_with_nothing_to_do_leaves_the_trace_that_is_there(make_space, tmp_path, finished):
    launch(make_space(), storage=tmp_path, in_process=True, trace=True)
    written = (tmp_path / "tiny" / TRACE_FILE).read_text()
    launch(make_space(), storage=tmp_path, in_process=True, trace=finished)
    assert (tmp_path / "tiny" / TRACE_FILE).read_text() == written
