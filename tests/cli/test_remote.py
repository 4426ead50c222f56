"""Commands on a storage that a URI names say where it is, not where its mirror lies."""

from __future__ import annotations

import pytest


@pytest.fixture
def uri(tmp_path) -> str:
    return (tmp_path / "far").as_uri()


def test_every_command_takes_it(raysweep, space_file, tmp_path, uri, monkeypatch):
    assert "no sweep in " + uri in raysweep("status", "--storage", uri).err
    ran = raysweep("launch", space_file, "--in-process", "--storage", uri)
    assert ran.status == 0, ran.err
    assert f'raysweep.load_results("{uri}/small")' in ran.err
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setenv("RAYSWEEP_STORAGE", uri)
    assert raysweep("results").out == ran.out
    document = raysweep("results", f"{uri}/small", "--json").json
    assert (document["sweep"], document["folder"], len(document["rows"])) == ("small", f"{uri}/small", 4)
    status = raysweep("status", "--json").json
    assert [(one["name"], one["state"], one["finished"]) for one in status] == [("small", "finished", 4)]
    assert raysweep("plan", space_file, "--json").json["trials"]["finished"] == 4
    cleaned = raysweep("clean", "small")
    assert f"4 rows kept in {uri}/small" in cleaned.err
    again = raysweep("launch", space_file, "--in-process", "--set", "sweep.0.sparsity=[0.5, 0.6]")
    assert "4 finished before" in again.err
    assert raysweep("stop", "small").status == 2


@pytest.mark.parametrize("command", ["launch", "plan", "results", "status", "stop", "clean"])
def test_what_cannot_be_reached_is_wrong_usage(raysweep, tmp_path, command):
    (tmp_path / "file").write_text("no folder")
    arguments = ["small"] if command in ("stop", "clean") else []
    for storage in ("s33://bucket/x", "s3://key:secret@bucket"):
        ran = raysweep(command, *arguments, "--storage", storage)
        assert ran.status == 2, ran.err
        assert "This was not foreseen" not in ran.err
        assert "secret" not in ran.err
