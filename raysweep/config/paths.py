"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path

from raysweep.errors import UsageError


def typed_path(text: str | Path, what: str) -> Path:
    """The path, `~` expanded; whether something lies there is another question.

    what: names it in messages ("storage"). Raises UsageError for text that names no place on this machine: of a user
    who is not known, too long, with characters that no name may have, or behind a folder that may not be entered.
    """
    problem = None
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        problem = str(error.strerror)
    except (RuntimeError, ValueError) as error:  # no such user; a NUL, or half a character
        problem = str(error)
    if problem is not None:
        raise UsageError(
            f"{what} {_shortened(str(text))} is no path that can be used here: {problem}",
            remedy="Name another one.",
        )
    return path


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}")
