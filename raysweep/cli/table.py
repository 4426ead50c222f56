"""Prints the table of a sweep: as wide as there is room for, and saying so where columns had to go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import accumulate
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from raysweep.analysis.rows import Row, failures, trial_label
from raysweep.analysis.table import (
    LATER_MASK_FIELDS,
    MASK_COLUMNS,
    Summary,
    fixed_columns,
    mask_groups,
    summary_table,
)
from raysweep.cli.numbers import MIB, count, decimals_for, fixed
from raysweep.config.calibration import CALIBRATION_COLUMNS
from raysweep.results.schema import OPEN_PREFIXES, TASK_PREFIX

if TYPE_CHECKING:
    from rich.console import Console

Cells = list[str]

TITLES = {
    "criterion": "criterion",
    "perplexity": "perplexity",
    "validation_perplexity": "validation\nperplexity",
    "output_error_calibration": "output\nerror",
    "device_seconds": "device\nseconds",
    "device_seconds_standalone": "standalone\nseconds",
    "peak_recovery_bytes": "recovery\nMiB",
    "learning_rate": "learning\nrate",
    "start_from": "start from",
    "calibration_seed": "calibration\nseed",
}
FIRST_TO_GO = (
    "output_error_calibration",
    "device_seconds",
    "model_hash",
    "peak_recovery_bytes",
    "device_seconds_standalone",
)
"""Columns that a narrow table does without, in this order, so that one of cost stays long; then tasks and other
perplexities. The rest wraps."""
BESIDE_LABELS = ("model", "model_hash", "dtype", "evaluation")  # what tells trials apart and no label says
SETTINGS = ("criterion", "learning_rate", "start_from", "calibration_seed")  # which labels say
LEAST_WORDS = 8  # characters of a column of words
LEAST_LABEL = 24  # characters of a column of labels
GAP = 2  # characters between columns: one of padding, one of the divider


@dataclass(frozen=True)
class ColumnText:
    """A column as text. title: its lines;  right: whether it is aligned to the right, as numbers are
    least: characters that it can do with, wrapping between words
    """

    name: str
    title: str
    cells: Cells
    right: bool
    least: int | None = None

    @property
    def width(self) -> int:
        return self.least or max(len(line) for line in [*self.title.split("\n"), *self.cells])


def print_summary(
    console: Console, rows: Sequence[Row], sort: str | None = None, best: Collection[str] = ()
) -> None:
    """The table of `rows`, what all of them have in common, and the trials that were stopped or failed.

    best: identities of the trials whose validation perplexity is marked
    """
    table, sorted_by = summary_table(rows, sort), sort.removeprefix("-") if sort else None
    if table.rows:
        columns = table_columns(table)
        labeled = partial(labeled_columns, table, rows, sorted_by)
        shown, dropped = arranged(columns, labeled, console.width, sorted_by)
        _print_rows(console, table, shown, best, grouped=sort is None)
        _print_caption(
            console, fixed_columns(table), table.rows, (width_of(columns), dropped), marked=bool(best)
        )
    stopped = sum(row["status"] == "stopped" for row in rows)
    if stopped:
        from rich.text import Text

        console.print(Text(f"Stopped by the scheduler: {count(stopped, 'trial')}, not shown", style="dim"))
    failed = failures(rows)
    if failed:
        _print_failures(console, failed)


def table_columns(table: Summary) -> list[ColumnText]:
    """The columns of a summary table as text; recovery and granularity share one."""
    names = [name for name in table.columns if name != "granularity"]
    told = {name: table.values(name) for name in names}
    if "granularity" in table.columns:
        pairs = zip(table.values("granularity"), told["recovery"], strict=True)
        told["recovery"] = [
            recovery if granularity is None else granularity for granularity, recovery in pairs
        ]
    if "criterion" in told:
        for place, recovery in enumerate(told["recovery"]):
            if recovery == "dense":
                told["criterion"][place], told["recovery"][place] = "dense", ""
    return [_column(name, values) for name, values in told.items()]


def labeled_columns(table: Summary, rows: Sequence[Row], sorted_by: str | None = None) -> list[ColumnText]:
    """The same table with one column for all settings of a trial, as progress lines show them, and with the one that it
    is sorted by."""
    by_id = {row["trial_id"]: row for row in rows}
    shown = [by_id[identity] for identity in table.values("trial_id")]  # of `table` criterion has other words
    calibrated = [name for name in CALIBRATION_COLUMNS if name in table.columns and name not in SETTINGS]
    labels = [_calibrated(trial_label(row), row, calibrated) for row in shown]
    words = max((len(word) for label in labels for word in label.split()), default=0)
    trial = ColumnText("trial", "trial", labels, right=False, least=max(words, LEAST_LABEL))
    measured = [name for name in (*BESIDE_LABELS, *TITLES) if name not in SETTINGS]
    kept = [
        name for name in table.columns if name in (*measured, sorted_by) or name.startswith(OPEN_PREFIXES)
    ]
    return [trial, *(_column(name, table.values(name)) for name in kept)]


def _calibrated(label: str, row: Row, names: Sequence[str]) -> str:
    """A label with what else differs between the calibration sets of a table: such rows do not compare."""
    told = (f"{name.replace('_', '.', 1)}={row[name]}" for name in names if row[name] is not None)
    return " ".join([label, *told])


def arranged(
    columns: list[ColumnText],
    labeled: Callable[[], list[ColumnText]],
    width: int,
    sorted_by: str | None = None,
) -> tuple[list[ColumnText], list[ColumnText]]:
    """What is shown of a table, and what is not: with a column for each setting where these leave room for a cost."""
    shown, dropped = fitting(columns, width, sorted_by)
    costly = any(column.name == FIRST_TO_GO[-1] for column in dropped)
    if not costly and width_of(shown) <= width:
        return shown, dropped
    return fitting(labeled(), width, sorted_by)


def width_of(columns: list[ColumnText]) -> int:
    return sum(column.width + GAP for column in columns) - GAP


def fitting(
    columns: list[ColumnText], width: int, sorted_by: str | None = None
) -> tuple[list[ColumnText], list[ColumnText]]:
    """The columns that are shown in `width` characters, and those that are not. That of the order stays."""
    others = [c.name for c in columns if c.name.startswith(OPEN_PREFIXES)]
    shown, dropped = list(columns), []
    for name in (*FIRST_TO_GO, *reversed(others)):
        if width_of(shown) <= width:
            break
        if name == sorted_by:
            continue
        gone = [column for column in shown if column.name == name]
        dropped += gone
        shown = [column for column in shown if column.name != name]
    return shown, dropped


def _column(name: str, values: Sequence[Any]) -> ColumnText:
    title = TITLES.get(name, name.replace("_", "\n", 1))
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    shown = _format(name, numbers)
    return ColumnText(name, title, ["" if value is None else shown(value) for value in values], bool(numbers))


def _format(name: str, numbers: list[Any]) -> Callable[[Any], str]:
    if name.split("_")[0] in ("perplexity", "validation", "dense", "pruned") and "perplexity" in name:
        return lambda value: fixed(value, 2)
    if name.startswith(TASK_PREFIX):
        return lambda value: fixed(value, 4)
    if "error" in name:
        decimals = decimals_for(numbers, digits=2, at_most=6)
        return lambda value: fixed(value, max(3, decimals)) if value else "0"
    if name.endswith("bytes"):
        return lambda value: fixed(value / MIB, 1)
    if "seconds" in name:
        return lambda value: fixed(value, 1 if value < 1000 else 0)
    if name == "learning_rate":
        return lambda value: f"{value:.3g}"  # of a drawn one more digits say nothing
    return _number_or_word


def _print_rows(
    console: Console, table: Summary, columns: list[ColumnText], best: Collection[str], grouped: bool
) -> None:
    """Rows under a head, a gap where a new mask begins. As lines: rich's own tables take a second for 2,000 rows."""
    from rich.text import Text

    widths = _widths(columns, console.width)
    line = partial(_lines, widths=widths, rights=[column.right for column in columns])
    heads = [column.title.split("\n") for column in columns]
    height, lines = max(map(len, heads)), list[Text]()
    for level in range(height):
        cells = [head[level - height] if level >= height - len(head) else "" for head in heads]
        lines.append(Text(line(cells)[0], style="bold"))
    rule = "-" if console.options.ascii_only else "─"
    lines.append(Text(rule * (sum(widths) + GAP * len(widths) - GAP)))
    groups = mask_groups(table) if grouped else list(range(len(table.rows)))
    sections = _sections(columns, groups) if grouped else [0] * len(table.rows)
    ends = list(accumulate(widths, lambda end, width: end + GAP + width))
    spans = {c.name: (end - width, end) for c, end, width in zip(columns, ends, widths, strict=True)}
    mark = spans.get("validation_perplexity", (0, 0))
    for place, row in enumerate(table.rows):
        repeated = grouped and place > 0 and groups[place] == groups[place - 1]
        for text in line([_cell(column, place, repeated) for column in columns]):
            shown = Text(text, style="dim" if row["recovery"] == "dense" else "")
            if row["trial_id"] in best:
                shown.stylize("bold green", *mark)
            lines.append(shown)
        if place + 1 < len(table.rows) and sections[place] != sections[place + 1]:
            lines.append(Text())
    console.print(*lines, sep="\n", soft_wrap=True)


