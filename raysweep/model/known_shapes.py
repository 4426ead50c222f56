"""Shapes of models that were read before: to see what a model is made of, and whether it can be pruned at all, it is
built without weights, which takes seconds, and most of them are for importing its code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysweep.errors import UsageError
from raysweep.fingerprint import fingerprint
from raysweep.model.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, ModelSource
from raysweep.model.known import keep, made_by, marks_of, read
from raysweep.model.shape import BlockShape, ModelShape, warn_of_unused
from raysweep.results.uris import cache_folder

FOLDER = "shapes"
READ_WITH = ("torch", "transformers", "accelerate", "safetensors")


def known_shape(source: ModelSource, dtype: str = "auto") -> ModelShape:
    """As `read_shape`, which runs only for models that it has not seen: of other files, or by other code.

    Files are told apart by size, time and number, without reading them; a shape is no part of an identity. A model with
    code of its own is always read. Raises UsageError.
    """
    source.check_folder()  # else it would be asked for on the Hub
    kept = _file(source, dtype)
    if kept is not None and (shape := _read(kept)) is not None:
        warn_of_unused(shape, source)
        return shape
    from raysweep.model.shape_reading import read_shape

    shape = read_shape(source, dtype)
    if kept is not None:
        keep(kept, _content(shape))
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
        files = marks_of(Path(path) for path in found.values() if path is not None)
        asked = {"dtype": dtype, "path": source.location, "files": files}
        return cache_folder() / FOLDER / f"{fingerprint(asked | made_by(*READ_WITH))}.json"
    except (UsageError, OSError):  # whoever reads the model says so at length
        return None


def _read(path: Path) -> ModelShape | None:
    """None where nothing is kept, or what is kept is damaged."""
    try:
        fields: dict[str, Any] = json.loads(read(path) or b"")
        fields["blocks"] = tuple(_block(**block) for block in fields["blocks"])
        fields["unused"] = tuple(fields["unused"])
        return ModelShape(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _block(linears: dict[str, tuple[int, int]], transposed: list[str], **fields: Any) -> BlockShape:
    sizes = {name: (outputs, inputs) for name, (outputs, inputs) in linears.items()}
    return BlockShape(sizes, transposed=frozenset(transposed), **fields)


def _content(shape: ModelShape) -> bytes:
    fields = asdict(shape)
    for block in fields["blocks"]:
        block["transposed"] = sorted(block["transposed"])
    return json.dumps(fields).encode()
