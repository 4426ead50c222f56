"""Loading a tokenizer and turning text into token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysweep.config.paths import typed_path
from raysweep.errors import UsageError, first_line
from raysweep.model.builtin import resolve_model_path

SAVE_AGAIN = "Save it again with save_pretrained of an up-to-date transformers."
SAMPLE_CHARACTERS = 4096
Ids = npt.NDArray[np.int64]

# One of these is in every folder that `save_pretrained` of a tokenizer wrote.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a built-in model, a local folder or a Hugging Face id (`transformers.AutoTokenizer`).

    Raises UsageError when there is none, or when it cannot be loaded.
    """
    resolved = resolve_model_path(path)
    folder = typed_path(resolved, "model")
    if str(path).startswith((".", "/", "~")) and not folder.is_dir():
        raise UsageError(f"no such folder: {path}", remedy="check model.path")
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UsageError(
            f"no tokenizer in {path}", allowed=f"a folder with one of {', '.join(_TOKENIZER_FILES)}"
        )
    from transformers import AutoTokenizer

    name = folder if folder.is_dir() else resolved
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # damaged files end in whatever the libraries meet first, of tokenizers a bare Exception
        raise UsageError(
            f"cannot load the tokenizer of {path}: {first_line(error)}",
            remedy="check model.path and model.revision, HF_TOKEN if the model is gated, and the network",
        ) from error


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> Ids:
    """Token ids of `text` by the tokenizer's defaults, such as one BOS in front, int64; of any length."""
    with _working(tokenizer):
        encoded = tokenizer(
            text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False
        )
        return np.asarray(encoded["input_ids"], dtype=np.int64)


def encode_batch(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """`encode` of each text alone."""
    with _working(tokenizer):
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def check_gives_tokens(tokenizer: Any, documents: Iterable[str]) -> None:
    """Raises UsageError where it makes no token of the first document that is no blank, special ones apart."""
    text = next((text[:SAMPLE_CHARACTERS] for text in documents if text[:SAMPLE_CHARACTERS].strip()), "")
    if text and not len(encode(tokenizer, text, special_tokens=False)):
        raise UsageError(
            f"the tokenizer of {_name_of(tokenizer)} gives no token for {len(text):,} characters of text",
            remedy=SAVE_AGAIN,
        )


@contextmanager
def _working(tokenizer: Any) -> Iterator[None]:
    """Within the context, a tokenizer whose files contradict each other, which loading does not see, ends in a
    UsageError."""
    try:
        yield
    except Exception as error:  # of its libraries, a bare Exception among them
        raise UsageError(
            f"the tokenizer of {_name_of(tokenizer)} cannot encode text: {first_line(error)}",
            remedy=SAVE_AGAIN,
        ) from error


def _name_of(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "the model"))
