"""`raysweep report`: a sweep's answers as a page with figures, in a folder."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.cli.console import output, print_json, say
from raysweep.cli.results import only_sweep
from raysweep.config.paths import typed_path
from raysweep.errors import UsageError
from raysweep.results.folders import sweep_folder
from raysweep.results.uris import is_uri, place_of

if TYPE_CHECKING:
    from raysweep.analysis.paired import Margin

MOST_PERCENT = 100


def run_report(
    name: str | None,
    target: str | None,
    margin: float,
    margin_percent: float,
    storage: str | None,
    as_json: bool,
) -> None:
    margins = checked_margin(margin, margin_percent)
    folder = sweep_folder(name or only_sweep(storage), storage)
    place = _target(target, folder)
    from raysweep.analysis.page.folder import check_folder, write_report
    from raysweep.analysis.report import report_of

    check_folder(place)
    report = report_of(folder, margin=margins)
    written = write_report(report, place)
    verdicts = Counter(map(str, report.comparisons["verdict"]))
    if as_json:
        document = {
            "sweep": report.name,
            "folder": place_of(folder),
            "page": str(written[0].absolute()),
            "files": [str(path.absolute()) for path in written[1:]],
            "verdicts": verdicts,
        }
        print_json(document)
        return
    _show(verdicts, written)


def checked_margin(absolute: float, percent: float) -> Margin:
    """Raises UsageError for what is no margin."""
    from raysweep.analysis.paired import Margin

    for option, value, allowed in (
        ("--margin", absolute, "a number from 0"),
        ("--margin-percent", percent, f"a number from 0 to below {MOST_PERCENT}"),
    ):
        beyond = option == "--margin-percent" and value >= MOST_PERCENT
        if not math.isfinite(value) or value < 0 or beyond:
            raise UsageError(f"{value:g} is no margin", where=option, allowed=allowed)
    if not absolute and not percent:
        raise UsageError(
            "--margin and --margin-percent are both 0: then nothing could ever be called equivalent",
            allowed="a number above 0 for one of them",
            remedy="Say which difference would not matter to you; the default is 0.1 perplexity or 1 %.",
        )
    return Margin(absolute, percent / 100)


def _target(target: str | None, sweep: Path) -> Path:
    if target is None:
        return Path(f"{sweep.resolve().name}-report")
    if is_uri(target):
        raise UsageError(
            f"{target!r} is no folder of this machine",
            where="--output",
            allowed="a folder",
            remedy="Write the report here and copy it: it is a folder of plain files.",
        )
    return typed_path(target, "--output")


def _show(verdicts: Counter[str], written: list[Path]) -> None:
    from rich.text import Text

    told = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common())
    figures = sum(path.suffix == ".svg" for path in written)
    recipes = sum(path.suffix == ".yaml" for path in written)
    say(f"Verdicts: {told}" if told else "Nothing to compare yet")
    say(f"{figures} figures as PNG and SVG, {recipes} recipe{'' if recipes == 1 else 's'} and the page:")
    output().print(Text(str(written[0])), soft_wrap=True)
