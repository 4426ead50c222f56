"""Finds search spaces: those that ship with raysweep by name, any other by path."""

from __future__ import annotations

from pathlib import Path

import raysweep.config
from raysweep.config.paths import typed_path
from raysweep.errors import UsageError, nearest_name

DEFAULT_SPACE = "quickstart"


def builtin_names() -> list[str]:
    """The names of the search spaces that ship with raysweep."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def builtin_space(name: str) -> Path:
    """The file of a search space that ships with raysweep; raises UsageError for an unknown name."""
    for folder in _folders():
        path = folder / f"{name}.yaml"
        if name in builtin_names() and path.is_file():
            return path
    known = builtin_names()
    raise UsageError(
        f"no search space called {name!r}",
        allowed=", ".join(known) or "the path of a YAML file (no search space ships with this installation)",
        nearest=nearest_name(name, known),
    )


def resolve_space(text: str) -> Path:
    """What was typed where a search space is expected: a path, or a name that ships with us."""
    path = typed_path(text, "search space")
    if path.is_file():
        return path
    if text in builtin_names():
        return builtin_space(text)
    known = builtin_names()
    close = path.stem if path.stem in known else nearest_name(path.stem, known)
    problem = "is a folder" if path.is_dir() else "does not exist"
    raise UsageError(
        f"search space {text!r} {problem}",
        allowed=f"the path of a YAML file, or the name of one that ships with raysweep: {', '.join(known)}",
        nearest=close,
    )


def _folders() -> list[Path]:
    """Inside the installed package, or beside the package in a checkout."""
    package = Path(raysweep.config.__file__).resolve().parents[1]
    folders = (package / "searchspaces", package.parent / "searchspaces")
    return [folder for folder in folders if folder.is_dir()]
