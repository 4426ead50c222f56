"""Where sweeps lie: STORAGE/NAME/{trials,units}, and how NAME and STORAGE are found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from raysweep.config.paths import typed_path
from raysweep.config.validation import check_name
from raysweep.errors import UsageError, nearest_name
from raysweep.fingerprint import is_identity

STORAGE_VARIABLE = "RAYSWEEP_STORAGE"
DEFAULT_STORAGE = "raysweep-results"
TRIALS, UNITS = "trials", "units"
TUNE, RETRAINING, UNFINISHED = "tune", "retraining", "unfinished"  # while they are needed; no results
SPACE_FILE, STATE_FILE = "space.yaml", "status.json"


def storage_folder(argument: str | Path | None = None, configured: str | None = None) -> Path:
    """The storage: the argument, else RAYSWEEP_STORAGE, else `execution.storage`, else the default."""
    chosen = argument or os.environ.get(STORAGE_VARIABLE) or configured or DEFAULT_STORAGE
    return typed_path(chosen, "storage")


def sweep_folder(path_or_name: str | Path, storage: str | Path | None = None) -> Path:
    """The folder of an existing sweep, given by its name in the storage or by its path. Raises UsageError."""
    text, root = os.fspath(path_or_name), storage_folder(storage)
    path = typed_path(text, "sweep")
    if _is_plain_name(text) and is_sweep(named := typed_path(root / text, "sweep")):
        return named
    if is_sweep(path):
        return path
    known = list_sweeps(root)
    raise UsageError(
        f"no sweep {text!r}" + (f" in {root}" if _is_plain_name(text) else ""),
        allowed=f"a path, or one of {', '.join(known)}" if known else "the path of a sweep's folder",
        nearest=nearest_name(text, known),
        remedy=None
        if known
        else f"{root} holds no sweep yet: run `raysweep launch`, or name another --storage",
    )


def list_sweeps(storage: Path) -> list[str]:
    """The names of the sweeps in a storage."""
    if not storage.is_dir():
        return []
    return sorted(
        folder.name for folder in storage.iterdir() if not folder.name.startswith(".") and is_sweep(folder)
    )


def is_sweep(folder: Path) -> bool:
    return any((folder / part).exists() for part in (TRIALS, SPACE_FILE, STATE_FILE))


def new_sweep_folder(name: str, storage: Path) -> Path:
    """Where the sweep `name` belongs; makes nothing."""
    return storage / check_name(name)


def unfinished_folder(sweep: Path, identity: str) -> Path:
    """Where the recovered units and evaluated batches of a trial are kept until it has its row, and the units of start
    weights until they are written.

    identity: the trial's, whose rows depend on the texts too; of start weights theirs
    """
    return sweep / UNFINISHED / identity


def unit_file(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.safetensors"


def part_file(folder: Path, unit: str, block: int) -> Path:
    """Of a unit that reaches over several shards, what lies in one block."""
    return folder / f"{unit}.block-{block}.safetensors"


def across_file(folder: Path, unit: str) -> Path:
    """What is known of a unit that reaches over several shards; there once all its parts are."""
    return folder / f"{unit}.json"


def row_files(folder: Path, part: str) -> Iterator[Path]:
    """The files of `trials` or `units`, sorted by name; anything else that lies there is passed over."""
    place = folder / part
    names = sorted(os.listdir(place)) if place.is_dir() else []
    for name in names:
        stem, _, suffix = name.partition(".")
        if suffix == "parquet" and is_identity(stem):
            yield place / name


def _is_plain_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and os.sep not in text
