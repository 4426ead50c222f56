"""Shows a launch while it runs: a live picture on terminals, one plain line for every step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from raysweep.cli.cells import best_cells
from raysweep.cli.console import messages, terminal_height
from raysweep.cli.numbers import clock, count, duration, fixed
from raysweep.cli.tally import Row, Tally

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

BAR_WIDTH = 36
CLEANING = "Cleaning up"  # Ray takes seconds to end
LINES_BESIDE_CELLS = 8  # of the live picture and the prompt: the cells get the rest of the terminal's height


class Display(Protocol):
    """What a launch tells its progress to (raysweep.launching.progress.Progress), with the tally it keeps."""

    tally: Tally

    def stage(self, text: str) -> None: ...

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None:
        """Nothing of the display runs after this."""
        ...


@contextmanager
def shown(tally: Tally) -> Iterator[Display]:
    """A display for the length of the context; nothing of it keeps running afterwards."""
    console = messages()
    live = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
    display: Display = LiveDisplay(tally, console) if live else PlainDisplay(tally, console)
    try:
        yield display
    finally:
        display.close()


class PlainDisplay:
    """One line for every stage and every trial."""

    def __init__(self, tally: Tally, console: Console) -> None:
        self.tally, self._console = tally, console

    def stage(self, text: str) -> None:
        self._line(text)

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        self.tally.begin(planned, finished, failed)
        kept = f", {finished} finished before" if finished else ""
        kept += f", {failed} failed before" if failed else ""
        kept += f"; {other_rows(others)}" if others else ""
        where = f"; dashboard {dashboard}" if dashboard else ""
        self._line(f"{count(planned, 'trial')}{kept}{where}")

    def row(self, row: dict[str, Any]) -> None:
        self.tally.row(row)
        width = len(str(self.tally.planned))
        left = self.tally.time_left.seconds()
        shown = left and row.get("status") != "failed" and self.tally.done < self.tally.planned
        more = f"  {duration(left)} left" if left and shown else ""
        self._line(f"[{self.tally.done:>{width}}/{self.tally.planned}] {row_words(row)}{more}")

    def end(self) -> None:
        if self.tally.done < self.tally.planned:
            self._line(CLEANING)

    def close(self) -> None:
        """Nothing runs here."""

    def _line(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text), soft_wrap=True)


def other_rows(number: int) -> str:
    return f"{count(number, 'row')} of other trials in this sweep's folder stay as they are"


def row_words(row: Row) -> str:
    """wanda/row 0.6 subblock lr=0.001  perplexity 9.11  validation 6.81  12 s"""
    if row.get("status") == "failed":
        return f"{row.get('label')}  failed: {row.get('error')}"
    words = [str(row.get("label"))]
    for title, name in (("perplexity", "perplexity"), ("validation", "validation_perplexity")):
        if row.get(name) is not None:
            words.append(f"{title} {fixed(row[name], 2)}")
    if row.get("seconds_total") is not None:
        words.append(duration(row["seconds_total"]))
    if row.get("not_kept"):
        words.append(f"not kept: {row['not_kept']}")
    return "  ".join(words)


class LiveDisplay:
    """A picture below what was printed: stage, bar, best so far, dashboard. Finished stages stay above it."""

    def __init__(self, tally: Tally, console: Console) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self.tally, self._console = tally, console
        self._spinner = Spinner("dots", style="cyan")
        self._stage: tuple[str, float] | None = None
        self._dashboard: str | None = None
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=8, transient=True)

    def stage(self, text: str) -> None:
        self._finish_stage()
        self._stage = (text, time.monotonic())
        self._live.start()

    def begin(self, planned: int, finished: int, failed: int, dashboard: str | None, others: int) -> None:
        from rich.text import Text

        self._finish_stage()
        self.tally.begin(planned, finished, failed)
        if others:
            self._console.print(Text.assemble(("! ", "yellow"), other_rows(others)))
        self._dashboard = dashboard
        self._live.start()

    def row(self, row: dict[str, Any]) -> None:
        from rich.text import Text

        self._finish_stage()
        self.tally.row(row)
        if row.get("status") == "failed":
            self._console.print(Text.assemble(("✗ ", "bold red"), row_words(row)))
        elif row.get("not_kept"):
            self._console.print(Text.assemble(("! ", "yellow"), row_words(row)))

    def end(self) -> None:
        self._stage = (CLEANING, time.monotonic())

    def close(self) -> None:
        self._stage = None
        self._live.stop()

    def _finish_stage(self) -> None:
        from rich.text import Text

        if self._stage is not None:
            text, since = self._stage
            took = duration(time.monotonic() - since)
            self._console.print(Text.assemble(("✓ ", "green"), text, (f"  {took}", "dim")))
            self._stage = None

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._stage is not None:
            self._spinner.update(text=Text(self._stage[0]))
            parts.append(self._spinner)
        if self.tally.planned:
            parts += [Text(""), self._bar()]
            if self.tally.best:
                parts += [Text(""), self._cells()]
            if self._dashboard:
                parts += [Text(""), Text.assemble(("dashboard  ", "dim"), (self._dashboard, "cyan"))]
        return Group(*parts)

    def _bar(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(
            total=self.tally.planned,
            completed=self.tally.done,
            width=min(BAR_WIDTH, self._console.width // 3),
            complete_style="cyan",
            finished_style="green",
        )
        grid.add_row(bar, self._counts())
        return grid

    def _counts(self) -> Text:
        from rich.text import Text

        tally, left = self.tally, self.tally.time_left.seconds()
        words: list[str | tuple[str, str]] = [
            (f"{tally.done}", "bold"),
            f" of {count(tally.planned, 'trial')}",
        ]
        if tally.failed:
            words += ["  ", (f"{tally.failed} failed", "bold red")]
        words += [(f"  {clock(tally.time_left.elapsed)}", "dim")]
        if left:
            words += [(f"  about {clock(left)} left", "cyan")]
        return Text.assemble(*words)

    def _cells(self) -> Table:
        return best_cells(self.tally, max(3, terminal_height() - LINES_BESIDE_CELLS))