def _widths(columns: Sequence[ColumnText], room: int) -> list[int]:
    """As wide as what they hold; where that is too much, columns of words become narrower, the widest first."""
    widths = [max(len(line) for line in [*column.title.split("\n"), *column.cells]) for column in columns]
    words = [place for place, column in enumerate(columns) if not column.right]
    while sum(widths) + GAP * (len(widths) - 1) > room:
        widest = max(words, key=lambda place: widths[place], default=None)
        if widest is None or widths[widest] <= LEAST_WORDS:
            break
        widths[widest] -= 1
    return widths


def _lines(cells: Sequence[str], widths: Sequence[int], rights: Sequence[bool]) -> list[str]:
    """The lines of a row, more than one where words wrap."""
    wrapped = [
        [cell] if len(cell) <= width else wrap(cell, width, break_on_hyphens=False)
        for cell, width in zip(cells, widths, strict=True)
    ]
    lines = []
    for level in range(max(map(len, wrapped))):
        parts = [pieces[level] if level < len(pieces) else "" for pieces in wrapped]
        aligned = (
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, rights, strict=True)
        )
        lines.append((" " * GAP).join(aligned).rstrip())
    return lines


def _sections(columns: list[ColumnText], groups: list[int]) -> Sequence[object]:
    """By row, what changes where a gap belongs: the mask; where masks have few rows, what the first column says, if
    that is less."""
    if len(groups) > 2 * len(set(groups)):
        return groups
    leading = columns[0].cells
    return leading if 2 * len(set(leading)) <= len(set(groups)) else [0] * len(groups)


