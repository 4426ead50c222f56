"""Shapes of models that were read before: to see what a model is made of, and whether it can be pruned at all, it is
built without weights, which takes seconds, and most of them are for importing its code."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raysweep.errors import RaysweepError, UsageError, first_line
from raysweep.fingerprint import fingerprint
from raysweep.model.loading import CONFIG, INDEX, SINGLE, Checkpoint, ModelSource
from raysweep.model.shape import BlockShape, ModelShape, read_shape, warn_of_unused
from raysweep.results.uris import cache_folder
from raysweep.results.writer import write_atomically

FOLDER = "shapes"
READ_WITH = ("torch", "transformers", "accelerate", "safetensors")
MOST = 200  # shapes that are kept: the ones read last

log = logging.getLogger(__name__)


def known_shape(source: ModelSource, dtype: str = "auto") -> ModelShape:
    """As `read_shape`, which runs only for models that it has not seen: of other files, or by other code.

    Files are told apart by size, time and number, without reading them; a shape is no part of an identity. A model with
    code of its own is always read. Raises UsageError.
    """
    kept = _file(source, dtype)
    if kept is not None and (shape := _read(kept)) is not None:
        warn_of_unused(shape, source)
        return shape
    shape = read_shape(source, dtype)
    if kept is not None:
        _write(kept, shape)
    return shape


def _file(source: ModelSource, dtype: str) -> Path | None:
    """Where the shape of a model is kept; None where its files do not determine it, or are not all there."""
    if source.trust_remote_code:
        return None
    try:
        checkpoint = Checkpoint.open(source)
        weights = checkpoint.file_names() if source.is_local else []
        listed = SINGLE if SINGLE in checkpoint.file_names() else INDEX
        found = {name: checkpoint.find(name) for name in (CONFIG, listed, *weights)}
        if found[CONFIG] is None:
            return None
        files = {name: _marks(Path(path)) for name, path in found.items() if path is not None}
    except (UsageError, OSError):  # whoever reads the model says so at length
        return None
    code = {path.name: _marks(path) for path in Path(__file__).parent.glob("*.py")}
    versions = {name: version(name) for name in READ_WITH}
    asked = {"dtype": dtype, "path": source.location, "files": files, "code": code, "versions": versions}
    return cache_folder() / FOLDER / f"{fingerprint(asked)}.json"


def _marks(path: Path) -> list[int]:
    """Of a file's contents, without reading them: any change of them changes one of these."""
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]


def _read(path: Path) -> ModelShape | None:
    """None where nothing is kept, or what is kept is damaged."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields["blocks"] = tuple(_block(**block) for block in fields["blocks"])
        fields["unused"] = tuple(fields["unused"])
        return ModelShape(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _block(linears: dict[str, tuple[int, int]], transposed: list[str], **fields: Any) -> BlockShape:
    sizes = {name: (outputs, inputs) for name, (outputs, inputs) in linears.items()}
    return BlockShape(sizes, transposed=frozenset(transposed), **fields)


def _write(path: Path, shape: ModelShape) -> None:
    """Keeps a shape, where that is possible: nothing fails for it."""
    fields = asdict(shape)
    for block in fields["blocks"]:
        block["transposed"] = sorted(block["transposed"])
    try:
        write_atomically(path, json.dumps(fields).encode(), survives_crashes=False)
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)[:-MOST]:
            old.unlink(missing_ok=True)
    except (OSError, RaysweepError) as error:
        log.info("the shape of the model is not kept: %s", first_line(error))
