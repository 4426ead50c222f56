"""Numbers of the page as people read them, the same wherever they stand."""

from __future__ import annotations

import math
from typing import Any

MIB = 1 << 20
NOTHING = "\N{EN DASH}"  # where a number is missing or does not apply


def is_missing(value: Any) -> bool:
    return value is None or value != value or not math.isfinite(value)


def perplexity(value: Any) -> str:
    if is_missing(value):
        return NOTHING
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def spread(value: Any) -> str:
    return "" if is_missing(value) else f"\N{PLUS-MINUS SIGN} {value:.{3 if value < 1 else 2}f}"


def seconds(value: Any) -> str:
    if is_missing(value):
        return NOTHING
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def mebibytes(value: Any) -> str:
    """Of bytes."""
    if is_missing(value):
        return NOTHING
    size = value / MIB
    return f"{size:.1f}" if size < 1000 else f"{size:,.0f}"


def whole(value: Any) -> str:
    return NOTHING if is_missing(value) else f"{value:,.0f}"


def short(value: Any) -> str:
    """Three digits at most."""
    return NOTHING if is_missing(value) else f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")


def error(value: Any) -> str:
    """Three digits, zeros at the end too."""
    return NOTHING if is_missing(value) else f"{value:#.3g}".rstrip(".")


def operations(value: Any) -> str:
    return NOTHING if is_missing(value) else f"{value:.2e}".replace("e+", "e")


def times(value: Any) -> str:
    """How many times: 12.3, 0.08."""
    return NOTHING if is_missing(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(value: float) -> str:
    """48 s, 3 min, 5.2 h"""
    if value < 60:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
