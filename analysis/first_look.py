"""A first look at a sweep: the best granularity, what recovery wins back and costs, and the error by depth.

Usage: first_look.py PATH_OR_NAME
"""

from __future__ import annotations

import sys

import pandas as pd

from raysweep import load_results, load_units
from raysweep.errors import RaysweepError

MASK = ["model", "criterion", "sparsity", "pattern"]
HIDDEN = {*MASK, "recovery"}  # where all rows agree
RECOVERY = [*MASK, "recovery", "granularity"]


def best_granularity(rows: pd.DataFrame) -> pd.DataFrame:
    """The recovered trial of every mask with the lowest validation perplexity, which the test text does not choose.

    A sweep without validation text is compared by `perplexity`.
    """
    chooser = "validation_perplexity" if rows["validation_perplexity"].notna().any() else "perplexity"
    recovered = rows[rows["granularity"].notna()].sort_values(chooser, kind="stable")
    columns = list(dict.fromkeys([*MASK, "granularity", "learning_rate", chooser, "perplexity"]))
    return recovered.drop_duplicates(MASK)[columns].sort_values(MASK, ignore_index=True)


def won_back(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the perplexity that pruning loses, the share that recovery wins back: 1 = as good as the dense model.

    The mean over the trials of a kind, such as seeds and learning rates, and the best of them. Not a number where
    pruning loses nothing.
    """
    recovered = rows[rows["granularity"].notna()]
    lost = recovered["pruned_perplexity"] - recovered["dense_perplexity"]
    share = (recovered["pruned_perplexity"] - recovered["perplexity"]) / lost.where(lost > 0)
    return _by_kind(recovered.assign(won_back=share), won_back=("won_back", "mean"), best=("won_back", "max"))


def cost(rows: pd.DataFrame) -> pd.DataFrame:
    """Busy seconds of devices for one trial of each kind, as if it had run alone. On CPUs core-seconds."""
    pruned = rows[rows["recovery"] != "dense"]
    return _by_kind(
        pruned,
        seconds=("device_seconds_standalone", "mean"),
        peak_mib=("peak_recovery_bytes", lambda size: size.astype("float64").mean() / 2**20),
    )


def error_by_depth(rows: pd.DataFrame, units: pd.DataFrame) -> pd.DataFrame:
    """Output error of the pruned model after every block, one column for each block; the mean over trials of a kind."""
    blocks = units[units["kind"] == "block"].merge(rows[["trial_id", *RECOVERY]], on="trial_id")
    blocks = blocks[blocks["recovery"] != "dense"]
    means = blocks.groupby([*RECOVERY, "block"], dropna=False)["error_after"].mean()
    return means.unstack("block").reset_index()


def _by_kind(rows: pd.DataFrame, **measures: object) -> pd.DataFrame:
    counted = {"trials": ("trial_id", "size"), **measures}
    return rows.groupby(RECOVERY, dropna=False).agg(**counted).reset_index()


def _show(title: str, table: pd.DataFrame) -> None:
    """Prints a table without what is the same for all its rows, such as the only model."""
    varies = [name for name in table if name not in HIDDEN or table[name].nunique(dropna=False) > 1]
    print(f"\n{title}")
    text = table[varies].to_string(index=False, na_rep="", float_format="{:.4g}".format)
    print(text if len(table) else "nothing yet")


def main(path_or_name: str) -> None:
    rows = load_results(path_or_name)
    finished = rows[rows["status"] == "finished"]
    print(f"{len(finished)} finished trials of {len(rows)}")
    _show("Best granularity by validation perplexity", best_granularity(finished))
    _show("Share of the lost perplexity that recovery wins back", won_back(finished))
    _show("Device seconds of a trial that ran alone", cost(finished))
    _show("Output error behind each block", error_by_depth(finished, load_units(path_or_name)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except RaysweepError as error:
        sys.exit(str(error))
