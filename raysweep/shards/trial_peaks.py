"""The most memory that a worker holds while one trial alone is with it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from raysweep.shards.peaks import Peaks


def trial_of(name: str) -> str:
    """The trial on whose account there are weights under a name, as in `masks@TRIAL`."""
    return name.rpartition("@")[2]


class TrialPeaks:
    """Told which names come and go. A trial that was not alone from its beginning on has no peaks of its own."""

    def __init__(self, restart: Callable[[], None], read: Callable[[], Peaks]) -> None:
        """restart: lets memory be looked at anew;  read: the most since then"""
        self._restart, self._read = restart, read
        self._names: set[str] = set()
        self._alone: str | None = None

    def enter(self, name: str) -> None:
        if not self._names:
            self._restart()
            self._alone = trial_of(name)
        elif self._alone != trial_of(name):
            self._alone = None
        self._names.add(name)

    def leave(self, name: str) -> None:
        """With all names that end in `@name`."""
        self._names = {other for other in self._names if other != name and not other.endswith(f"@{name}")}

    def of(self, name: str) -> dict[str, Any] | None:
        """Bytes by `host` and `device`, as of `Peaks`; None where another trial was there as well."""
        return asdict(self._read()) if name in self._names and self._alone == trial_of(name) else None
