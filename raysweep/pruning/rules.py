"""How many weights a mask removes, and among which they are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raysweep.errors import UsageError

ComparisonGroup = Literal["row", "matrix"]


@dataclass(frozen=True)
class MaskRule:
    """How many weights go, and among which they are ranked.

    n_of_m:  (N, M): N kept of M consecutive inputs; then `sparsity` and `comparison_group` do not apply
    sparsity: fraction removed of every comparison group, rounded down to a whole count
    comparison_group: an output row, or the whole matrix
    """

    sparsity: float = 0.0
    n_of_m: tuple[int, int] | None = None
    comparison_group: ComparisonGroup = "row"


def check_n_of_m(inputs: int, kept: int, size: int) -> None:
    """Raises UsageError when a row of `inputs` weights cannot be cut into groups of `size`."""
    if inputs % size:
        raise UsageError(
            f"pattern {kept}:{size} needs a number of inputs that {size} divides, not {inputs}",
            allowed=f"M among the divisors of {inputs}",
            remedy="Choose another pattern, or pattern: unstructured.",
        )
