"""Documents and ready-made token rows from every source: built-in, file, folder, Hugging Face data set."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.config.paths import typed_path
from raysweep.errors import UsageError, first_line, nearest_name
from raysweep.model.builtin import builtin_text_folder, is_builtin
from raysweep.model.hub_ids import is_hub_id

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]

TEXT_COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".txt")  # of a folder only the first kind that is present is read
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    dataset:    `builtin:NAME`; a file (.parquet or .jsonl with a column `text`, .txt as one document,
                .parquet with a column `input_ids` as ready-made samples); a folder of such files; a Hugging
                Face id
    config:     configuration of a Hugging Face data set
    data_files: files of a Hugging Face data set, as its library takes them
    split:      split of a data set or folder. A single file has no splits: it is read whatever the split
    """

    dataset: str
    config: str | None = None
    data_files: DataFiles | None = field(default=None, hash=False)
    split: str = "train"

    @property
    def is_file(self) -> bool:
        """Whether the text is read from files of this machine without the `datasets` library."""
        if is_builtin(self.dataset):
            return True
        if self.config is not None or self.data_files is not None:
            return False
        return _looks_like_path(self.dataset) or os.path.exists(self.dataset)

    def __str__(self) -> str:
        name = self.dataset if self.config is None else f"{self.dataset}/{self.config}"
        return f"{name} (split {self.split})"


def load_documents(source: TextSource, characters: int | None = None) -> Iterator[str]:
    """The documents of `source` in order; rows without text (null) are left out.

    characters: stop after the document that brings the sum of lengths to this number; None reads everything.
    Files and data sets are read only as far as that. Raises UsageError when the source cannot be read, has no
    column `text`, or has no text at all.
    """
    total, blank = 0, True
    for document in _documents(source):
        blank = blank and not document.strip()
        yield document
        total += len(document)
        if characters is not None and total >= characters:
            break
    if blank:
        raise UsageError(f"no text in {source}", where="dataset", remedy="name a data set that holds some")


def source_files(source: TextSource) -> list[Path]:
    """The files of a built-in or local source that belong to its split, in order of their names.

    Raises UsageError for a missing path, an unknown file type or a split without files.
    """
    if is_builtin(source.dataset):
        return _split_files(builtin_text_folder(source.dataset), source)
    path = typed_path(source.dataset, "data set")
    if not path.exists():
        raise UsageError(
            f"no such file or folder: {source.dataset}",
            where="dataset",
            remedy="check the path of the data set",
        )
    if path.is_dir():
        return _split_files(path, source)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot read text from {source.dataset}: unknown file type {path.suffix!r}",
            where="dataset",
            allowed=", ".join(SUFFIXES),
        )
    return [path]


def check_there(source: TextSource) -> None:
    """Raises UsageError, as reading would, where a source of this machine has no files."""
    if source.is_file:
        source_files(source)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises UsageError for a file that is no Parquet."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"cannot read {path} as Parquet: {first_line(error)}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the context, a file that is damaged, not UTF-8 or may not be read ends in a UsageError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"cannot read {path}: {first_line(error)}",
            remedy="check its permissions and whether it is complete",
        ) from error


def _documents(source: TextSource) -> Iterator[str]:
    if not source.is_file:
        yield from _hub_documents(source)
        return
    readers = {".parquet": _parquet_documents, ".jsonl": _json_documents, ".txt": _plain_document}
    for path in source_files(source):
        with reading(path):
            yield from readers[path.suffix](path)


def _parquet_documents(path: Path) -> Iterator[str]:
    file = open_parquet(path)
    _require_text_column(file.schema_arrow.names, str(path))
    try:
        for batch in file.iter_batches(batch_size=256, columns=[TEXT_COLUMN]):
            yield from _texts(batch.column(0).to_pylist(), str(path))
    finally:  # Arrow would keep what it has read
        pa.default_memory_pool().release_unused()


def _json_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}:{number}: not a line of JSON: {error}") from error
            for text in _texts([_text_field(row, f"{path}:{number}")], f"{path}:{number}"):
                _check_characters(text, f"{path}:{number}")
                yield text


def _check_characters(text: str, where: str) -> None:
    """JSON may spell halves of characters (an escaped surrogate alone), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: half a character, {text[error.start]!r}, at place {error.start}"
        ) from None


def _plain_document(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _hub_documents(source: TextSource) -> Iterator[str]:
    if os.path.isfile(source.dataset):
        raise UsageError(
            f"{source.dataset} is a file here, and config and data_files are of Hugging Face data sets",
            remedy="leave them out",
        )
    for row in _guarded(source, _hub_rows(source)):
        yield from _texts([_text_field(row, str(source))], str(source))


def _hub_rows(source: TextSource) -> Iterator[Any]:
    # Streaming fetches only what is iterated over; all splits are opened, lazily, to be able to name them.
    import datasets

    splits = datasets.load_dataset(
        source.dataset, source.config, data_files=source.data_files, streaming=True
    )
    if source.split not in splits:
        raise _unknown_split(source, list(splits))
    yield from splits[source.split]


def _guarded(source: TextSource, rows: Iterator[Any]) -> Iterator[Any]:
    """`rows`, with whatever the data set library raises turned into one short UsageError."""
    try:
        yield from rows
    except UsageError:
        raise
    except Exception as error:  # the library and its HTTP client raise a dozen unrelated types
        raise UsageError(
            f"cannot load {source}: {first_line(error)}",
            where="dataset",
            remedy=f"{source.dataset!r} was taken for a Hugging Face data set, being no file or folder here: "
            "check its id, config and data_files, HF_TOKEN if it is gated, and the network (HF_HUB_OFFLINE)",
        ) from error


def _text_field(row: Any, where: str) -> Any:
    _require_text_column(list(row) if isinstance(row, Mapping) else [], where)
    return row[TEXT_COLUMN]


def _texts(values: Iterable[Any], where: str) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise UsageError(f"column {TEXT_COLUMN!r} of {where} holds {type(value).__name__}, not text")


def _require_text_column(names: list[str], where: str) -> None:
    if TEXT_COLUMN not in names:
        raise UsageError(
            f"no column {TEXT_COLUMN!r} in {where}; its columns: {', '.join(map(str, names)) or 'none'}",
            where="dataset",
            remedy=f"rename the column that holds the documents to {TEXT_COLUMN!r}",
        )


def _split_files(folder: Path, source: TextSource) -> list[Path]:
    files = _readable_files(folder)
    if not files:
        raise UsageError(
            f"no {', '.join(SUFFIXES)} file in {source.dataset}",
            where="dataset",
            remedy="check the path of the data set",
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder), source.split), []).append(file)
    if source.split not in by_split:
        raise _unknown_split(source, sorted(by_split))
    return by_split[source.split]


def _readable_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for suffix in SUFFIXES:
        chosen = [path for path in found if path.suffix == suffix]
        if chosen:
            return chosen
    return []


def _split_of(relative: Path, wanted: str) -> str:
    """The split in a file's name or folders (`test.parquet`, `train-00000-of-00002`, `val/x`), else train."""
    for part in (*relative.parts[:-1], relative.stem):
        for split in (wanted, *SPLIT_NAMES):
            if re.fullmatch(rf"{re.escape(split)}([-_.].*)?", part):
                return split
    return "train"


def _unknown_split(source: TextSource, existing: list[str]) -> UsageError:
    return UsageError(
        f"no split {source.split!r} in {source.dataset}",
        where="split",
        allowed=", ".join(existing),
        nearest=nearest_name(source.split, existing),
    )


def _looks_like_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES:
        return True
    return not is_hub_id(name)
