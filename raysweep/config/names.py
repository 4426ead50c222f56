"""Patterns of names of linears: the whole name, its last parts, or a regular expression after `re:`."""

from __future__ import annotations

from raysweep.errors import UsageError

REGEX_PREFIX = "re:"
MATCH_LIMIT_S = 1.0  # for one name, which takes microseconds unless a pattern backtracks without end
PATTERN_WORDS = "names of linears (model.layers.0.mlp.up_proj, mlp.up_proj, up_proj), or re:REGEX"


def check_name_pattern(pattern: str) -> str:
    """The pattern itself. Raises UsageError for one that cannot match anything."""
    problem = None
    if not pattern.removeprefix(REGEX_PREFIX):
        problem = "it is empty"
    elif pattern.startswith(REGEX_PREFIX):
        import regex  # here and below: names alone must not cost what it takes to load

        try:
            regex.compile(pattern.removeprefix(REGEX_PREFIX))
        except regex.error as error:
            problem = str(error)
    if problem is not None:
        raise UsageError(f"{pattern!r} is no pattern of names: {problem}", allowed=PATTERN_WORDS)
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a linear's full name is meant: equal, ending in `.pattern`, or matched from its start by a regex.

    Raises UsageError for a regex that takes too long.
    """
    if pattern.startswith(REGEX_PREFIX):
        import regex

        try:
            return regex.match(pattern.removeprefix(REGEX_PREFIX), name, timeout=MATCH_LIMIT_S) is not None
        except TimeoutError as error:
            raise UsageError(
                f"{pattern!r} takes more than {MATCH_LIMIT_S:.0f} s to match {name}: it tries too many ways",
                remedy="Write it without repetitions within repetitions, as in (a+)+.",
            ) from error
    return name == pattern or name.endswith(f".{pattern}")
