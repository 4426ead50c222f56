"""The page in a real browser: it sorts, filters, fits phones and desks, and asks nobody for anything."""

from __future__ import annotations

import pytest

from raysweep.analysis.page.folder import write_report
from raysweep.analysis.report import report_of
from tests.analysis import sweeps
from tests.browser import EXECUTABLE, Browser, browser

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium here")

COLUMN = "[...document.querySelectorAll('{table} tbody tr')].map(row => row.cells[{place}].textContent)"
SORTED = "document.querySelectorAll('{table} th')[{place}].getAttribute('aria-sort')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    report = report_of(sweeps.write(folder / "made-up", sweeps.space()))
    return write_report(report, folder / "out")[0]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_asks_nobody(chromium: Browser, page, width, dark):
    chromium.open(page, width, dark)
    assert chromium.eval("innerWidth") == width
    assert chromium.eval("document.documentElement.scrollWidth") <= width
    assert chromium.requests == [page.as_uri()]
    assert chromium.complaints == []
    light = chromium.eval(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128"
    )
    assert light is not dark
    figure = "getComputedStyle(document.querySelector('figure text')).fill"
    assert chromium.eval(figure) == chromium.eval("getComputedStyle(document.querySelector('.note')).color")


def test_tables_sort_by_pointer_and_keyboard(chromium: Browser, page):
    chromium.open(page)
    table, place = "#cost table.sortable", 2
    values = COLUMN.format(table=table, place=place)
    chromium.eval(f"document.querySelectorAll('{table} th button')[{place}].click()")
    told = [
        float(value)
        for value in chromium.eval(values)[
            : chromium.eval(f"document.querySelector('{table}').tBodies[0].rows.length")
        ]
    ]
    assert told == sorted(told)
    assert chromium.eval(SORTED.format(table=table, place=place)) == "ascending"
    chromium.eval(f"document.querySelectorAll('{table} th button')[{place}].focus()")
    chromium.press("Enter", 13)
    assert chromium.eval(SORTED.format(table=table, place=place)) == "descending"
    told = [float(value) for value in chromium.eval(values)[: len(told)]]
    assert told == sorted(told, reverse=True)


def test_what_is_not_there_comes_last_either_way(chromium: Browser, page):
    chromium.open(page)
    head = "document.querySelectorAll('#all-trials th button')[8]"
    for _ in range(2):
        chromium.eval(f"{head}.click()")
        assert "\N{EN DASH}" not in chromium.eval(COLUMN.format(table="#all-trials", place=8))
    assert chromium.eval("document.querySelectorAll('#all-trials th[aria-sort]').length") == 1


def test_trials_filter_and_come_in_portions(chromium: Browser, page):
    chromium.open(page)
    labels, told = (
        COLUMN.format(table="#all-trials", place=0),
        "document.querySelector('.tools output').textContent",
    )
    number = len(sweeps.space().expand())
    assert chromium.eval(told) == f"{number} trials"
    assert len(chromium.eval(labels)) == 50
    chromium.eval("document.querySelector('.more button').click()")
    assert len(chromium.eval(labels)) == 100
    chromium.eval("document.querySelector('.tools input').focus()")
    chromium.call("Input.insertText", text="WANDA 0.6 subblock")
    found = chromium.eval(labels)
    assert len(found) == 12
    assert all({"wanda/row", "0.6", "subblock"} <= set(label.split()) for label in found)
    assert chromium.eval(told) == f"12 of {number} trials"
    assert chromium.eval("document.querySelector('.more').hidden") is True
    chromium.eval("document.querySelector('.tools input').value = ''")
    choose = "(() => { const one = document.querySelector(\"select[aria-label='method']\"); one.value = 'retraining'; "
    chromium.eval(choose + "one.dispatchEvent(new Event('change')); })()")
    assert chromium.eval(told) == f"72 of {number} trials"
    assert {*chromium.eval(COLUMN.format(table="#all-trials", place=2))} == {"retraining"}


def test_copying_says_so(chromium: Browser, page):
    chromium.open(page)
    chromium.eval("document.querySelector('.command .copy').click()")
    assert (
        chromium.eval(
            "new Promise(done => setTimeout(() => done(document.querySelector('.command .copy').textContent), 300))"
        )
        == "Copied"
    )
