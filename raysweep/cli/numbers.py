"""Numbers as people read them: digits that mean something, units that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

MIB = 1 << 20


def decimals_for(values: Sequence[float], digits: int, at_most: int) -> int:
    """Decimals with which the smallest of `values` still shows `digits` significant digits."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return 0
    return min(at_most, max(0, digits - 1 - math.floor(math.log10(min(sizes)))))


def fixed(value: float, decimals: int) -> str:
    """With that many decimals; very large numbers in powers of ten."""
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """4.2 s, 12 s, 3 min 5 s, 1 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """0:42, 12:05, 1:02:05: for displays that tick."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, thing: str) -> str:
    """1 trial, 2 trials."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def large(number: int) -> str:
    """Three digits and a unit: 5.18 M, 70 B."""
    size = float(number)
    for unit in ("", " K", " M", " B"):
        if size < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:,.0f} T"


def operations(number: float) -> str:
    """Three digits and a unit: 5.18 TFLOP."""
    for unit in ("", "K", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:,.3g} EFLOP"