def _cell(column: ColumnText, place: int, repeated: bool) -> str:
    hidden = repeated and column.name in (*MASK_COLUMNS, *LATER_MASK_FIELDS)
    return "" if hidden else column.cells[place]


def _print_caption(
    console: Console,
    constants: Mapping[str, Any],
    rows: Sequence[Row],
    hint: tuple[int, list[ColumnText]],
    marked: bool,
) -> None:
    """hint: the width of the whole table, and what is not shown of it"""
    from rich.text import Text

    names = [name.removeprefix("perplexity_") for name in rows[0] if name.startswith("perplexity_")]
    measured_alike = len({row["evaluation_protocol"] for row in rows} - {None}) <= 1
    of_all, of_recovered = constant_words(constants)
    of_all += [f"perplexity on {names[0]}"] if names and measured_alike else []
    console.print()
    console.print(Text("All: " + ", ".join(of_all), style="dim"))
    if of_recovered:
        console.print(Text("Recovered with: " + ", ".join(of_recovered), style="dim"))
    if marked and console.color_system is not None:
        console.print(Text("Green: best of its cell", style="dim"))
    width, dropped = hint
    if dropped:
        gone = ", ".join(column.name for column in dropped)
        console.print(Text(f"No room for {gone}; a terminal {width} characters wide has it", style="dim"))


def constant_words(constants: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What all trials have in common (`sparsity 0.6`), and what all have that recover (`epochs 3`); as far as it is not
    the usual."""
    from raysweep.config.field_groups import RECOVERY_FIELDS, RETRAIN_DEFAULTS, RETRAIN_FIELDS
    from raysweep.config.fields import default_of, has_settled_default
    from raysweep.config.trial import Trial

    of_all = [str(constants[name]) for name in ("model", "dtype", "criterion") if name in constants]
    of_recovered: list[str] = []
    for name, value in constants.items():
        info = Trial.model_fields.get(name)
        usual = info is not None and has_settled_default(info) and value == default_of(info)
        usual |= RETRAIN_DEFAULTS.get(name) == value
        if info is None or usual or name in ("criterion", "seed"):
            continue
        words = of_recovered if name in (*RECOVERY_FIELDS, *RETRAIN_FIELDS) else of_all
        words.append(f"{name.replace('_', ' ')} {_number_or_word(value)}")
    return [*of_all, *_calibration_words(constants)], of_recovered


def _calibration_words(constants: Mapping[str, Any]) -> list[str]:
    """calibration 64 x 256 tokens of builtin:pystdlib"""
    samples, length = constants.get("calibration_num_samples"), constants.get("calibration_sequence_length")
    dataset, seed = constants.get("calibration_dataset"), constants.get("calibration_seed")
    size = f" {samples} x {length} tokens" if samples and length else ""
    source = f" of {dataset}" if dataset and dataset != constants.get("model") else ""
    words = [f"calibration{size}{source}"] if size or source else []
    return [*words, f"calibration seed {seed}"] if seed else words


def _number_or_word(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _print_failures(console: Console, failed: list[tuple[str, str]]) -> None:
    from rich.text import Text

    console.print()
    console.print(Text(f"Failed: {len(failed)}", style="bold red"))
    for label, reason in failed:
        console.print(Text(f"  {label}: {reason}", style="red"), soft_wrap=True)
