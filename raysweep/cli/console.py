"""Where commands write: results on stdout, everything else on stderr; plain text and JSON documents."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 80  # of text that no terminal shows, unless COLUMNS says otherwise


def forget_odd_sizes() -> None:
    """Removes COLUMNS and LINES from the environment where they are no sizes: rich takes any digits for a number."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "80")):
            del os.environ[name]


def output() -> Console:
    """Stdout. Colors on terminals only; as wide as the terminal, COLUMNS, or 80. Bytes in paths that are no text are
    escaped."""
    from rich.console import Console

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(width=_width(sys.stdout.isatty()), highlight=False, emoji=False)


def new_table() -> Table:
    """A table with a line under its head alone."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False
    )


def messages() -> Console:
    """Stderr."""
    from rich.console import Console

    return Console(stderr=True, width=_width(sys.stderr.isatty()), highlight=False, emoji=False)


def say(text: str, style: str = "") -> None:
    """One message on stderr, never wrapped by us, so that paths can be copied."""
    from rich.text import Text

    messages().print(Text(text, style=style), soft_wrap=True)


def say_error(text: str) -> None:
    """`error: ...` on stderr. On terminals the word is red, and long lines wrap within their indent."""
    from rich.padding import Padding
    from rich.text import Text

    console = messages()
    lines = [Text(line.lstrip()) for line in text.split("\n")]
    indents = [len(line) - len(line.lstrip()) for line in text.split("\n")]
    lines[0] = Text.assemble(("error: ", "bold red"), lines[0])
    for line, indent in zip(lines, indents, strict=True):
        if console.is_terminal:
            console.print(Padding(line, (0, 0, 0, indent), expand=False))
        else:
            console.print(Text(" " * indent).append_text(line), soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as CSV on stdout: empty where a column does not apply, moments as ISO text."""
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(json_rows(rows))
    sys.stdout.flush()


def json_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as JSON has them: null where a column does not apply, moments as ISO text."""
    return [{name: _json_value(value) for name, value in row.items()} for row in rows]


def _json_value(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def quiet_libraries() -> None:
    """Bars and repeated warnings of the Hugging Face libraries would run through our own display.

    Call it before they are imported. Who wants the bars sets these variables to 0.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _width(terminal: bool) -> int | None:
    if terminal:
        return None  # rich asks the terminal
    return int(os.environ.get("COLUMNS", PIPED_WIDTH))


def terminal_height() -> int:
    return shutil.get_terminal_size().lines
