"""Patterns and granularities as people write them: each has one spelling that is kept."""

from __future__ import annotations

import re

from raysweep.errors import UsageError, nearest_name

UNSTRUCTURED = "unstructured"
PATTERN_VALUES = "unstructured, or N:M with 1 <= N < M (N kept of M consecutive inputs), such as 2:4"
MODEL = "model"  # the granularity of all blocks together
GRANULARITY_VALUES = "matrix | subblock | block | window:K (K blocks at a time) | model"

_PATTERN = re.compile(r"^([0-9]{1,4}):([0-9]{1,4})$")
_WINDOW = re.compile(r"^window:([0-9]{1,4})$")


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(N, M) of an N:M pattern, None for unstructured. Anything else is a UsageError."""
    if text == UNSTRUCTURED:
        return None
    match = _PATTERN.match(text)
    if match is None:
        raise UsageError(f"{text!r} is no pattern", where="pattern", allowed=PATTERN_VALUES)
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group:
        problem = f"pattern {text!r} keeps {kept} of {group} weights"
        raise UsageError(problem, where="pattern", allowed=PATTERN_VALUES)
    return kept, group


def canonical_pattern(text: str) -> str:
    """The one spelling of a pattern ("02:4" is 2:4)."""
    parsed = parse_pattern(text)
    return UNSTRUCTURED if parsed is None else f"{parsed[0]}:{parsed[1]}"


def window_length(granularity: str) -> int | None:
    """K of `window:K`, None for other granularities."""
    match = _WINDOW.match(granularity)
    return int(match[1]) if match else None


def canonical_granularity(text: str) -> str:
    """The one spelling of a granularity: a window of one block is `block`. Raises UsageError."""
    length = window_length(text)
    if text not in ("matrix", "subblock", "block", "model") and not length:
        raise UsageError(
            f"{text!r} is no granularity",
            where="granularity",
            allowed=GRANULARITY_VALUES,
            nearest=nearest_name(text, ["matrix", "subblock", "block", "window:2", "model"]),
        )
    return text if length is None else "block" if length == 1 else f"window:{length}"
