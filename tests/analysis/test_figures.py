"""Figures show the numbers of the report, in colors that the page can change, and stay small."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from raysweep.analysis.figures import fronts, svg
from raysweep.analysis.figures.panels import (
    DEPTH,
    HEAT,
    KINDS,
    MEMORY,
    RATES,
    RECOVERY,
    SECONDS,
    panels,
    slugs,
)
from raysweep.analysis.figures.style import VARIABLES, in_order, looks, round_numbers, styled, tick_words
from raysweep.analysis.report import Report, report_of
from tests.analysis import sweeps
from tests.analysis.rows import row, write_sweep


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(sweeps.write(tmp_path_factory.mktemp("figures") / "a", sweeps.space()))


@pytest.fixture(scope="module")
def drawn(report: Report) -> dict[str, tuple[str, str]]:
    """By name of every figure what its file holds, and its element of the page."""
    with styled():
        made = {panel.name: (panel, svg.svg_text(panel.figure)) for panel in panels(report)}
    return {name: (text, svg.inline(text, name, one.title, one.tips)) for name, (one, text) in made.items()}


def words_of(text: str) -> list[str]:
    """What is written in a figure."""
    return [
        "".join(element.itertext())
        for element in ElementTree.fromstring(text).iter()
        if "text" in element.tag
    ]


def markers(page: str) -> list[tuple[float, float, str]]:
    """Across, down and what is said of every marker."""
    found = []
    for body, said in re.findall(r"<(?:path|use) ([^>]*)><title>([^<]*)</title>", page):
        place = re.search(r'x="([0-9.]+)" y="([0-9.]+)"', body)
        corners = [place.groups()] if place else re.findall(r"([0-9.]+) ([0-9.]+)", body.split('"')[1])
        across, down = ([float(value) for value in values] for values in zip(*corners, strict=True))
        found.append(((min(across) + max(across)) / 2, (min(down) + max(down)) / 2, said))
    return found


def test_every_kind_for_every_stratum(drawn):
    strata = ("sparsity-0.5", "sparsity-0.6")
    assert list(drawn) == [f"{kind}-{stratum}" for kind in KINDS for stratum in strata]


def test_cells_of_the_heat_map_are_the_best_means(report, drawn):
    for stratum, slug in slugs(report.strata).items():
        mine = report.settings[report.settings["stratum"] == stratum]
        written = words_of(drawn[f"{HEAT}-{slug}"][0])
        best = mine.sort_values("validation_perplexity").drop_duplicates(["mask", "method"])
        for one in best.to_dict("records"):
            assert f"{one['perplexity']:.2f}" in written
            assert f"± {one['spread']:.3f}" in written  # three decimals, as written and not as drawn
        assert {*best["mask"]} <= {*written}


@pytest.mark.parametrize(("pruned", "told"), [(30.0, True), (10.5, False)])
def test_the_heat_map_says_where_its_colors_end(tmp_path, pruned, told):
    """What is only pruned may be far worse than all that is recovered, whose differences would then have one color."""
    made = [row(0, "none", perplexity=pruned), row(1, granularity="block"), row(2, granularity="matrix")]
    report = report_of(write_sweep(tmp_path / "a", made))
    panel = next(panel for panel in panels(report) if panel.kind == HEAT)
    assert ("the palest" in panel.note) is told


def test_points_tell_their_setting(report, drawn):
    page = drawn[f"{SECONDS}-sparsity-0.6"][1]
    told = [said for _, _, said in markers(page)]
    stratum = next(key for key, words in report.strata.items() if words == "sparsity 0.6")
    mine = report.settings[report.settings["stratum"] == stratum]
    assert sorted(one.split("\n")[0] for one in told) == sorted(mine["label"])
    for one in mine.to_dict("records"):
        said = next(text for text in told if text.split("\n")[0] == one["label"])
        assert f"perplexity {one['perplexity']:.2f}" in said


def test_points_lie_where_their_numbers_say(report, drawn):
    """Left is cheap, low is good: the order of places is that of costs."""
    page = drawn[f"{MEMORY}-sparsity-0.5"][1]
    places = markers(page)
    means = {one["label"]: one for one in report.settings.to_dict("records")}
    assert len(places) == 18
    by_place = sorted(places)
    costs = [means[said.split("\n")[0]]["peak_recovery_bytes"] for _, _, said in by_place]
    assert costs == sorted(costs)
    by_height = sorted(places, key=lambda place: -place[1])
    heights = [means[said.split("\n")[0]]["perplexity"] for _, _, said in by_height]
    assert heights == pytest.approx(sorted(heights), abs=0.01)


def test_the_front_names_its_masks(report, drawn):
    stratum = next(key for key, words in report.strata.items() if words == "sparsity 0.6")
    mine = report.settings[report.settings["stratum"] == stratum]
    assert mine["mask"].nunique() > 1
    named = [words for words in words_of(drawn[f"{SECONDS}-sparsity-0.6"][0]) if words in set(mine["mask"])]
    assert named
    assert {*named} <= {*mine.loc[mine["front"], "mask"]}


FRONTS = {
    "close to the dense model's line and words": (2, [(1, 20), (2, 15), (5, 11.4), (5.1, 10.3)]),
    "neighbors": (0, [(5 + n / 50, 30 - n / 10) for n in range(20)]),
    "far apart": (3, [(1, 30), (10, 22), (100, 16)]),
    "near the bottom": (1, [(1, 30), (2, 8.0), (3, 7.9)]),
}


@pytest.mark.parametrize(("named", "costs"), FRONTS.values(), ids=FRONTS)
def test_names_of_masks_lie_on_nothing_else(tmp_path, named, costs):
    """Where the texts of the figure really are."""
    made = [row(0, "dense", perplexity=10.0)]
    for number, (cost, perplexity) in enumerate(costs, start=1):
        criterion = ("wanda", "magnitude")[number % 2]
        values = {"perplexity": float(perplexity), "device_seconds_standalone": float(cost)}
        made.append(row(number, criterion=criterion, batch_size=number, **values))
    with styled():
        panel = next(
            one for one in panels(report_of(write_sweep(tmp_path / "a", made))) if one.kind == SECONDS
        )
        figure = panel.figure
        figure.draw_without_rendering()
        (axes,) = figure.axes
        boxes = {text: text.get_window_extent() for text in axes.texts}
        names = [text for text in axes.texts if text.get_text() in ("wanda/row", "magnitude/row")]
        points = axes.transData.transform([(cost, perplexity) for cost, perplexity in costs])
        line = axes.transData.transform((1, 10.0))[1]
    assert len(names) == named
    for name in names:
        box = boxes[name]
        assert not [other for other in axes.texts if other is not name and box.overlaps(boxes[other])]
        assert not [point for point in points if box.contains(*point)]
        assert not box.y0 <= line <= box.y1
        assert axes.bbox.x0 - 3 <= box.x0
        assert box.x1 <= axes.bbox.x1 + 3
        assert box.y0 >= axes.bbox.y0 - 1


def test_long_names_of_masks_keep_both_ends(tmp_path):
    made = [
        row(number, criterion=f"file:masks/{'m' * 40}/{name}.safetensors", **numbers)
        for number, name in enumerate(("first", "second"))
        for numbers in [{"perplexity": 9.0 - 5 * number, "device_seconds_standalone": 5.0 + 9 * number}]
    ]
    made.append(row(2, "dense", perplexity=1.0))
    panel = next(one for one in panels(report_of(write_sweep(tmp_path / "a", made))) if one.kind == SECONDS)
    with styled():
        written = words_of(svg.svg_text(panel.figure))
    cut = [words for words in written if "…" in words]
    assert len(set(cut)) == 2
    assert all(len(words) == 28 and words.startswith("file:mas…") for words in cut)


def test_names_only_where_masks_differ(tmp_path):
    made = [row(n, batch_size=n + 1, perplexity=9.0 - n, device_seconds_standalone=5.0 + n) for n in range(3)]
    panel = next(one for one in panels(report_of(write_sweep(tmp_path / "a", made))) if one.kind == SECONDS)
    with styled():
        assert "wanda/row" not in words_of(svg.svg_text(panel.figure))


def test_on_the_page_colors_are_variables_and_ids_are_its_own(drawn):
    """Text stays text, and nothing of a figure reaches beyond it."""
    known = {f"var(--{name})" for name in VARIABLES.values()}
    names: list[str] = []
    for text, page in drawn.values():
        assert "<text" in text
        used = set(re.findall(r"var\([^)]*\)", page))
        assert used
        assert used <= known
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", page)
        assert "<style" not in page
        ids = re.findall(r'\bid="([^"]*)"', page)
        names += ids
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)
    assert len(names) == len(set(names))


def test_the_style_sheet_has_every_color_in_light_and_dark():
    style = (Path(svg.__file__).parents[1] / "page" / "page.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark")[0], style.split("prefers-color-scheme: dark")[1]
    for color, name in VARIABLES.items():
        assert f"--{name}: {color};" in light, name  # files and the page look alike
        assert re.search(rf"--{name}: (#\w{{6}});", dark)[1] != color, name


def test_the_same_report_gives_the_same_files(report):
    with styled():
        first = [(svg.svg_text(panel.figure), svg.png_bytes(panel.figure)) for panel in panels(report)][:2]
        again = [(svg.svg_text(panel.figure), svg.png_bytes(panel.figure)) for panel in panels(report)][:2]
    assert first == again


def test_thousands_of_settings_stay_light_and_keep_the_front(tmp_path, monkeypatch):
    monkeypatch.setattr(fronts, "MOST_POINTS", 60)
    made = [
        row(number, batch_size=number + 1, perplexity=10.0 + (number * 37 % 500) / 50) | cost
        for number in range(500)
        for cost in [{"device_seconds_standalone": 5.0 + (number * 91 % 499)}]
    ]
    near = {"perplexity": 9.9001, "device_seconds_standalone": 4.0001}
    best = {
        "perplexity": 9.9,
        "device_seconds_standalone": 4.0,
    }  # alone on the front, and on top of the other
    made += [row(500, batch_size=501) | near, row(501, batch_size=502) | best]
    report = report_of(write_sweep(tmp_path / "a", made))
    panel = next(panel for panel in panels(report) if panel.kind == SECONDS)
    told = [one.split("\n")[0] for words in panel.tips.values() for one in words]
    assert len(told) <= 60
    assert {*report.settings.loc[report.settings["front"], "label"]} <= {*told}
    assert f"{502 - len(told)} of 502 settings" in panel.note


@pytest.mark.parametrize(
    ("keep", "kinds"),
    [
        (lambda one: one["recovery"] == "dense", set()),
        (lambda one: one["recovery"] in ("dense", "none"), {SECONDS, HEAT, DEPTH}),
        (lambda one: one["recovery"] != "none", set(KINDS) - {RECOVERY}),
        (lambda one: one["learning_rate"] in (None, 1e-3), set(KINDS) - {RATES}),
        (lambda one: one.get("calibration_seed") in (None, 0), set(KINDS)),
    ],
    ids=["dense", "pruned", "recovered", "one rate", "one seed"],
)
def test_what_there_are_no_numbers_for_is_not_drawn(tmp_path, keep, kinds):
    report = report_of(
        sweeps.write(tmp_path / "a", sweeps.space(), lambda one: one["sparsity"] != 0.5 and keep(one))
    )
    with styled():
        assert {panel.kind for panel in panels(report)} == kinds


def test_names_from_the_sweep_do_no_harm(tmp_path):
    hostile = "<b>$\\frac{1}{0}$ & \x07 \N{SNOWMAN}"
    made = [
        row(n, "none", sparsity=0.1 * n + 0.1) | {"model": hostile, "criterion": hostile} for n in range(2)
    ]
    made += [row(9, "none", model="other", sparsity=0.1)]
    report = report_of(write_sweep(tmp_path / "a", made))
    with styled():
        for panel in panels(report):
            text = svg.svg_text(panel.figure)
            ElementTree.fromstring(text)
            ElementTree.fromstring(svg.inline(text, "a", "b").replace("xlink:href", "href"))
            assert svg.png_bytes(panel.figure).startswith(b"\x89PNG")
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+", name) for name in slugs(report.strata).values())


def test_names_of_files_differ():
    assert [*slugs({"a": "2:4", "b": "2 4", "c": "2-4", "d": "../..", "e": "2-4-2"}).values()] == [
        "2-4",
        "2-4-2",
        "2-4-3",
        "sweep",
        "2-4-2-2",
    ]


def test_methods_have_one_order_and_looks_of_their_own():
    names = [
        "retraining",
        "window:4",
        "model",
        "matrix exact",
        "window:2",
        "subblock",
        "pruned only",
        "matrix",
    ]
    ordered = [
        "pruned only",
        "matrix",
        "matrix exact",
        "subblock",
        "window:2",
        "window:4",
        "model",
        "retraining",
    ]
    assert in_order(names) == ordered
    shown = looks(names)
    assert len({(look.color, look.marker) for look in shown.values()}) == len(names)
    assert looks(["block"])["block"] == looks(["matrix", "block"])["block"]


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [((1, 1000), [1, 10, 100, 1000]), ((9, 80), [10, 20, 50]), ((1e-4, 3e-3), [1e-4, 3e-4, 1e-3, 3e-3])],
)
def test_ticks_are_round(ends, ticks):
    assert round_numbers(*ends) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (1e-4, "1e-4"),
        (2.5e-4, "2.5e-4"),
        (0.01, "0.01"),
        (9.5, "9.5"),
        (20000, "20,000"),
        (3e7, "3e7"),
    ],
)
def test_ticks_in_words(value, words):
    assert tick_words(value) == words
