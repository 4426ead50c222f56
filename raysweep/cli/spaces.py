"""Reads the search space that a command was given, with its settings and name."""

from __future__ import annotations

from collections.abc import Sequence

from raysweep.config.space import SearchSpace
from raysweep.config.spaces import resolve_space


def load_space(space: str, settings: Sequence[str], name: str | None) -> SearchSpace:
    """Raises UsageError for all that can be seen to be wrong without looking at model and data."""
    loaded = SearchSpace.from_yaml(resolve_space(space), settings)
    return loaded.with_name(name) if name else loaded
