"""`raysweep results` prints every trial and number, fits 80 columns, and says what it leaves out."""

from __future__ import annotations

import re

import pytest

from raysweep.analysis.table import summary_table
from raysweep.cli.results import search_of
from raysweep.cli.table import TITLES, fitting, table_columns
from raysweep.config.sections import SearchConfig
from raysweep.results.reader import load_results, load_rows
from tests.analysis.rows import failed, quickstart_rows, row, write_sweep


def numbers_of(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def test_the_table_of_a_sweep(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    ran = raysweep("results", "a")
    assert ran.status == 0
    assert {f"{one['perplexity']:.2f}" for one in quickstart_rows()} <= numbers_of(ran.out)
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    first_words = [line.split()[:2] for line in lines[3:13] if line.strip()]
    assert first_words[:5] == [
        ["dense", "12.00"],
        ["magnitude/row", "none"],
        ["matrix", "16.00"],
        ["subblock", "15.00"],
        ["block", "17.00"],
    ]
    caption = " ".join(lines[-4:])
    for words in (
        "builtin:pystdlib",
        "float32",
        "sparsity 0.6",
        "learning rate 0.001",
        "perplexity on pystdlib",
    ):
        assert words in caption


def test_what_has_no_room_is_named(raysweep, here, monkeypatch):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    narrow = raysweep("results").out
    assert "No room for output_error_calibration; a terminal 86 characters wide has it" in narrow
    assert "0.250" not in numbers_of(narrow)
    monkeypatch.setenv("COLUMNS", "120")
    wide = raysweep("results").out
    assert "No room" not in wide
    assert {"0.250", "3.0"} <= numbers_of(wide)


def test_what_no_trial_has_is_no_column(raysweep, here):
    unmeasured = {"peak_recovery_bytes": None}
    write_sweep(
        here / "raysweep-results" / "a", [row(0, "dense", **unmeasured), row(1, "none", **unmeasured)]
    )
    text = raysweep("results").out
    assert "MiB" not in text
    assert "seconds" in text


def test_settings_that_leave_no_room_for_a_cost_are_one_label(raysweep, here):
    """Words stay whole, and the cost that a sweep is about stays."""
    made = [row(0, "dense"), row(1, "none")]
    made += [
        row(10, "retrain", learning_rate=3e-4, loss="distillation"),
        row(11, "retrain", learning_rate=3e-3, trainable="lora", lora_rank=8, zero_stage=1),
        row(12, granularity="matrix", optimizer="exact", learning_rate=None),
    ]
    write_sweep(here / "raysweep-results" / "a", made)
    text = raysweep("results").out
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for word in ("trainable=lora", "lora_rank=8", "loss=distillation", "standalone", "recovery"):
        assert word in words
    assert "No room for " in text


def test_labels_tell_calibration_sets_apart(raysweep, here):
    """Of which rows do not compare; a table that has no room for the column says it in the label."""
    made = [row(0, "dense"), row(1, "none", calibration_num_samples=16)]
    made += [
        row(10, "retrain", learning_rate=3e-4, loss="distillation", calibration_num_samples=32),
        row(11, "retrain", learning_rate=3e-3, trainable="lora", lora_rank=8, calibration_num_samples=16),
    ]
    write_sweep(here / "raysweep-results" / "a", made)
    words = raysweep("results").out.split()
    assert words.count("calibration.num_samples=16") == 2
    assert words.count("calibration.num_samples=32") == 1


def test_masks_of_one_or_two_rows_are_parted_by_what_comes_first(raysweep, here):
    """A gap behind every sparsity, not behind every mask; what only recoveries have stands in a line of its own."""
    masks = [
        (sparsity, criterion) for sparsity in (0.5, 0.6) for criterion in ("magnitude", "random", "wanda")
    ]
    made = [row(0, "dense")]
    for number, (sparsity, criterion) in enumerate(masks, start=1):
        made.append(row(10 * number, "none", criterion=criterion, sparsity=sparsity))
        made.append(row(10 * number + 1, criterion=criterion, sparsity=sparsity, learning_rate=0.00123456))
    write_sweep(here / "raysweep-results" / "a", made)
    text = raysweep("results").out
    table, caption = text.split("\n\nAll: ") if "\n\nAll: " in text else ("", text)
    blank = [place for place, line in enumerate(table.splitlines()) if not line.strip()]
    first = table.splitlines().index(next(line for line in table.splitlines() if "dense" in line))
    assert [place - first for place in blank] == [1, 8]
    assert "Recovered with: granularity subblock, learning rate 0.00123456" in caption
    assert "granularity" not in caption.split("Recovered with")[0]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_every_column_is_either_shown_or_named(tmp_path, width):
    rows = load_rows(write_sweep(tmp_path / "a", quickstart_rows()))
    columns = table_columns(summary_table(rows))
    shown, dropped = fitting(columns, width)
    assert sorted(one.name for one in [*shown, *dropped]) == sorted(one.name for one in columns)
    assert {"criterion", "recovery", "perplexity", "validation_perplexity"} <= {one.name for one in shown}


def test_many_labels_wrap_instead_of_vanishing(raysweep, here):
    made = [
        row(
            number,
            model=f"organization-{number}/model-with-a-long-name",
            criterion=("wanda", "magnitude")[number % 2],
            sparsity=(0.5, 0.6)[number % 2],
            granularity=("block", "subblock")[number % 2],
            learning_rate=(1e-4, 1e-3)[number % 2],
            epochs=1 + number,
            batch_size=1 + number,
            trainable=("all", "weights")[number % 2],
        )
        for number in range(3)
    ]
    write_sweep(here / "raysweep-results" / "a", made)
    lines = raysweep("results").out.splitlines()
    assert max(map(len, lines)) <= 80
    letters = "".join("".join(lines).split())
    assert "…" not in letters
    for number in (10, 11, 12):
        assert f"{number}.00" in letters


def test_failed_trials_are_listed_below(raysweep, here):
    reason = "perplexity is inf: not a result, " + "and a reason longer than any terminal is wide " * 2
    write_sweep(here / "raysweep-results" / "a", [row(0), failed(1, reason, learning_rate=10.0)])
    ran = raysweep("results")
    assert ran.status == 0
    assert f"  wanda/row 0.6 subblock lr=10: {reason}".rstrip() in ran.out
    assert "Failed: 1" in ran.out


def test_nothing_but_failures(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", [failed(0, "lost")])
    assert "wanda/row 0.6 subblock lr=0.001: lost" in raysweep("results").out


def test_json_has_every_column_of_every_row(raysweep, here):
    folder = write_sweep(here / "raysweep-results" / "a", [*quickstart_rows(), failed(99, "lost")])
    document = raysweep("results", "a", "--json").json
    assert (document["sweep"], document["folder"]) == ("a", str(folder.absolute()))
    rows = load_results(folder)
    assert {one["trial_id"] for one in document["rows"]} == set(rows["trial_id"])
    assert all(set(one) == set(rows.columns) for one in document["rows"])
    dense = next(one for one in document["rows"] if one["recovery"] == "dense")
    assert dense["granularity"] is None
    assert dense["peak_recovery_bytes"] is None
    assert dense["started_at"].startswith("2026-11-24T12:00:08")


def test_json_is_ordered_by_sort(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    values = [
        one["perplexity"] for one in raysweep("results", "--sort", "-perplexity", "--json").json["rows"]
    ]
    assert values == sorted(values, reverse=True)


def test_where_chooses_rows(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", [*quickstart_rows(), failed(99, "lost")])
    chosen = ("--where", "criterion == 'wanda' and granularity != null")
    told = raysweep("results", *chosen).out
    assert {"20.00", "19.00", "18.00"} <= numbers_of(told)
    assert not {"12.00", "13.00", "14.00", "15.00"} & numbers_of(told)
    rows = raysweep("results", *chosen, "--sort", "perplexity", "--json").json["rows"]
    assert [one["perplexity"] for one in rows if one["status"] == "finished"] == [18.0, 19.0, 20.0]
    none = raysweep("results", "--where", "sparsity > 0.9")
    assert (none.status, none.out) == (0, "")
    assert "none of 10 trials" in none.err
    words = "criterion == 'magnitude/row' or `recovery` in ['matrix', 'none', 'dens'] and criterion == null"
    assert raysweep("results", "--where", words).err.splitlines() == [
        "none of 10 trials is chosen",
        "  no trial has criterion 'magnitude/row'; there are wanda, magnitude",
        "  no trial has recovery 'matrix'; there are reconstruct, none, dense; granularity has that",
        "  no trial has recovery 'dens'; there are reconstruct, none, dense",
    ]
    assert raysweep("results", "--where", "sparsity > 0.9", "--json").json["rows"] == []


def test_a_where_that_is_no_expression_is_refused(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    for expression in ("sparsity =", "criterion.str.len() > 1", "@x", "__import__('os')", "sparcity > 1"):
        ran = raysweep("results", "--where", expression)
        assert ran.status == 2
        assert "--where" in ran.err
        assert "Traceback" not in ran.err
        assert ran.out == ""


def test_pareto_leaves_what_nothing_beats(raysweep, here):
    """Of each sparsity by itself, every seed of a setting, at the learning rate that validation chose."""
    made = [row(0, "dense", device_seconds_standalone=1.0)]

    def add(perplexity, seconds, **fields):
        for seed in (0, 1):
            number, value = len(made), perplexity + seed / 10
            cost = {"device_seconds_standalone": seconds, "validation_perplexity": value}
            made.append(row(number, calibration_seed=seed, seed=seed, perplexity=value, **cost, **fields))

    add(11.0, 8.0, granularity="subblock")
    add(30.0, 2.0, granularity="subblock", learning_rate=0.1)  # cheap, and not its best learning rate
    add(12.0, 5.0, granularity="matrix")
    add(11.5, 9.0, granularity="block")
    add(40.0, 9.5, granularity="block", sparsity=0.9)
    write_sweep(here / "raysweep-results" / "a", made)
    rows = raysweep("results", "--pareto", "--json").json["rows"]
    found = sorted((one["perplexity"], one["granularity"]) for one in rows if one["granularity"])
    assert found == [
        (11.0, "subblock"),
        (11.1, "subblock"),
        (12.0, "matrix"),
        (12.1, "matrix"),
        (40.0, "block"),
        (40.1, "block"),
    ]
    assert [one["recovery"] for one in rows].count("dense") == 1
    assert not {"30.00", "11.50"} & numbers_of(raysweep("results", "--pareto").out)
    left = raysweep("results", "--pareto", "--where", "granularity != 'subblock'", "--json").json["rows"]
    assert {one["perplexity"] for one in left if one["sparsity"] == 0.6} == {11.5, 11.6, 12.0, 12.1}


def test_csv_has_every_column_of_every_row(raysweep, here):
    import io

    import pandas as pd

    odd = failed(99, 'a "reason", with\na line more')
    folder = write_sweep(here / "raysweep-results" / "a", [*quickstart_rows(), odd])
    ran = raysweep("results", "--csv", "--sort", "perplexity")
    read, rows = pd.read_csv(io.StringIO(ran.out), dtype={"trial_id": str}), load_results(folder)
    assert list(read) == list(rows)
    assert ran.out.startswith("trial_id,")
    assert read["perplexity"].dropna().tolist() == sorted(rows["perplexity"].dropna())
    assert read.set_index("trial_id")["error"].dropna().tolist() == [odd["error"]]
    assert "2026-11-24T12:00:08+00:00" in ran.out
    both = raysweep("results", "--csv", "--json")
    assert both.status == 2
    assert "exclude one another" in both.err


def test_what_is_chosen_is_passed_on_to_another_cluster(raysweep, monkeypatch):
    """As the command line that runs there; of what comes back the CSV goes to stdout, all before it to stderr."""
    from raysweep.cluster.jobs import JobServer

    asked = []
    monkeypatch.setattr(JobServer, "__init__", lambda self, address: None)
    monkeypatch.setattr(JobServer, "submit", lambda self, line: asked.append(line) or "job")

    def follow(self, job, show):
        show("a warning\ntrial_id,recovery_id\n1,2\n")
        return 0

    monkeypatch.setattr(JobServer, "follow", follow)
    there = ("--address", "http://head:8265")
    ran = raysweep(
        "results", "a", "--where", "a == 'b c'", "--pareto", "--sort", "-perplexity", "--csv", *there
    )
    assert asked == [
        ["raysweep", "results", "a", "--sort", "-perplexity", "--where", "a == 'b c'", "--pareto", "--csv"]
    ]
    assert ran.out == "trial_id,recovery_id\n1,2\n"
    assert ran.err == "a warning\n"


def test_an_unknown_column_is_refused_with_the_nearest(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    ran = raysweep("results", "--sort", "perplexty")
    assert ran.status == 2
    assert "did you mean 'perplexity'?" in ran.err


def test_the_name_may_be_left_out_for_an_only_sweep(raysweep, here, monkeypatch):
    write_sweep(here / "elsewhere" / "a", quickstart_rows())
    assert raysweep("results", "--storage", "elsewhere").status == 0
    monkeypatch.setenv("RAYSWEEP_STORAGE", "elsewhere")
    assert raysweep("results").status == 0
    write_sweep(here / "elsewhere" / "b", quickstart_rows())
    ran = raysweep("results")
    assert ran.status == 2
    assert "a, b" in ran.err


def test_no_colors_where_no_terminal_is(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", [*quickstart_rows(), failed(99, "lost")])
    assert "\x1b" not in raysweep("results").out


def test_plain_ascii_where_the_output_takes_nothing_else(here):
    import subprocess
    import sys
    from pathlib import Path

    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    environment = {
        "PYTHONIOENCODING": "ascii",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PATH": "",
    }
    run = subprocess.run(
        [sys.executable, "-m", "raysweep", "results"], capture_output=True, cwd=here, env=environment
    )
    assert run.returncode == 0
    assert b"magnitude/row" in run.stdout
    assert run.stdout.isascii()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "search: {metric: output_error_validation, mode: max, compare_within: [model]}",
            {"metric": "output_error_validation", "mode": "max", "compare_within": ("model",)},
        ),
        ("sweep: of another version\nsearch: {mode: max}", {"mode": "max"}),
        ("search: null", {}),
        ("search: [min]", {}),
        ("search: {mode: sideways}", {}),
        ("search: {unheard_of: 1}", {}),
        ("search: {compare_within: [nothing]}", {}),
        ("[search]", {}),
        ("search: {", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_what_best_means_is_read_from_the_space_of_the_sweep(here, text, expected):
    if text is not None:
        (here / "space.yaml").write_text(text)
    assert search_of(here) == SearchConfig(**expected)


def test_moments_are_short(raysweep, here):
    write_sweep(here / "raysweep-results" / "a", quickstart_rows())
    assert "2026-11-24 12:00:08 " in raysweep("results", "--sort", "started_at").out.replace("\n", " ")


def test_rows_that_do_not_say_how_they_were_recovered_are_shown(raysweep, here):
    """As another program may have written them."""
    unsaid = {"recovery": None}
    write_sweep(here / "raysweep-results" / "a", [row(0, "none") | unsaid, row(1, "none") | unsaid])
    ran = raysweep("results")
    assert ran.status == 0
    assert {"10.00", "11.00"} <= numbers_of(ran.out)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("sign", ["", "-"])
def test_the_column_that_is_sorted_by_is_shown(raysweep, here, monkeypatch, width, sign):
    """Every column can be, whatever room there is."""
    rows = load_rows(write_sweep(here / "raysweep-results" / "a", quickstart_rows()))
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("trial_id", "output_error_calibration", "device_seconds", "peak_recovery_bytes", "dtype"):
        ran = raysweep("results", f"--sort={sign}{name}")
        assert ran.status == 0, name
        assert f"No room for {name}" not in ran.out
        head = " ".join(ran.out.split("─")[0].split())
        assert all(word in head for word in TITLES.get(name, name.replace("_", " ")).split()), (name, head)
    for name in rows[0]:
        values = summary_table(rows, f"{sign}{name}").values(name)
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=bool(sign)), name
        assert values == known + [None] * (len(values) - len(known)), name
