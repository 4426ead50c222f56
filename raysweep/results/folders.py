"""Where sweeps lie: STORAGE/NAME/{trials,units}, and how NAME and STORAGE are found.

The folder of a storage that a URI names is its mirror (raysweep.results.mirror), which is imported where it is needed:
names of folders are asked for without pyarrow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysweep.config.paths import typed_path
from raysweep.config.validation import check_name
from raysweep.errors import StorageError, UsageError, nearest_name
from raysweep.fingerprint import is_identity
from raysweep.results.uris import is_uri, mirror_folder, mirrored_uri, split_sweep

STORAGE_VARIABLE = "RAYSWEEP_STORAGE"
DEFAULT_STORAGE = "raysweep-results"
TRIALS, UNITS = "trials", "units"
TUNE, RETRAINING, UNFINISHED = "tune", "retraining", "unfinished"  # while they are needed; no results
ARTIFACTS = "artifacts"  # kept trials
TENSORBOARD, MLFLOW = "tensorboard", "mlflow"  # of trackers; the user's
PART_MARK = ".block-"
OUTSIDE = "outside"  # of the blocks: embedding, last norm, head
LOCK_FILE = "launch.lock"
SPACE_FILE, STATE_FILE, TRACE_FILE = "space.yaml", "status.json", "trace.json"
PLAN_FILE = "plan.json"  # what the last launch took, beside what was planned
COMPACTED = "0-compacted.parquet"
"""The rows of many trials, as `raysweep clean` puts them together. Sorts before the files of single trials: pandas
takes the columns of a folder from the first file, and this one has those of all its trials."""


def storage_folder(argument: str | Path | None = None, configured: str | None = None) -> Path:
    """The storage: the argument, else RAYSWEEP_STORAGE, else `execution.storage`, else the default. Of one that a URI
    names its mirror, which is made. Raises UsageError for a URI that cannot be used."""
    chosen = argument or os.environ.get(STORAGE_VARIABLE) or configured or DEFAULT_STORAGE
    return mirror_folder(str(chosen)) if is_uri(chosen) else typed_path(chosen, "storage")


def sweep_folder(path_or_name: str | Path, storage: str | Path | None = None) -> Path:
    """The folder of an existing sweep, given by its name in the storage, by its path or its URI; of a remote one its
    mirror, brought up to date. Raises UsageError."""
    text = os.fspath(path_or_name)
    if is_uri(text):
        storage, text = split_sweep(text)
    root, path = storage_folder(storage), typed_path(text, "sweep")
    if _is_plain_name(text):
        named = typed_path(root / text, "sweep")
        bring_up_to_date(named)
        if is_sweep(named):
            return named
    if is_sweep(path):
        return path
    known, shown = list_sweeps(root), mirrored_uri(root) or root
    raise UsageError(
        f"no sweep {text!r}" + (f" in {shown}" if _is_plain_name(text) else ""),
        allowed=f"a path, or one of {', '.join(known)}" if known else "the path of a sweep's folder",
        nearest=nearest_name(text, known),
        remedy=None
        if known
        else f"{shown} holds no sweep yet: run `raysweep launch`, or name another --storage",
    )


def list_sweeps(storage: Path) -> list[str]:
    """The names of the sweeps in a storage. Raises UsageError where a remote one cannot be reached."""
    if (uri := mirrored_uri(storage)) is not None:
        from raysweep.results.remote import Remote

        return Remote(uri).sweeps([SPACE_FILE, STATE_FILE, TRIALS])
    if not storage.is_dir():
        return []
    return sorted(
        folder.name for folder in storage.iterdir() if not folder.name.startswith(".") and is_sweep(folder)
    )


def bring_up_to_date(folder: Path) -> None:
    """Copies into the mirror of a remote sweep what is new in its storage; does nothing for other folders. Raises
    UsageError where the storage cannot be reached."""
    if mirrored_uri(folder.parent) is not None:
        from raysweep.results.mirror import pull

        pull(folder)


@contextmanager
def there_for_now(folder: Path) -> Iterator[None]:
    """The folder is there within the context. Folders that were made for that, and hold nothing then, are gone
    afterwards. Raises StorageError."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for each in made:
                each.rmdir()


def is_sweep(folder: Path) -> bool:
    return any((folder / part).exists() for part in (TRIALS, SPACE_FILE, STATE_FILE, LOCK_FILE))


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
    return folder / f"{unit}{PART_MARK}{block}.safetensors"


def across_file(folder: Path, unit: str) -> Path:
    """What is known of a unit that reaches over several shards; there once all its parts are."""
    return folder / f"{unit}.json"


def block_file(folder: Path, block: int | str) -> Path:
    """The file with the tensors of a block, or of what lies outside of all."""
    return folder / f"block-{block}.safetensors"


def unfinished_units(sweep: Path) -> int:
    """How many recovered units wait for their trials to be gone on with."""
    files = [path.name for path in (sweep / UNFINISHED).glob("*/*")]
    return sum(
        name.endswith(".json") or (name.endswith(".safetensors") and PART_MARK not in name) for name in files
    )


def row_files(folder: Path, part: str) -> Iterator[Path]:
    """The files of single trials in `trials` or `units`, sorted by name; all else that lies there is passed over."""
    place = folder / part
    names = sorted(os.listdir(place)) if place.is_dir() else []
    yield from (place / name for name in names if _is_row_file(name))


def is_sweep_file(name: str) -> bool:
    """Whether a file, by its name within a sweep's folder, is what others want of it: rows, space, state, trace."""
    part, _, file = name.rpartition("/")
    if part in (TRIALS, UNITS):
        return file == COMPACTED or _is_row_file(file)
    return name in (SPACE_FILE, STATE_FILE, TRACE_FILE)


def compacted_file(folder: Path, part: str) -> Path:
    """Where `raysweep clean` puts what the files of finished trials held, in `trials` or `units`."""
    return folder / part / COMPACTED


def has_rows(folder: Path) -> bool:
    """Whether a sweep's folder has a row of any trial."""
    return compacted_file(folder, TRIALS).exists() or any(row_files(folder, TRIALS))


def _is_row_file(name: str) -> bool:
    stem, _, suffix = name.partition(".")
    return suffix == "parquet" and is_identity(stem)


def _is_plain_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and os.sep not in text
