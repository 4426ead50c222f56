"""Drawing token windows from a text by a seed: packed passages, or one window from each of many documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.errors import UsageError
from raysweep.model.passages import SEPARATOR, Span, document_pieces, passages
from raysweep.model.text import TextSource, load_documents
from raysweep.model.tokenizer import Ids, check_gives_tokens, encode, encode_batch

# N samples (windows), L tokens of one sample

CHARACTERS_PER_TOKEN = 4  # assumption: English or code; fewer only means that a second, larger draw is made
OVERSAMPLING = 4  # windows to choose from for each one that is used
PASSAGE_WINDOWS = 4  # a passage holds about so many windows, so that few windows cross its end
LOCAL_CHARACTERS = 1 << 26  # of a file or folder, no more than the first 64 Mi characters are drawn from
GIVE_UP_CHARACTERS = 1 << 28  # a data set that has not given enough by then would be streamed for hours
DOCUMENT_BATCH = 64


@dataclass(frozen=True)
class Request:
    """So many windows of that length from there; `key` is the setting that asks for the number."""

    tokenizer: Any
    source: TextSource
    key: str
    count: int
    length: int
    seed: int

    @property
    def budget(self) -> int:
        """Characters to tokenise at first."""
        return CHARACTERS_PER_TOKEN * OVERSAMPLING * self.count * self.length

    def check(self, max_positions: int | None) -> None:
        """Raises UsageError for a number or a length that no data could give, or no model take."""
        if self.count < 1:
            raise UsageError(f"{self.count} windows", where=self.key, allowed="1 or more")
        if self.length < 2:
            raise UsageError(f"{self.length} tokens", where="sequence_length", allowed="2 or more tokens")
        if max_positions is not None and self.length > max_positions:
            raise UsageError(
                f"{self.length} tokens, the model takes at most {max_positions}",
                where="sequence_length",
                remedy=f"set it to {max_positions} or less",
            )

    def check_enough(self, found: int, left_over: bool = False) -> None:
        """Raises UsageError when the source gives only `found` windows."""
        if found >= self.count:
            return
        leave = " beside those of calibration" if left_over else ""
        raise UsageError(
            f"{self.count} windows of {self.length} tokens were asked for, {self.source} gives {max(found, 0)}{leave}",
            where=self.key,
            remedy=f"lower {self.key} or sequence_length, or name more text",
        )


Choose = Callable[[list[str], int], Ids]  # (documents, budget in characters) to N x L windows


def draw(request: Request, choose: Choose) -> Ids:
    """`choose(documents, budget)` on more and more text, until it gives enough or there is no more text."""
    budget = request.budget
    while True:
        asked = max(2 * budget, LOCAL_CHARACTERS if request.source.is_file else 0)
        documents = list(load_documents(request.source, asked))
        read = sum(map(len, documents))
        ids_NL = choose(documents, budget)
        if len(ids_NL) >= request.count:
            return ids_NL[: request.count]
        if (read < asked and budget >= read) or asked > max(GIVE_UP_CHARACTERS, 32 * request.budget):
            check_gives_tokens(request.tokenizer, documents)
            request.check_enough(len(ids_NL))
        budget = max(budget * 4, read)


def packed(request: Request, spans: Callable[[str], list[Span]]) -> Choose:
    """Windows of passages drawn from `spans` of the joined text until they hold `budget` characters."""

    def choose(documents: list[str], budget: int) -> Ids:
        rng = np.random.default_rng(request.seed)
        text = SEPARATOR.join(documents)
        pieces = passages(text, spans(text), PASSAGE_WINDOWS * CHARACTERS_PER_TOKEN * request.length)
        order = rng.permutation(len(pieces))
        lengths = np.array([len(pieces[index]) for index in order], dtype=np.int64)
        characters_before = np.cumsum(lengths) - lengths
        drawn = sorted(order[characters_before < budget])
        ids = encode(request.tokenizer, SEPARATOR.join(pieces[index] for index in drawn))
        ids_NL = cut_windows(ids, request.length)
        return ids_NL[rng.permutation(len(ids_NL))]

    return choose


def from_documents(request: Request) -> Choose:
    """One window from each of enough documents that are long enough, whatever the budget."""

    def choose(documents: list[str], budget: int) -> Ids:
        rng = np.random.default_rng(request.seed)
        # Tokens spell a byte or more, but for a few special ones: shorter documents need not be tokenised.
        pieces = [piece for piece in document_pieces(documents) if len(piece.encode()) + 4 >= request.length]
        order = rng.permutation(len(pieces))
        long: list[Ids] = []
        for first in range(0, len(order), DOCUMENT_BATCH):
            batch = [pieces[index] for index in order[first : first + DOCUMENT_BATCH]]
            long += [ids for ids in encode_batch(request.tokenizer, batch) if len(ids) >= request.length]
            if len(long) >= request.count:
                break
        chosen = long[: request.count]
        starts = [int(rng.integers(len(ids) - request.length + 1)) for ids in chosen]
        cut = [ids[start : start + request.length] for ids, start in zip(chosen, starts, strict=True)]
        return np.stack(cut) if cut else np.zeros((0, request.length), dtype=np.int64)

    return choose


def cut_windows(ids: Ids, length: int) -> Ids:
    """`ids` cut from the start into floor(tokens / length) windows, N x L; the rest is dropped."""
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)
