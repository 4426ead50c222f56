"""The page says what the report says, of whatever part of a sweep is there, and does no harm."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from raysweep.analysis.page import render, words
from raysweep.analysis.page.findings import Interval, findings
from raysweep.analysis.page.folder import write_report
from raysweep.analysis.page.gaps import gaps
from raysweep.analysis.page.render import PAGE, report_files
from raysweep.analysis.paired import Margin, in_words
from raysweep.analysis.report import Report, make_report, report_of
from raysweep.analysis.rows import records, trial_label
from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError
from raysweep.results.reader import load_units
from tests.analysis import sweeps
from tests.analysis.rows import failed, frame, row, write_sweep

NAN = float("nan")
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """A page as a browser takes it apart: every element with its attributes and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        assert not self._open, f"not closed: {[self.elements[place][0] for place in self._open]}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in EMPTY:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for place in self._open:
            self.elements[place][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            " ".join("".join(text).split())
            for name, own, text in self.elements
            if name == tag and all(value in (own.get(key) or "").split() for key, value in attributes.items())
        ]

    @property
    def text(self) -> str:
        return self.texts("body")[0]

    @property
    def trials(self) -> dict[str, list]:
        return json.loads(next(text for _, own, text in self.elements if own.get("id") == "trial-data")[0])


def page_of(report: Report) -> Page:
    return Page(report_files(report)[PAGE].decode())


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    return report_of(sweeps.write(tmp_path_factory.mktemp("page") / "made-up", sweeps.space()))


@pytest.fixture(scope="module")
def files(report) -> dict[str, bytes]:
    return report_files(report, "made-up-report")


@pytest.fixture(scope="module")
def page(files) -> Page:
    return Page(files[PAGE].decode())


def test_every_verdict_stands_in_words_with_its_mark(report, page):
    badges = [(text[:1], text[1:]) for text in page.texts("span", **{"class": "badge"})]
    marks = {"better": "+", "worse": "\N{MINUS SIGN}", "equivalent": "=", "undecided": "?"}
    assert badges == [(marks[verdict], verdict) for verdict in report.comparisons["verdict"]]
    said = page.texts("p")
    for one in report.comparisons.to_dict("records"):
        assert any(text.startswith(in_words(one)) for text in said), in_words(one)
    assert {"better", "worse", "equivalent", "undecided"} == {*report.comparisons["verdict"]}


def test_a_difference_within_the_margin_is_said_to_be_one(report):
    """Where it could not be shown to be equivalent together with all others."""
    first = report.comparisons.iloc[:2].assign(verdict="worse", difference=0.05, margin=0.1, low=[0.02, 0.02])
    other = replace(report, comparisons=first.assign(high=[0.08, 0.12]))
    told = [one.about for question in findings(other) for group in question.groups.values() for one in group]
    assert ["smaller than the margin" in about for about in told] == [True, False]


def test_the_tallies_of_the_questions_add_up(report, page):
    told = re.findall(
        r"(\d+) (better|worse|equivalent|undecided)", " ".join(page.texts("p", **{"class": "tally"}))
    )
    sums: dict[str, int] = {}
    for number, verdict in told:
        sums[verdict] = sums.get(verdict, 0) + int(number)
    assert sums == report.comparisons["verdict"].value_counts().to_dict()


def test_costs_and_ratios_are_those_of_the_frames(report, page):
    cells = page.texts("td")
    for one in report.costs.to_dict("records"):
        expected = [one["method"], f"{one['trials']}", f"{one['perplexity']:.2f}"]
        starts = [place for place, cell in enumerate(cells) if cells[place : place + 3] == expected]
        assert starts, expected
        assert words.seconds(one["device_seconds_standalone"]) in cells[starts[0] : starts[0] + 8]
    for one in report.ratios.to_dict("records"):
        assert any(cell.split(" (")[0] == words.times(one["ratio"]) for cell in cells)


def test_all_trials_are_in_the_page_with_their_numbers(report, page):
    titles = [column["title"] for column in page.trials["columns"]]
    told = [dict(zip(titles, values, strict=True)) for values in page.trials["rows"]]
    assert len(told) == len(report.rows)
    for one, known in zip(told, records(report.rows), strict=True):
        assert one["trial"] == trial_label(known)
        assert one["perplexity"] == pytest.approx(known["perplexity"], rel=1e-5)
        assert one["recovery MiB"] == known["peak_recovery_bytes"]
        assert one["status"] == known["status"]
    assert {one["stratum"] for one in told} == {"", "sparsity 0.5", "sparsity 0.6"}


