"""What a launching process tells about its sweep while it runs; the command line shows it, scripts may ignore it."""

from __future__ import annotations

from typing import Any, Protocol

Row = dict[str, Any]


class Progress(Protocol):
    """Hears of every step of a launch, in this order."""

    def stage(self, text: str) -> None:
        """Something that takes seconds begins."""
        ...

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        """The sweep has `planned` trials, of which `finished` have rows already and `failed` stay as they failed;
        `others` are rows of other trials."""
        ...

    def row(self, row: Row) -> None:
        """A trial is done: its row, with `label`."""
        ...

    def end(self) -> None:
        """The sweep ends, however it does."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        """Nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
