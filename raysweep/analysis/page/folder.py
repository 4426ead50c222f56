"""Where a report lies: a folder that holds the page, its figures and recipes, and nothing else that is overwritten."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from raysweep.analysis.page.render import FIGURES, GENERATOR, PAGE, report_files
from raysweep.analysis.report import Report
from raysweep.errors import UsageError

OURS = (f"{FIGURES}/*.svg", f"{FIGURES}/*.png", "recipe*.yaml")  # beside the page


def check_folder(folder: Path) -> None:
    """Makes the folder of a report. Raises UsageError where it cannot be written, or where another page lies there."""
    page = folder / PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
        foreign = page.exists() and not _is_ours(page)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if foreign:
        raise UsageError(
            f"{page} is no report of raysweep, and would be overwritten",
            where="--output",
            remedy="Name another folder, or move that page.",
        )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes a report, in place of an earlier one; returns its files, the page first. Raises UsageError."""
    check_folder(folder)
    made = report_files(report, folder.absolute().name)
    written = {folder / name for name in made}
    try:
        if (folder / PAGE).exists():  # its figures may be of strata that are no more
            for old in {path for pattern in OURS for path in folder.glob(pattern)} - written:
                old.unlink()
        for name, content in made.items():  # the page comes last: what it shows is there
            _replace(folder / name, content)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return [folder / PAGE, *sorted(written - {folder / PAGE})]


def _is_ours(page: Path) -> bool:
    with open(page, "rb") as stream:
        return f'content="{GENERATOR}'.encode() in stream.read(4096)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name[-40:]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{error.filename or folder} cannot be written: {error.strerror or error}",
        where="--output",
        remedy="Name a folder that can be written, or one that is not there yet.",
    )
