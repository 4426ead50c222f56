"""The errors that raysweep raises: each says what is wrong, which value, what is allowed and what to do."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Self


class RaysweepError(Exception):
    """Something went wrong that raysweep can name. Ends a command with status 1, without a traceback.

    All subclasses keep their fields when they are pickled, because they travel between actors.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(RaysweepError):
    """Wrong input. Ends a command with status 2; nothing was started or written.

    what:    the problem in a few words ("unknown key 'sparcity'")
    where:   file, line and key, as far as they are known ("space.yaml:12: sweep[0].sparcity")
    allowed: what would have been accepted
    nearest: the known name closest to the one that was given
    remedy:  what to do
    """

    exit_status = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        allowed: str | None = None,
        nearest: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.allowed, self.nearest, self.remedy = what, where, allowed, nearest, remedy
        super().__init__(self._render())

    def inside(self, prefix: str) -> Self:
        """The same error, of something that lies inside of `prefix`, which ends in what parts them (`: ` or `.`)."""
        return self.at(f"{prefix}{self.where}" if self.where else prefix.rstrip(":. "))

    def at(self, where: str | None) -> Self:
        """The same error at another place."""
        return type(self)(self.what, **(self._fields() | {"where": where}))

    def _render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        parts = [head]
        if self.nearest:
            parts.append(f"did you mean {self.nearest!r}?")
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.remedy:
            parts.append(self.remedy)
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_usage_error, (type(self), self.what, self._fields())

    def _fields(self) -> dict[str, str | None]:
        return {
            "where": self.where,
            "allowed": self.allowed,
            "nearest": self.nearest,
            "remedy": self.remedy,
        }


class CapacityError(UsageError):
    """The plan does not fit the machines; the remedy names a setting that would."""


class NumericalError(RaysweepError):
    """A number that is not finite, or a computation that cannot be trusted. Makes a failed row, never a result."""


class ShardLostError(RaysweepError):
    """A shard's process ended before its work did."""


class StorageError(RaysweepError):
    """The storage cannot be written: it is full, read-only or gone. Ends a sweep; the rows that are there stay."""

    @classmethod
    def of(cls, path: object, error: OSError) -> StorageError:
        """path: that could not be written"""
        return cls(
            f"{path} cannot be written: {error.strerror or error}.\n  Rows that are there stay; "
            "once the storage can be written again, the same command continues the sweep."
        )


def first_line(error: BaseException) -> str:
    """The first line of what a foreign error says, and the next where that only announces it, at most 300 characters;
    its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


def nearest_name(name: str, known: list[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    joined = str(name).replace("_", "")
    alike = next((other for other in known if other.replace("_", "") == joined), None)  # log_uniform
    matches = [alike] if alike else get_close_matches(str(name), known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _rebuild_usage_error(kind: type[UsageError], what: str, fields: dict[str, str | None]) -> UsageError:
    return kind(what, **fields)
