"""What this machine has made before and keeps in its cache, by all that it depends on."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError, first_line
from raysweep.results.atomic import write_atomically

ROOM = 512 << 20  # bytes of a folder of the cache: what was used last stays
UNSETTLED_S = 2.0  # within which a file system may give two changes the same time

log = logging.getLogger(__name__)

Mark = list[str | int]
"""Of a file: where it is, its place on the device, its size and its times."""


def marks_of(paths: Iterable[Path]) -> list[Mark]:
    """Of the contents of files in this order, without reading them: what rewrites or replaces one changes its mark.

    Raises OSError, also for a file that was changed just now, since another change might leave its marks as they are.
    """
    return [_mark_of(path) for path in paths]


def _mark_of(path: Path) -> Mark:
    seen = path.stat()
    if time.time() - max(seen.st_mtime, seen.st_ctime) < UNSETTLED_S:
        raise OSError(f"{path} was changed just now")
    marks = [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
    return [str(path.absolute()), str(path.resolve()), *marks]


def made_by(*libraries: str) -> dict[str, Any]:
    """This package's code that reads models and text, and the versions of Python and of libraries that are there.
    Raises OSError as `marks_of`."""
    code = marks_of(sorted(Path(__file__).parent.glob("*.py")))
    versions = {name: _version(name) for name in libraries}
    return {"code": code, "versions": versions | {"python": platform.python_version()}}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def read(path: Path) -> bytes | None:
    """A file of the cache, which counts as used now; None where it is not there."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with suppress(OSError):
        os.utime(path)
    return content


def keep(path: Path, content: bytes) -> None:
    """Writes a file of the cache, where that is possible: nothing fails for it. Those used longest ago go."""
    try:
        write_atomically(path, content, survives_crashes=False)
    except RaysweepError as error:
        log.info("%s is not kept: %s", path.name, first_line(error))
        return
    with suppress(OSError):  # of another launch that does the same
        taken = 0
        for seen, file in sorted(
            ((file.stat(), file) for file in path.parent.iterdir()), key=_used, reverse=True
        ):
            taken += seen.st_size
            if taken > ROOM:
                file.unlink(missing_ok=True)


def _used(found: tuple[os.stat_result, Path]) -> int:
    return found[0].st_mtime_ns
