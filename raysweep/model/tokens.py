"""Token windows for calibration, validation and perplexity: chosen by a seed, fixed by content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.errors import UsageError, nearest_name
from raysweep.model.draws import CHARACTERS_PER_TOKEN, Request, cut_windows, draw, from_documents, packed
from raysweep.model.passages import SEPARATOR, Span, free_spans, reserved_spans
from raysweep.model.rows import count_rows, has_rows, read_rows
from raysweep.model.text import TextSource, load_documents, source_files
from raysweep.model.tokenizer import Ids, check_gives_tokens, encode

# N samples (windows), L tokens of one sample

SAMPLINGS = ("pack", "document")


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token sequences of equal length.

    input_ids: int64, N x L, read-only
    source:    where they were drawn from
    """

    input_ids: Ids
    source: TextSource | None = None

    def __post_init__(self) -> None:
        ids_NL = np.array(self.input_ids, dtype=np.int64, order="C", ndmin=2)
        ids_NL.setflags(write=False)
        object.__setattr__(self, "input_ids", ids_NL)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """L, in tokens."""
        return int(self.input_ids.shape[1])

    @property
    def content_hash(self) -> str:
        """The first 16 hex digits of SHA-256 over shape and ids (little-endian int64)."""
        digest = hashlib.sha256(repr(self.input_ids.shape).encode())
        digest.update(self.input_ids.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()[:16]


def calibration_tokens(
    tokenizer: Any,
    source: TextSource,
    *,
    sampling: str,
    num_samples: int,
    sequence_length: int,
    seed: int,
    max_positions: int | None = None,
) -> TokenSet:
    """`num_samples` different windows of `sequence_length` tokens, chosen by `seed`.

    pack:     passages drawn by the seed from the whole text are joined in their order, tokenised once and cut
              into windows; of these, about four times as many as are needed, the seed chooses.
    document: each window is a random stretch of a document of its own that is long enough.
    Of files the first 64 Mi characters are drawn from, of a Hugging Face data set a prefix of about 32
    characters for every token asked for; four times as much as long as that gives too little. One block of
    text in eight is left to `validation_tokens`. A source with `input_ids` gives its first rows, in order,
    whatever the sampling and the seed; longer rows are cut to their first `sequence_length` tokens.

    max_positions: the longest sequence that the model takes, or None. Raises UsageError when the data give
    fewer windows, or the model takes no sequence of that length.
    """
    request = Request(tokenizer, source, "num_samples", num_samples, sequence_length, seed)
    request.check(max_positions)
    if sampling not in SAMPLINGS:
        nearest = nearest_name(sampling, list(SAMPLINGS))
        raise UsageError(f"{sampling!r}", where="sampling", allowed=", ".join(SAMPLINGS), nearest=nearest)
    if has_rows(source):
        request.check_enough(count_rows(source))
        return TokenSet(read_rows(source, 0, num_samples, sequence_length), source)
    choose = packed(request, free_spans) if sampling == "pack" else from_documents(request)
    return TokenSet(draw(request, choose), source)


def validation_tokens(
    tokenizer: Any,
    source: TextSource,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    exclude: Sequence[TokenSet] = (),
    max_positions: int | None = None,
) -> TokenSet:
    """`samples` windows, packed as for calibration, that share no text with any calibration set in `exclude`.

    Where a set in `exclude` comes from the same files or data set and split, the windows are drawn from the
    blocks of text that calibration leaves alone: they depend on no calibration setting, and stay the same
    when calibration sets are added. From other text they are drawn anywhere. A source with `input_ids` gives
    its last rows.

    Raises UsageError like `calibration_tokens`, and when the rows left over by calibration are too few.
    """
    request = Request(tokenizer, source, "samples", samples, sequence_length, seed)
    request.check(max_positions)
    shared = [tokens for tokens in exclude if tokens.source is not None and same_text(tokens.source, source)]
    if has_rows(source):
        total = count_rows(source)
        request.check_enough(total - max(map(len, shared), default=0), left_over=bool(shared))
        return TokenSet(read_rows(source, total - samples, total, sequence_length), source)
    spans = reserved_spans if shared else _all_spans
    return TokenSet(draw(request, packed(request, spans)), source)


def evaluation_tokens(
    tokenizer: Any,
    source: TextSource,
    *,
    sequence_length: int,
    max_windows: int | None = None,
    bos_each_window: bool = False,
    max_positions: int | None = None,
) -> TokenSet:
    """The windows of a perplexity: text joined by blank lines, tokenised once, cut from the start.

    The tokenizer's defaults put at most one BOS, into the first window; there are floor(tokens / length)
    windows, of which the first `max_windows` are kept. bos_each_window: tokenised without special tokens and
    cut into windows of one token less, with BOS put before each. A source with `input_ids` gives its rows. Of
    the text no more is read than is needed and a margin of one window: the windows are those of the whole.

    Raises UsageError when the text does not fill one window, or the model takes no sequence of that length.
    """
    Request(tokenizer, source, "max_windows", max_windows or 1, sequence_length, 0).check(max_positions)
    if has_rows(source):
        total = count_rows(source)
        ids_NL = read_rows(source, 0, min(total, max_windows or total), sequence_length)
    else:
        ids_NL = _leading_windows(tokenizer, source, sequence_length, max_windows, bos_each_window)
    if not len(ids_NL):
        if not has_rows(source):
            check_gives_tokens(tokenizer, load_documents(source, CHARACTERS_PER_TOKEN * sequence_length))
        raise UsageError(
            f"{source} gives no window of {sequence_length} tokens",
            where="sequence_length",
            remedy="lower it, or name more text",
        )
    return TokenSet(ids_NL, source)


def check_vocabulary(tokens: TokenSet, size: int) -> None:
    """Raises UsageError when `tokens` holds an id that a model with `size` embeddings does not have."""
    low, high = int(tokens.input_ids.min()), int(tokens.input_ids.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise UsageError(
            f"token {wrong} in {tokens.source}, but the model has {size} embeddings",
            remedy="use the tokenizer of the model, or rows of input_ids that were made with it",
        )


def _leading_windows(
    tokenizer: Any, source: TextSource, length: int, max_windows: int | None, bos_each_window: bool
) -> Ids:
    bos = tokenizer.bos_token_id
    if bos_each_window and bos is None:
        raise UsageError("the tokenizer has no BOS token", where="bos_each_window", remedy="leave it out")
    step = length - 1 if bos_each_window else length
    needed = None if max_windows is None else (max_windows + 1) * step  # one more, as the end may change
    ids_NL = cut_windows(_leading_ids(tokenizer, source, needed, not bos_each_window), step)[:max_windows]
    return np.insert(ids_NL, 0, bos, axis=1) if bos_each_window else ids_NL


def _leading_ids(tokenizer: Any, source: TextSource, needed: int | None, special_tokens: bool) -> Ids:
    """The ids of the text from its start: all, or at least `needed` when the text has so many."""
    characters = None if needed is None else 2 * CHARACTERS_PER_TOKEN * needed
    while True:
        documents = list(load_documents(source, characters))
        ids = encode(tokenizer, SEPARATOR.join(documents), special_tokens=special_tokens)
        if characters is None or needed is None or len(ids) >= needed:
            return ids
        if sum(map(len, documents)) < characters:
            return ids
        characters *= 4


def _all_spans(text: str) -> list[Span]:
    return [(0, len(text))]


def same_text(left: TextSource, right: TextSource) -> bool:
    """Whether both are read from the same files or data set and split. Raises UsageError as reading them would."""
    if left.is_file and right.is_file:
        files = {path.resolve() for path in source_files(left)}
        return any(path.resolve() in files for path in source_files(right))
    return left == right
