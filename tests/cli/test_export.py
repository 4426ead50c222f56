"""`raysweep export` and `raysweep clean --artifacts` as scripts use them: outputs, JSON, exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysweep.config.space import SearchSpace
from raysweep.launching.launch import launch
from tests.analysis.rows import quickstart_rows, write_sweep


@pytest.fixture
def sweep(space_file, here) -> Path:
    """A sweep that has run, and the id of its recovered trial beside."""
    launch(SearchSpace.from_yaml(space_file), in_process=True, storage=here / "raysweep-results")
    return here / "raysweep-results" / "small"


def test_a_kept_trial_and_one_that_is_cleaned_away(raysweep, sweep, here):
    rows = raysweep("results", "--json").json["rows"]
    (row,) = [row for row in rows if row["recovery"] == "reconstruct"]
    ran = raysweep("export", row["trial_id"][:8], "--output", "model", "--json")
    assert ran.status == 0, ran.err
    document = ran.json
    assert document["folder"] == str(here / "model")
    assert (document["trial_id"], document["sweep"]) == (row["trial_id"], "small")
    assert (document["recomputed"], document["measured"]) == (None, None)
    assert document["perplexity"] == row["perplexity"]
    assert all((here / "model" / name).is_file() for name in document["files"])
    ran = raysweep("export", f"small:{row['trial_id']}", "--output", "model", "--dtype", "bfloat16")
    assert ran.status == 0, ran.err
    assert ran.out == "model\n"
    assert "rounded to bfloat16" in ran.err
    assert json.loads((here / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert raysweep("clean", "small").status == 0
    assert list((sweep / "artifacts").iterdir())
    assert raysweep("clean", "small", "--artifacts").status == 0
    assert not (sweep / "artifacts").exists()
    ran = raysweep("export", row["trial_id"], "--output", "again")
    assert ran.status == 0, ran.err
    assert "This trial was not kept, so it is computed again" in ran.err
    assert "equal to the bit" in ran.err


def test_what_is_typed_wrongly(raysweep, here):
    rows = quickstart_rows()
    write_sweep(here / "raysweep-results" / "a", rows)
    known = rows[3]["trial_id"]
    (here / "mine").mkdir()
    (here / "mine" / "file").touch()
    wrong = {
        ("export", known): "--output",
        ("export", "--output", "x"): "TRIAL",
        ("export", "nothing", "--output", "x"): "no trial 'nothing'",
        ("export", "b:1", "--output", "x"): "no sweep 'b'",
        ("export", "0", "--output", "x"): f"{len(rows)} trials begin with '0'",
        ("export", known, "--output", "x", "--dtype", "bfloat61"): "did you mean 'bfloat16'?",
        ("export", known, "--output", "s3://bucket/x"): "is no folder of this machine",
        ("export", known, "--output", "a\0b"): "--output",
        ("export", known, "--output", "mine"): "is not empty",
        ("export", known, "--output", "mine/file"): "is no folder",
        ("export", known, "--output", "mine/file/deeper"): "--output",
        ("export", known, "--output", "x"): "space.yaml",  # rows that were brought here without it
    }
    for arguments, message in wrong.items():
        ran = raysweep(*arguments)
        assert ran.status == 2, (arguments, ran.err)
        assert message in ran.err + ran.out, arguments
        assert "This was not foreseen" not in ran.err
    assert sorted(path.name for path in here.iterdir()) == ["mine", "raysweep-results"]
