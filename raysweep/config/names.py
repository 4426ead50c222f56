"""Patterns of names of linears: the whole name, its last parts, or a regular expression after `re:`."""

from __future__ import annotations

import re

from raysweep.errors import UsageError

REGEX_PREFIX = "re:"
PATTERN_WORDS = "names of linears (model.layers.0.mlp.up_proj, mlp.up_proj, up_proj), or re:REGEX"


def check_name_pattern(pattern: str) -> str:
    """The pattern itself. Raises UsageError for one that cannot match anything."""
    problem = None
    if not pattern.removeprefix(REGEX_PREFIX):
        problem = "it is empty"
    elif pattern.startswith(REGEX_PREFIX):
        try:
            re.compile(pattern.removeprefix(REGEX_PREFIX))
        except re.error as error:
            problem = str(error)
    if problem is not None:
        raise UsageError(f"{pattern!r} is no pattern of names: {problem}", allowed=PATTERN_WORDS)
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a linear's full name is meant: equal, ending in `.pattern`, or matched from its start by a regex."""
    if pattern.startswith(REGEX_PREFIX):
        return re.match(pattern.removeprefix(REGEX_PREFIX), name) is not None
    return name == pattern or name.endswith(f".{pattern}")
