"""The division of a text into what calibration may use and what is kept for validation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.model.passages import (
    BLOCK_CHARACTERS,
    SEPARATOR,
    cut_spans,
    document_pieces,
    free_spans,
    passages,
    reserved_spans,
)

texts = st.text(alphabet="abc\n", max_size=100)


def characters_of(spans: list[tuple[int, int]]) -> set[int]:
    return {position for start, end in spans for position in range(start, end)}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices("abcdefgh \n", k=rng.choice([3, 500, 40_000]))) for _ in range(40)]


@given(texts, st.integers(1, 50))
def test_cuts_cover_the_text_once(text: str, size: int) -> None:
    assert "".join(text[start:end] for start, end in cut_spans(text, size)) == text


@settings(max_examples=500)
@given(texts, texts, st.integers(4, 20))
def test_cuts_of_a_text_read_in_part_are_those_of_the_whole(text: str, rest: str, size: int) -> None:
    whole = cut_spans(text + SEPARATOR + rest, size)
    for index, (start, end) in enumerate(cut_spans(text, size)):
        assert start == whole[index][0]
        assert end == min(whole[index][1], len(text))


def test_one_block_in_eight_is_kept_and_every_character_has_one_use(documents: list[str]) -> None:
    text = SEPARATOR.join(documents)
    free, reserved = characters_of(free_spans(text)), characters_of(reserved_spans(text))
    assert free.isdisjoint(reserved)
    assert len(free | reserved) == len(text)
    assert len(reserved) / len(text) == pytest.approx(1 / 8, abs=0.03)


def test_a_short_text_has_something_for_both(documents: list[str]) -> None:
    text = SEPARATOR.join(documents)[: 2 * BLOCK_CHARACTERS]
    assert free_spans(text)
    assert reserved_spans(text)


def test_passages_hold_the_spans_text(documents: list[str]) -> None:
    text = SEPARATOR.join(documents)
    pieces = passages(text, free_spans(text), 1000)
    kept = "".join(text[start:end] for start, end in free_spans(text))
    assert "".join(pieces).replace("\n", "") == kept.replace("\n", "")
    assert max(map(len, pieces)) <= 1250


def test_pieces_of_documents_are_their_free_characters(documents: list[str]) -> None:
    text = SEPARATOR.join(documents)
    free = characters_of(free_spans(text))
    expected, start = "", 0
    for document in documents:
        expected += "".join(character for offset, character in enumerate(document) if start + offset in free)
        start += len(document) + len(SEPARATOR)
    pieces = document_pieces(documents)
    assert "".join(pieces) == expected
    assert all(any(piece in document for document in documents) for piece in pieces)
