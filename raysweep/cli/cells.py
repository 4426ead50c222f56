"""The best trials of a sweep so far, cell by cell: in the live picture of a launch, and in `raysweep status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raysweep.cli.numbers import count, fixed
from raysweep.cli.tally import Row, Tally

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def best_cells(tally: Tally, room: int) -> Table:
    """Dense, then the best trial of every cell, the cells that improved last at the end; at most `room` of them."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        grid.add_column(overflow="ellipsis", no_wrap=True)
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    grid.add_row(
        "",
        Text("best so far", style="dim"),
        Text(_short(tally.search.metric), style="dim"),
        Text("perplexity", style="dim"),
    )
    if tally.dense is not None:
        grid.add_row(*_cell(tally.search.metric, "", "dense", tally.dense, "dim"))
    cells = list(tally.best.items())
    for cell, row in cells[:room]:
        title = " ".join(_word(part) for part in cell if part is not None)
        grid.add_row(*_cell(tally.search.metric, title, str(row.get("label", "")), row, "bold"))
    if len(cells) > room:
        grid.add_row("", Text(f"and {count(len(cells) - room, 'more cell')}", style="dim"))
    return grid


def _cell(metric: str, title: str, label: str, row: Row, style: str) -> list[Text]:
    from rich.text import Text

    values = [row.get(metric), row.get("perplexity")]
    numbers = ["" if value is None else f"{value:.4g}" if value < 1 else fixed(value, 2) for value in values]
    return [
        Text(title, style="cyan"),
        Text(label),
        Text(numbers[0], style=style),
        Text(numbers[1], style="dim"),
    ]


def _short(metric: str) -> str:
    return {"validation_perplexity": "validation"}.get(metric, metric.replace("_", " "))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
