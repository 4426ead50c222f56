"""Where errors arise: output error of the pruned model block by block."""

from __future__ import annotations

import pandas as pd

BLOCK_ERROR = "error_after"


def error_by_depth(rows: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """Squared error over squared target of the whole pruned model at the output of each block.

    rows: finished ones of `with_settings`;  units: of `load_units`
    Columns: stratum, method, block, error (mean over masks and seeds), low and high (the least and the largest), trials
    """
    blocks = units[units["kind"] == "block"]
    known = blocks.merge(rows[["trial_id", "stratum", "method"]], on="trial_id")
    grouped = known.groupby(["stratum", "method", "block"], sort=False)[BLOCK_ERROR]
    table = grouped.agg(error="mean", low="min", high="max", trials="count").reset_index()
    return table.sort_values(["stratum", "method", "block"], kind="stable", ignore_index=True)
