"""Puts the page together, with the files that lie beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from raysweep import __version__
from raysweep.analysis.figures import svg
from raysweep.analysis.figures.panels import KINDS, TITLES, panels, slugs
from raysweep.analysis.figures.style import styled
from raysweep.analysis.page import tables, words
from raysweep.analysis.page.findings import findings, method_in_words
from raysweep.analysis.page.gaps import gaps
from raysweep.analysis.page.origins import origins
from raysweep.analysis.recipe import LEAST_SEEDS
from raysweep.analysis.report import Report
from raysweep.analysis.settings import QUALITY

PAGE, FIGURES = "index.html", "figures"
GENERATOR = "raysweep report"  # by which a page of ours is known
MOST_LISTED = 200  # failures and missing trials that the page names


@dataclass(frozen=True)
class Shown:
    """A figure on the page. name: of its files"""

    name: str
    title: str
    image: str
    note: str


def report_files(report: Report, folder: str = "") -> dict[str, bytes]:
    """By path within a folder all that `raysweep report` writes: figures and recipes, and last the page itself.

    folder: its name, in the commands that the page shows
    """
    drawn: dict[str, list[Shown]] = {kind: [] for kind in KINDS}
    made: dict[str, bytes] = {}
    with styled():
        for place, panel in enumerate(panels(report)):
            text = svg.svg_text(panel.figure)
            made[f"{FIGURES}/{panel.name}.svg"] = text.encode()
            made[f"{FIGURES}/{panel.name}.png"] = svg.png_bytes(panel.figure)
            image = svg.inline(text, f"figure{place}", panel.title, panel.tips)
            drawn[panel.kind].append(Shown(panel.name, panel.title, image, panel.note))
    recipes = _recipes(report, folder)
    made |= {one["file"]: one["yaml"].encode() for one in recipes if one["yaml"]}
    return made | {PAGE: _page(report, drawn, recipes).encode()}


def _page(report: Report, drawn: dict[str, list[Shown]], recipes: list[dict[str, Any]]) -> str:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = Markup  # of our own making: what came from the sweep is escaped in it
    script = _source("page.js")
    return environment.get_template("page.html.j2").render(
        report=report,
        generator=f"{GENERATOR} {__version__}",
        style=Markup(_source("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=_facts(report),
        questions=findings(report),
        method=method_in_words(report),
        gaps=gaps(report),
        recipes=recipes,
        least_seeds=LEAST_SEEDS,
        figures=drawn,
        figure_titles=TITLES,
        front=tables.front_table(report),
        costs=tables.cost_table(report),
        ratios=tables.ratio_table(report),
        rates=tables.rate_table(report),
        trials=Markup(_data(tables.trial_data(report))),
        trial_count=len(report.rows),
        failed=report.failed,
        missing=report.missing,
        most_listed=MOST_LISTED,
        origins=origins(report),
        words=words,
    )


def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _data(document: dict[str, Any]) -> str:
    """JSON that can stand in a script element, whatever its texts are."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _facts(report: Report) -> list[tuple[str, str]]:
    """The numbers at the head of the page, with what they are."""
    states = report.rows["status"].value_counts()
    said = [(f"{int(states.get('finished', 0)):,}", "trials finished")]
    said += [(f"{int(states[state]):,}", state) for state in ("failed", "stopped") if states.get(state, 0)]
    said += [(f"{len(report.missing):,}", "not run yet")] if report.missing else []
    dense = report.rows[(report.rows["recovery"] == "dense") & (report.rows["status"] == "finished")]
    values = dense[QUALITY].dropna()
    if len(values) == 1:
        said.append((words.perplexity(float(values.iloc[0])), "perplexity of the dense model"))
    if len(report.comparisons):
        decided = int((report.comparisons["verdict"] != "undecided").sum())
        said.append((f"{decided} of {len(report.comparisons)}", "comparisons decided"))
    return said


def _named(report: Report, trial_id: str) -> str:
    """SWEEP:TRIAL, where it is of one sweep: others may have the trial, too."""
    return trial_id if report.space is None else f"{report.space.name}:{trial_id}"


def _recipes(report: Report, folder: str) -> list[dict[str, Any]]:
    names, several = slugs(report.strata), len(report.recipes) > 1
    made: list[dict[str, Any]] = []
    for row in report.recipes.to_dict("records"):
        stratum = row["stratum"]
        file = f"recipe-{names[stratum]}.yaml" if several else "recipe.yaml"
        made.append(
            {str(name): value for name, value in row.items()}
            | {
                "words": report.strata[stratum],
                "file": file,
                "launch": shlex.join(["raysweep", "launch", f"{folder}/{file}" if folder else file]),
                "yaml": row["yaml"] if isinstance(row["yaml"], str) else None,
                "export": f"raysweep export {_named(report, row['trial_id'])} --output pruned-model",
            }
        )
    return made
