"""`raysweep report` writes a page where it says, and refuses what cannot be."""

from __future__ import annotations

import os

import pytest

from raysweep.analysis import paired
from raysweep.cli.report import checked_margin
from raysweep.errors import UsageError
from tests.analysis.rows import failed, quickstart_rows, row, write_sweep


def test_it_says_where_the_page_lies(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    ran = raysweep("report")
    assert ran.status == 0, ran.err
    assert ran.out == "a-report/index.html\n"
    assert "4 undecided" in ran.err
    page = (here / "a-report" / "index.html").read_text()
    assert "<h1>a</h1>" in page
    assert "15.00" in page
    assert raysweep("report", "a").status == 0  # again, over its own


def test_json_names_every_file(raysweep, here):
    folder = write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    document = raysweep("report", "a", "--output", "deep/er", "--json").json
    assert document["sweep"] == "a"
    assert document["folder"] == str(folder)
    assert document["page"] == str(here / "deep" / "er" / "index.html")
    assert document["verdicts"] == {"undecided": 4}
    assert all(os.path.isfile(path) for path in document["files"])
    assert {path.rsplit(".", 1)[1] for path in document["files"]} == {"png", "svg"}


def test_the_margin_decides(raysweep, here):
    made = [
        row(10 * seed + place, granularity=granularity, calibration_seed=seed, seed=seed, perplexity=value)
        for seed in range(3)
        for place, (granularity, value) in enumerate({"subblock": 10.0, "block": 10.3 + seed / 1000}.items())
    ]
    write_sweep(here / "raysweep-results" / "a", made)
    assert raysweep("report", "--json").json["verdicts"] == {"worse": 1}
    wide = ("report", "--margin", "0.5", "--margin-percent", "0", "--json")
    assert raysweep(*wide).json["verdicts"] == {"equivalent": 1}
    percent = ("report", "--margin", "0", "--margin-percent", "5", "--json")
    assert raysweep(*percent).json["verdicts"] == {"equivalent": 1}


def test_margins_reach_the_statistics():
    assert checked_margin(0.2, 3) == paired.Margin(0.2, 0.03)


@pytest.mark.parametrize(
    ("absolute", "percent"), [(-1, 1), (float("nan"), 1), (float("inf"), 1), (0.1, 100), (0.1, -2), (0, 0)]
)
def test_what_is_no_margin_is_refused(absolute, percent):
    with pytest.raises(UsageError) as refused:
        checked_margin(absolute, percent)
    assert refused.value.allowed


def test_wrong_margins_end_a_command_before_it_writes(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    for arguments in (["--margin", "nan"], ["--margin", "0", "--margin-percent", "0"], ["--margin", "x"]):
        ran = raysweep("report", *arguments)
        assert ran.status == 2
        assert "--margin" in ran.err
    assert not (here / "a-report").exists()


def test_outputs_that_cannot_be_written_are_refused(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    (here / "file").write_text("no folder")
    (here / "site").mkdir()
    (here / "site" / "index.html").write_text("<title>mine</title>")
    for output in ("file", "file/deeper", "/proc/nothing", "s3://bucket/x", "a\0b", "site"):
        ran = raysweep("report", "--output", output)
        assert ran.status == 2, output
        assert "--output" in ran.err
        assert "This was not foreseen" not in ran.err
    assert (here / "site" / "index.html").read_text() == "<title>mine</title>"


def test_a_sweep_of_failures_and_none_at_all(raysweep, here):
    assert raysweep("report").status == 2
    assert "no sweep 'b'" in raysweep("report", "b").err
    write_sweep(here / "raysweep-results" / "a", [failed(0, "it <b>burst</b>")])
    ran = raysweep("report")
    assert ran.status == 0, ran.err
    assert "Nothing to compare yet" in ran.err
    assert "it &lt;b&gt;burst&lt;/b&gt;" in (here / "a-report" / "index.html").read_text()


def test_from_a_storage_by_uri(raysweep, here, tmp_path):
    write_sweep(tmp_path / "far" / "a", quickstart_rows())
    uri = (tmp_path / "far").as_uri()
    document = raysweep("report", "a", "--storage", uri, "--json").json
    assert document["folder"] == f"{uri}/a"
    assert document["page"] == str(here / "a-report" / "index.html")
