"""How a text is divided: what may serve calibration, what is kept for validation, and passages of either.

A sweep's validation windows must stay the same when calibration sets with other seeds or lengths join the
sweep later. So the division knows neither seeds nor lengths: documents are joined by blank lines, the joined
text is cut into blocks of 16,384 characters (at line ends), and one block in eight is kept for validation.
"""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]  # characters start to end (excluded) of a text

SEPARATOR = "\n\n"
BLOCK_CHARACTERS = (
    16_384  # assumption: holds two windows of 2,048 tokens, and a text of 32 kB can be validated on
)
RESERVED_EVERY = 8
RESERVED_BLOCK = 1  # the second of every eight, so that short texts have one


def cut_spans(text: str, size: int, span: Span | None = None) -> list[Span]:
    """Consecutive spans of about `size` characters that cover `span` (default: all) of `text`.

    A cut is moved on to the next line end if there is one within a quarter of `size`. The end of the text
    counts as a line end, so that the cuts of a text that is read only in part are those of the whole text.
    """
    start, end = span or (0, len(text))
    cuts = [start]
    for position in range(start + size, end, size):
        limit = position + size // 4
        newline = text.find("\n", position, min(limit, end))
        if newline < 0:
            newline = end if end < limit else position
        cuts.append(newline)
    return [(a, b) for a, b in zip(cuts, [*cuts[1:], end], strict=True) if a < b]


def free_spans(text: str) -> list[Span]:
    """The longest spans of joined `text` without a block that is kept for validation."""
    spans: list[Span] = []
    for start, end in (span for index, span in enumerate(_blocks(text)) if not _is_reserved(index)):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def reserved_spans(text: str) -> list[Span]:
    """The blocks of joined `text` that are kept for validation."""
    return [span for index, span in enumerate(_blocks(text)) if _is_reserved(index)]


def passages(text: str, spans: Iterable[Span], size: int) -> list[str]:
    """`spans` of `text` cut into pieces of about `size` characters, in order, blank ones left out."""
    pieces = (text[a:b].strip("\n") for span in spans for a, b in cut_spans(text, size, span))
    return [piece for piece in pieces if piece.strip()]


def document_pieces(documents: list[str]) -> list[str]:
    """Every document without what is kept for validation; one that spans such a block gives two pieces."""
    spans = free_spans(SEPARATOR.join(documents))
    pieces, start, first = [], 0, 0
    for document in documents:
        end = start + len(document)
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        for a, b in spans[first:]:
            if a >= end:
                break
            pieces.append(document[max(a - start, 0) : b - start])
        start = end + len(SEPARATOR)
    return [piece for piece in pieces if piece.strip()]


def _blocks(text: str) -> list[Span]:
    return cut_spans(text, BLOCK_CHARACTERS)


def _is_reserved(index: int) -> bool:
    return index % RESERVED_EVERY == RESERVED_BLOCK
