"""Token windows that were cut before: for others a tokenizer is loaded, which imports most of transformers, and text
is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import UsageError
from raysweep.fingerprint import fingerprint
from raysweep.model.checkpoint import ModelSource
from raysweep.model.known import keep, made_by, marks_of
from raysweep.model.text import TextSource, source_files
from raysweep.model.tokens import TokenSet
from raysweep.results.uris import cache_folder

FOLDER = "tokens"
MADE_WITH = ("transformers", "tokenizers", "numpy", "pyarrow")
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
LARGEST = 32 << 20  # bytes of a set that is kept


def known_tokens(
    name: str,
    model: ModelSource,
    source: TextSource,
    asked: Mapping[str, Any],
    make: Callable[[], TokenSet],
    beside: Sequence[TokenSet] = (),
) -> TokenSet:
    """What `make` gives, which runs only for windows that were not cut before: of other files, or by other code.

    name: of the set, as `make` has it
    asked: all that the windows depend on besides tokenizer and text, as JSON has it;  beside: other sets that they keep
    clear of. Files are told apart by size, time and number, without reading them; what is kept is checked against the
    hash of its content. Data sets from afar are always read, and so is a tokenizer from there or with code of its own.
    Raises what `make` raises.
    """
    key = _key(model, source, {"name": name, **asked}, beside)
    if key is not None and (tokens := _read(name, key, source)) is not None:
        return tokens
    tokens = make()
    if key is not None and tokens.input_ids.nbytes <= LARGEST:
        content = BytesIO()
        np.save(content, tokens.input_ids, allow_pickle=False)
        keep(_folder() / f"{key}-{tokens.content_hash}.npy", content.getvalue())
    return tokens


def _folder() -> Path:
    return cache_folder() / FOLDER


def _key(
    model: ModelSource, source: TextSource, asked: Mapping[str, Any], beside: Sequence[TokenSet]
) -> str | None:
    """None where the files here do not determine the windows, or cannot be read."""
    if model.trust_remote_code or not model.is_local:
        return None
    try:
        folder = Path(model.location)
        tokenizer = {
            path.name: marks_of(path) for path in folder.iterdir() if path.suffix in TOKENIZER_SUFFIXES
        }
        others = [[len(tokens), _marks(tokens.source)] for tokens in beside if tokens.source is not None]
        parts = {"asked": dict(asked), "tokenizer": tokenizer, "text": _marks(source), "beside": others}
    except (UsageError, OSError):  # whoever reads them says so at length
        return None
    return None if parts["text"] is None else fingerprint(parts | made_by(*MADE_WITH))


def _marks(source: TextSource) -> dict[str, list[int]] | None:
    """Of the files of a text, by path; None where it comes from afar."""
    if not source.is_file:
        return None
    return {str(path.resolve()): marks_of(path) for path in source_files(source)}


def _read(name: str, key: str, source: TextSource) -> TokenSet | None:
    """None where nothing is kept, or what is kept is damaged."""
    for path in _folder().glob(f"{key}-*.npy"):
        try:
            tokens = TokenSet(name, np.load(path, allow_pickle=False), source)
        except (OSError, ValueError, EOFError):
            continue
        if path.stem == f"{key}-{tokens.content_hash}":
            return tokens
    return None
