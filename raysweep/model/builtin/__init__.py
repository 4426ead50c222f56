"""What ships inside the package: small trained models and their text, named `builtin:NAME`."""

from __future__ import annotations

from pathlib import Path

from raysweep.errors import UsageError, nearest_name

PREFIX = "builtin:"
BUILTIN_NAMES = ("pystdlib",)


def is_builtin(path: str | Path) -> bool:
    """Whether `path` names something that ships inside the package."""
    return str(path).startswith(PREFIX)


def resolve_model_path(path: str | Path) -> str | Path:
    """The folder of a built-in model; any other path or Hugging Face id unchanged.

    Raises UsageError for an unknown built-in name.
    """
    return _folder(str(path)) / "model" if is_builtin(path) else path


def builtin_text_folder(path: str) -> Path:
    """The folder with one Parquet file per split (column `text`) of a built-in data set.

    Raises UsageError for an unknown built-in name.
    """
    return _folder(path) / "text"


def _folder(path: str) -> Path:
    name = path.removeprefix(PREFIX)
    if name not in BUILTIN_NAMES:
        raise UsageError(
            f"unknown built-in {path!r}",
            allowed=", ".join(PREFIX + known for known in BUILTIN_NAMES),
            nearest=nearest_name(path, [PREFIX + known for known in BUILTIN_NAMES]),
        )
    return Path(__file__).parent / name