def test_recipes_run_what_they_say(report, files, page):
    for one in report.recipes.to_dict("records"):
        name = f"recipe-{report.strata[one['stratum']].replace(' ', '-')}.yaml"
        assert files[name].decode() == one["yaml"]
        assert SearchSpace.from_dict(yaml.safe_load(one["yaml"])).name == "made-up-recipe"
        assert f"raysweep launch made-up-report/{name}" in page.texts("code")
        named = f"{report.space.name}:{one['trial_id']}"
        assert f"raysweep export {named} --output pruned-model" in page.texts("code")
        assert " ".join(one["yaml"].split()) in page.texts("code")
        assert one["label"] in " ".join(page.texts("h3"))


def test_every_figure_has_its_files(files, page):
    assert len([one for one in page.elements if one[0] == "svg" and one[1].get("role") == "img"]) == 12
    linked = [
        own["href"] for tag, own, _ in page.elements if tag == "a" and own["href"].startswith("figures/")
    ]
    assert sorted(linked) == sorted(name for name in files if name.startswith("figures/"))
    assert all(files[name].startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name in linked)


def test_where_the_numbers_come_from(page):
    told = page.texts("dl", **{"class": "origins"})[0]
    for fact in (
        "5d2f5b0a2c9e41d7",
        "float32",
        "48 sequences of 128 tokens",
        "32 windows of 128 tokens",
        "torch 2.11.0",
    ):
        assert fact in told
    prose = " ".join(page.texts("p", **{"class": "prose"}))
    for fact in ("0.1 perplexity or 1 %", "Holm", "TOST", "Student's t", "all 18 comparisons"):
        assert fact in prose


@pytest.mark.usefixtures("no_figures")
def test_another_margin_is_said(tmp_path, report):
    units = load_units(sweeps.write(tmp_path / "a", report.space, lambda one: one["recovery"] == "dense"))
    other = make_report("a", report.rows, units, report.space, Margin(0.25, 0.0))
    prose = " ".join(page_of(other).texts("p", **{"class": "prose"}))
    assert "the margin, 0.25 perplexity;" in prose


def test_it_asks_nobody_for_anything(files, page):
    """Not by what it shows, nor by what could be smuggled in."""
    own = [
        value
        for _, attributes, _ in page.elements
        for key, value in attributes.items()
        if key in ("src", "href")
    ]
    assert all(one.startswith(("#", "data:", "figures/", "recipe")) for one in own)
    policy = next(own["content"] for _, own, _ in page.elements if own.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    text = files[PAGE].decode()
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", text)


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = [own["id"] for _, own, _ in page.elements if "id" in own]
    assert len(ids) == len(set(ids))
    for _, own, _ in page.elements:
        if (own.get("href") or "").startswith("#"):
            assert own["href"][1:] in ids


def test_size(files):
    assert len(files[PAGE]) < 500_000


def test_names_from_the_sweep_are_text(tmp_path):
    """As model, criterion, error, name of the sweep and protocol."""
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
    changes = {
        "model": hostile,
        "device_name": hostile,
        "evaluation_protocol": hostile,
        "model_hash": hostile,
    }
    made = [row(0, "dense"), row(1, "none", criterion="magnitude"), row(2), row(3, granularity="block")]
    made = [one | changes | ({"criterion": hostile} if n else {}) for n, one in enumerate(made)]
    made += [failed(9, hostile) | changes, row(10, "none", model="other")]
    rows = frame(tmp_path / "a", made)
    report = make_report(hostile, rows, load_units(tmp_path / "a"))
    text = report_files(report)[PAGE].decode()
    page = Page(text)
    assert [tag for tag, _, _ in page.elements].count("script") == 2
    assert not [own for _, own, _ in page.elements if any(name.startswith("on") for name in own)]
    assert "img" not in [tag for tag, _, _ in page.elements]
    assert page.texts("h1") == [hostile]
    assert hostile in page.texts("dl", **{"class": "origins"})[0]
    assert hostile in " ".join(page.texts("li"))
    assert "</script><script>alert" not in text
    assert html.escape(hostile, quote=False)[:30] in text
    assert any(hostile in str(value) for one in page.trials["rows"] for value in one)


PARTS = {
    "dense": (lambda one: one["recovery"] == "dense", "nothing to compare"),
    "pruned": (lambda one: one["recovery"] in ("dense", "none"), "No reconstruction"),
    "no dense": (lambda one: one["recovery"] != "dense", "No dense model"),
    "no pruned": (lambda one: one["recovery"] != "none", "what recovery wins back cannot be told"),
    "no retraining": (lambda one: one["recovery"] != "retrain", "No retraining"),
    "one seed": (lambda one: one.get("calibration_seed") in (None, 0), "One seed"),
    "one rate": (lambda one: one["learning_rate"] in (None, 1e-3), "with one learning rate"),
}


@pytest.fixture
def no_figures(monkeypatch):
    """They are drawn in their own tests, of the same parts."""
    monkeypatch.setattr(render, "panels", lambda report: iter(()))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("no_figures")
def test_a_part_of_a_sweep_says_what_is_missing(tmp_path, part):
    keep, sentence = PARTS[part]
    made = sweeps.space()
    folder = sweeps.write(tmp_path / "a", made, lambda one: one["sparsity"] != 0.5 and keep(one))
    report = report_of(folder)
    page = page_of(report)
    told = page.texts("aside")[0]
    assert sentence in told
    planned = len(made.expand())
    assert f"{planned - len(report.rows)} planned trials without a row" in told
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())
    assert len(page.trials["rows"]) == len(report.rows)


