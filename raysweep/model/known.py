"""What this machine has made before and keeps in its cache, by all that it depends on."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError, first_line
from raysweep.results.writer import write_atomically

MOST = 200  # files of a kind that are kept: the ones written last

log = logging.getLogger(__name__)


def marks_of(path: Path) -> list[int]:
    """Of a file's contents, without reading them: any change of them changes one of these. Raises OSError."""
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]


def made_by(*libraries: str) -> dict[str, Any]:
    """This package's code that reads models and text, and the versions of libraries."""
    code = {path.name: marks_of(path) for path in Path(__file__).parent.glob("*.py")}
    return {"code": code, "versions": {name: version(name) for name in libraries}}


def keep(path: Path, content: bytes) -> None:
    """Writes a file of the cache, where that is possible: nothing fails for it. Old ones of its folder go."""
    try:
        write_atomically(path, content, survives_crashes=False)
        kept = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda file: file.stat().st_mtime_ns)
        for old in kept[:-MOST]:
            old.unlink(missing_ok=True)
    except (OSError, RaysweepError) as error:
        log.info("%s is not kept: %s", path.name, first_line(error))
