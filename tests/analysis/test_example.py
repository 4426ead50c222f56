"""Every verdict on the study of the embedded model is the one that numpy and scipy come to from its plain columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from raysweep.analysis.report import report_of
from raysweep.config.space import SearchSpace
from raysweep.results.reader import load_results

STUDY = Path(__file__).resolve().parents[2] / "analysis" / "study"
SPARSITIES, SEEDS = (0.5, 0.6, 0.7), range(5)
ALPHA, MARGIN, RELATIVE = 0.05, 0.1, 0.01


@pytest.fixture(scope="module")
def report():
    return report_of(STUDY / "results" / "study")


@pytest.fixture(scope="module")
def by_hand() -> pd.DataFrame:
    """Of every comparison the perplexities by seed on both sides, and what follows."""
    rows = load_results(STUDY / "results" / "study")
    rows["how"] = rows.granularity.fillna(rows.recovery) + np.where(rows.optimizer == "exact", " exact", "")
    found = []
    for sparsity in SPARSITIES:
        here = rows[rows.sparsity == sparsity]
        recovered, pruned = here[here.recovery == "reconstruct"], here[here.recovery == "none"]
        for how in ("matrix", "matrix exact", "block", "window:2", "model"):
            found.append(
                compare(
                    "granularity",
                    sparsity,
                    how,
                    mean(recovered, "how", how),
                    mean(recovered, "how", "subblock"),
                )
            )
        for criterion in ("magnitude", "wanda", "ria"):
            for question, mine in (
                ("criterion before recovery", pruned),
                ("criterion after recovery", recovered),
            ):
                sides = mean(mine, "criterion", criterion), mean(mine, "criterion", "sparsegpt")
                found.append(compare(question, sparsity, f"{criterion}/row", *sides))
        sides = mean(here, "how", "subblock"), mean(here, "how", "retrain")
        question = "reconstruction and retraining at equal data"
        found.append(compare(question, sparsity, "reconstruction (subblock)", *sides))
    frame = pd.DataFrame(found)
    differs, equal = holm(frame.p_difference), holm(frame.p_equivalence)
    frame["verdict"] = np.where(
        equal <= ALPHA,
        "equivalent",
        np.where(differs > ALPHA, "undecided", np.where(frame.difference < 0, "better", "worse")),
    )
    return frame


def mean(rows: pd.DataFrame, column: str, value: str) -> np.ndarray:
    """Perplexity by seed, over all else."""
    mine = rows[rows[column] == value]
    return np.array([mine[mine.calibration_seed == seed].perplexity.mean() for seed in SEEDS])


def compare(question, sparsity, value, mine, other):
    differences = mine - other
    margin, error = max(MARGIN, RELATIVE * other.mean()), differences.std(ddof=1) / len(SEEDS) ** 0.5
    t, freedom = differences.mean() / error, len(SEEDS) - 1
    outside = [
        stats.t.sf((differences.mean() + margin) / error, freedom),
        stats.t.cdf((differences.mean() - margin) / error, freedom),
    ]
    return {
        "question": question,
        "sparsity": f"sparsity {sparsity:g}",
        "value": value,
        "difference": differences.mean(),
        "p_difference": 2 * stats.t.sf(abs(t), freedom),
        "p_equivalence": max(outside),
    }


def holm(p: pd.Series) -> np.ndarray:
    """The k-th smallest of n times n + 1 - k, and none smaller than one before it."""
    order = np.argsort(p.to_numpy())
    steps = np.minimum(1, np.maximum.accumulate(p.to_numpy()[order] * (len(p) - np.arange(len(p)))))
    corrected = np.empty(len(p))
    corrected[order] = steps
    return corrected


def test_every_verdict_is_that_of_the_computation_by_hand(report, by_hand):
    keys = ["question", "sparsity", "value"]
    found = (
        report.comparisons.assign(sparsity=report.comparisons.stratum.map(report.strata))
        .set_index(keys)
        .sort_index()
    )
    wanted = by_hand.set_index(keys).sort_index()
    assert found.index.tolist() == wanted.index.tolist()
    assert found.verdict.tolist() == wanted.verdict.tolist()
    for column in ("difference", "p_difference", "p_equivalence"):
        np.testing.assert_allclose(found[column], wanted[column], rtol=1e-6)
    assert set(found.verdict) >= {"better", "worse"}


def test_the_study_is_whole_and_its_rates_lie_inside_their_ladders(report):
    assert report.missing == []
    assert report.failed == []
    assert len(report.rows) == 481
    ladder = report_of(STUDY / "results" / "ladder")
    assert ladder.learning_rates.place.unique().tolist() == ["inside"]
    assert ladder.missing == []


def test_its_space_is_what_the_ladder_found():
    from analysis.study.fixed_rates import study

    wanted = SearchSpace.from_yaml(STUDY / "study.yaml")
    assert SearchSpace.from_dict(study(STUDY / "results" / "ladder", seeds=5)) == wanted
    assert SearchSpace.from_yaml(STUDY / "results" / "study" / "space.yaml").expand() == wanted.expand()


def test_it_is_small():
    assert sum(file.stat().st_size for file in (STUDY / "results").rglob("*.parquet")) < 2_000_000


def test_the_recipes_are_the_cheapest_as_good_as_the_best(report):
    """By hand: behind the best mean of validation perplexity by less than the margin with the interval's upper end."""
    rows = load_results(STUDY / "results" / "study")
    rows["how"] = rows.granularity.fillna(rows.recovery) + np.where(rows.optimizer == "exact", " exact", "")
    for recipe in report.recipes.to_dict("records"):
        chosen = rows.set_index("trial_id").loc[recipe["trial_id"]]
        here = rows[(rows.sparsity == chosen.sparsity) & (rows.recovery != "dense")]
        by_seed = here.pivot_table(
            index="calibration_seed", columns=["criterion", "how"], values="validation_perplexity"
        )
        best = by_seed.mean().idxmin()
        behind = by_seed.sub(by_seed[best], axis=0)
        upper = behind.mean() + stats.t.ppf(0.975, 4) * behind.std() / 5**0.5
        good = upper[(upper <= max(MARGIN, RELATIVE * by_seed[best].mean())) | (upper.index == best)].index
        seconds = here.groupby(["criterion", "how"]).device_seconds_standalone.mean()
        assert (chosen.criterion, chosen.how) == seconds.loc[good].idxmin()