@pytest.mark.usefixtures("no_figures")
def test_failures_and_several_models(tmp_path):
    made = sweeps.space(
        model={"path": ["builtin:pystdlib", "org/other"]},
        sweep=[
            {"recovery": "none", "criterion": "wanda", "pattern": "2:4"},
            {
                "recovery": "reconstruct",
                "criterion": "wanda",
                "pattern": "2:4",
                "granularity": "block",
                "learning_rate": [1e-3, 1e-1],
            },
        ],
    )
    report = report_of(sweeps.write(tmp_path / "a", made))
    page = page_of(report)
    assert "6 trials failed" in page.texts("aside")[0]
    assert page.texts("strong").count("wanda 2:4 block lr=0.1") == 2  # those of other seeds say so
    told = page.texts("p", **{"class": "kicker"})
    assert {text.split(",")[0] for text in told[1:]} == {"builtin:pystdlib", "org/other"}
    assert all(text.endswith("2:4") for text in told[1:])


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("seeds", "told"), [((0,), True), ((0, 1, 2), False)])
def test_a_recipe_of_too_few_seeds_says_so(tmp_path, seeds, told):
    made = [one for one in sweeps.rows_of(sweeps.space()) if one.get("calibration_seed") in (None, *seeds)]
    text = page_of(make_report("a", frame(tmp_path / "a", made), load_units(tmp_path / "a"))).text
    assert ("It is the best one by 1 seed; from 3 on" in text) == told
    assert "over at least 3 seeds" in text


@pytest.mark.usefixtures("no_figures")
def test_without_validation_or_space_it_says_so(tmp_path):
    made = [
        one | {"validation_perplexity": None}
        for one in sweeps.rows_of(sweeps.space())
        if one["sparsity"] != 0.5
    ]
    report = make_report("a", frame(tmp_path / "a", made), load_units(tmp_path / "a"))
    assert any("No validation_perplexity" in one for one in gaps(report))
    assert any("no space.yaml" in one for one in gaps(report))
    assert "No recipe" in page_of(report).text


def test_what_is_there_is_not_called_missing(report):
    known = ("better one may lie beyond", "No retraining of the same masks in as much device time as")
    assert [one for one in gaps(report) if not any(words in one for words in known)] == []


def no_units(folder):
    return load_units(write_sweep(folder / "none", [row(0)]))


@pytest.mark.parametrize(
    ("numbers", "places"),
    [
        ((0.0, -0.1, 0.1), (50.0, 37.5, 62.5, 0)),
        ((0.05, NAN, NAN), (56.25, None, None, 0)),
        ((2.0, 1.9, 2.1), (100.0, 100.0, 100.0, 1)),
        ((-0.35, -0.5, -0.2), (6.25, 0.0, 25.0, 0)),
    ],
)
def test_the_picture_of_an_interval(numbers, places):
    difference, low, high = numbers
    made = Interval.of({"difference": difference, "low": low, "high": high, "margin": 0.1})
    assert made is not None
    assert (made.middle, made.low, made.high, made.beyond) == places
    assert made.band == 37.5


def test_written_again_it_replaces_its_own_and_nothing_else(tmp_path, report):
    target = tmp_path / "out"
    first = write_report(report, target)
    assert first[0] == target / PAGE
    assert {path for path in target.rglob("*") if path.is_file()} == {*first}
    (target / "notes.txt").write_text("mine")
    part = make_report("a", report.rows[report.rows["recovery"] == "dense"], no_units(tmp_path), report.space)
    assert write_report(part, target) == [target / PAGE]
    assert sorted(path.name for path in target.rglob("*") if path.is_file()) == [PAGE, "notes.txt"]


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path, report):
    (tmp_path / PAGE).write_text("<title>mine</title>")
    with pytest.raises(UsageError, match="is no report of raysweep"):
        write_report(report, tmp_path)
    assert (tmp_path / PAGE).read_text() == "<title>mine</title>"
