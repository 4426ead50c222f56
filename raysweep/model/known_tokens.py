"""Token windows that were cut before: for others a tokenizer is loaded, which imports most of transformers, and text
is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import UsageError
from raysweep.fingerprint import fingerprint
from raysweep.model.checkpoint import ModelSource
from raysweep.model.known import keep, made_by, marks_of, read
from raysweep.model.text import TextSource, source_files
from raysweep.model.tokens import TokenSet, same_text
from raysweep.results.uris import cache_folder

FOLDER = "tokens"
MADE_WITH = (
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "mistral-common",
    "protobuf",
    "numpy",
    "pyarrow",
)
# Of a model's folder every other file may be one of its tokenizer.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
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
    clear of. Files are told apart by size, times and number, without reading them; what is kept is checked by the hash
    of its bytes. Data sets from afar are always read, and so is a tokenizer from there or with code of its own. Raises
    what `make` raises.
    """
    key = _key(model, source, asked, beside)
    if key is not None and (tokens := _read(name, key, source)) is not None:
        return tokens
    tokens = make()
    if key is not None and tokens.input_ids.nbytes <= LARGEST:
        content = BytesIO()
        np.save(content, tokens.input_ids, allow_pickle=False)
        keep(_folder() / f"{key}-{_hash(content.getvalue())}.npy", content.getvalue())
    return tokens


def _folder() -> Path:
    return cache_folder() / FOLDER


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _key(
    model: ModelSource, source: TextSource, asked: Mapping[str, Any], beside: Sequence[TokenSet]
) -> str | None:
    """None where files that lie here do not determine the windows, or cannot be read."""
    if model.trust_remote_code or not model.is_local or not source.is_file:
        return None
    try:
        around = sorted(Path(model.location).iterdir())
        tokenizer = [path for path in around if path.suffix not in WEIGHT_SUFFIXES and path.is_file()]
        shared = [
            len(tokens) for tokens in beside if tokens.source is not None and same_text(tokens.source, source)
        ]
        parts = {
            "asked": dict(asked),
            "split": source.split,
            "tokenizer": marks_of(tokenizer),
            "text": marks_of(source_files(source)),
            "clear of": max(shared, default=None),
        }
        return fingerprint(parts | made_by(*MADE_WITH))
    except (UsageError, OSError):  # whoever reads them says so at length
        return None


def _read(name: str, key: str, source: TextSource) -> TokenSet | None:
    """None where nothing is kept, or what is kept is damaged."""
    for path in _folder().glob(f"{key}-*.npy"):
        content = read(path)
        if content is not None and path.stem == f"{key}-{_hash(content)}":
            return TokenSet(name, np.load(BytesIO(content), allow_pickle=False), source)
    return None
