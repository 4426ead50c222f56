"""Token windows that were cut before: for others a tokenizer is loaded, which imports most of transformers, and text
is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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


class KnownTokens:
    """The windows that one model's tokenizer cuts.

    Files are told apart by size, times and number, without reading them (writes through a memory map may leave these as
    they are). Data sets from afar are always read, and so is a tokenizer from there or with code of its own.
    """

    def __init__(self, model: ModelSource) -> None:
        """To be made before the tokenizer is loaded: its files may be others later."""
        self._given: dict[str, Any] | None = None  # what all sets of the model depend on
        if not model.trust_remote_code and model.is_local:
            with suppress(OSError):
                around = sorted(Path(model.location).iterdir())
                tokenizer = [path for path in around if path.suffix not in WEIGHT_SUFFIXES and path.is_file()]
                self._given = made_by(*MADE_WITH) | {"tokenizer": marks_of(tokenizer)}

    def get(
        self,
        source: TextSource,
        asked: Mapping[str, Any],
        make: Callable[[], TokenSet],
        beside: Sequence[TokenSet] = (),
    ) -> TokenSet:
        """What `make` gives, which runs only for windows that were not cut before: of other files, or by other code.

        asked: all that the windows depend on besides tokenizer and text, as JSON has it;  beside: other sets that they
        keep clear of. What is kept is checked by the hash of its bytes. Raises what `make` raises.
        """
        key = self._key(source, asked, beside)
        if key is not None and (tokens := _read(key, source)) is not None:
            return tokens
        tokens = make()
        if key is not None and tokens.input_ids.nbytes <= LARGEST:
            content = BytesIO()
            np.save(content, tokens.input_ids, allow_pickle=False)
            keep(_folder() / f"{key}-{_hash(content.getvalue())}.npy", content.getvalue())
        return tokens

    def _key(self, source: TextSource, asked: Mapping[str, Any], beside: Sequence[TokenSet]) -> str | None:
        """None where files that lie here do not determine the windows, or cannot be read."""
        if self._given is None or not source.is_file:
            return None
        try:
            shared = [
                len(tokens)
                for tokens in beside
                if tokens.source is not None and same_text(tokens.source, source)
            ]
            parts = {
                "asked": dict(asked),
                "split": source.split,
                "text": marks_of(source_files(source)),
                "clear of": max(shared, default=None),
            }
            return fingerprint(parts | self._given)
        except (UsageError, OSError):  # whoever reads them says so at length
            return None


def _folder() -> Path:
    return cache_folder() / FOLDER


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(key: str, source: TextSource) -> TokenSet | None:
    """None where nothing is kept, or what is kept is damaged."""
    for path in _folder().glob(f"{key}-*.npy"):
        content = read(path)
        if content is not None and path.stem == f"{key}-{_hash(content)}":
            return TokenSet(np.load(BytesIO(content), allow_pickle=False), source)
    return None
