"""Searches that choose: Optuna's studies within cells, and trials that successive halving stops."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

from raysweep.cli.plan_document import kinds
from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError
from raysweep.launching.launch import launch, prepare_launch
from raysweep.launching.progress import Silent
from raysweep.results.reader import load_results

OPTUNA = {"algorithm": "optuna", "num_samples": 4}
DRAWN = [
    {"recovery": "none", "criterion": "wanda", "sparsity": [0.5, 0.6]},
    {
        "recovery": "reconstruct",
        "criterion": ["magnitude", "wanda"],
        "sparsity": [0.5, 0.6],
        "granularity": "block",
        "learning_rate": {"loguniform": [1e-4, 1.0]},
        "seed": 0,
    },
]


def chosen(rows: Any) -> Any:
    return rows[rows.recovery == "reconstruct"]


def test_a_study_in_each_cell_chooses_what_is_left_open(make_space, tmp_path):
    rows = launch(make_space(sweep=DRAWN, search=OPTUNA), storage=tmp_path, in_process=True)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()
    assert len(rows) == 1 + 2 + 2 * 4
    assert list(chosen(rows).sparsity.value_counts()) == [4, 4]
    assert chosen(rows).learning_rate.between(1e-4, 1.0).all()
    assert chosen(rows).learning_rate.nunique() == 8
    assert set(chosen(rows).criterion) == {"magnitude", "wanda"}


def test_a_continued_search_keeps_its_rows_and_more_samples_extend_it(make_space, tmp_path):
    first = launch(make_space(sweep=DRAWN, search=OPTUNA), storage=tmp_path, in_process=True)
    again = launch(make_space(sweep=DRAWN, search=OPTUNA), storage=tmp_path, in_process=True)
    assert list(again.trial_id) == list(first.trial_id)
    more = launch(
        make_space(sweep=DRAWN, search=OPTUNA | {"num_samples": 6}), storage=tmp_path, in_process=True
    )
    assert set(first.trial_id) < set(more.trial_id)
    assert list(chosen(more).sparsity.value_counts()) == [6, 6]


def test_a_study_of_lists_ends_when_it_has_run_out_of_them(make_space, tmp_path):
    group = DRAWN[1] | {"learning_rate": [0.01, 0.02], "sparsity": 0.5}
    rows = launch(
        make_space(sweep=[group], search=OPTUNA | {"num_samples": 9}), storage=tmp_path, in_process=True
    )
    assert len(rows) == 1 + 4
    assert not chosen(rows)[["criterion", "learning_rate"]].duplicated().any()


def test_a_study_of_lists_is_planned_at_its_size_and_then_finished(make_space, tmp_path):
    """Lists overlap: one trial is listed as well, and two belong to both studies."""
    listed = DRAWN[1] | {"criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    first = listed | {"learning_rate": [0.01, 0.02, 0.03]}
    second = listed | {"learning_rate": [0.02, 0.03, 0.04, 0.05]}
    space = make_space(sweep=[listed, first, second], search=OPTUNA | {"num_samples": 9})
    before = prepare_launch(space, tmp_path / "tiny", "cpu")
    assert (before.planned, before.finished) == (1 + 1 + 2 + 2, 0)
    rows = launch(space, storage=tmp_path, in_process=True)
    after = prepare_launch(space, tmp_path / "tiny", "cpu")
    assert (len(rows), after.planned, after.finished, after.others) == (6, 6, 6, 0)
    assert [plan["planned"] for plan in kinds_of(after)] == [1, 5]


def test_studies_keep_their_rows_when_calibration_sets_are_added(make_space):
    def keys(*seeds):
        space = make_space(sweep=DRAWN, search=OPTUNA, calibration={"seed": list(seeds)})
        return {(study.calibration.seed, study.fixed["sparsity"]): study.key for study in space.studies()}

    few, more = keys(0), keys(1, 0)
    assert len(set(more.values())) == 4
    assert few.items() <= more.items()


OVERLAPPING = {
    "intervals": [
        DRAWN[1] | {"criterion": "wanda", "sparsity": 0.5, "learning_rate": {"loguniform": [1e-3, 0.1]}},
        DRAWN[1] | {"criterion": "wanda", "sparsity": 0.5, "learning_rate": {"loguniform": [1e-2, 1.0]}},
    ],
    "an interval and a list with the same exact trial": [
        DRAWN[1]
        | {
            "criterion": "wanda",
            "sparsity": 0.5,
            "granularity": "matrix",
            "optimizer": ["adamw", "exact"],
            "learning_rate": rates,
        }
        for rates in ({"loguniform": [1e-3, 0.1]}, [0.01, 0.02])
    ],
    "values that are settled otherwise": [
        DRAWN[1]
        | {
            "criterion": "wanda",
            "sparsity": 0.5,
            "granularity": ["matrix", "block"],
            "trainable": ["lora+norms", "weights"],
            "lora_rank": 4,
            "learning_rate": 0.01,
            "seed": [None, 1],
        }
    ],
}


@pytest.mark.parametrize("groups", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_search_that_has_run_is_finished(make_space, tmp_path, groups):
    space = make_space(sweep=groups, search=OPTUNA | {"num_samples": 5})
    rows = launch(space, storage=tmp_path, in_process=True)
    after = prepare_launch(space, tmp_path / "tiny", "cpu")
    assert (len(rows), after.finished, after.others) == (after.planned, after.planned, 0)


def kinds_of(prepared: Any) -> list[dict[str, int]]:
    (model,) = prepared.models
    return [{"planned": planned} for planned, _ in kinds(prepared, model).values()]


def test_a_field_that_does_not_matter_to_a_trial_does_not_hide_its_row(make_space, tmp_path):
    """The learning rate of an exact trial is null, whatever was drawn."""
    group = DRAWN[1] | {"granularity": "matrix", "optimizer": ["adamw", "exact"], "sparsity": 0.5}
    space = make_space(sweep=[group], search=OPTUNA | {"num_samples": 5})
    first = launch(space, storage=tmp_path, in_process=True)
    assert "exact" in set(first.optimizer)
    again = launch(space, storage=tmp_path, in_process=True)
    assert list(again.started_at) == list(first.started_at)


def test_a_listed_trial_is_not_chosen_again(make_space, tmp_path):
    listed = DRAWN[1] | {"criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    groups = [listed, listed | {"learning_rate": [0.01, 0.02]}]
    heard: list[str] = []
    progress = Silent()
    progress.row = lambda row: heard.append(row["trial_id"])
    launch(make_space(sweep=groups, search=OPTUNA), storage=tmp_path, in_process=True, progress=progress)
    assert len(heard) == len(set(heard)) == 3


@pytest.mark.parametrize("search", [OPTUNA, {"algorithm": "random", "num_samples": 2, "scheduler": "asha"}])
def test_what_is_drawn_makes_no_cells(make_space, search):
    group = DRAWN[1] | {"sparsity": {"uniform": [0.3, 0.7]}}
    with pytest.raises(UsageError, match=r"sparsity is drawn.*compare_within"):
        make_space(sweep=[group], search=search)


def test_the_optimizer_hears_of_the_rows(make_space, tmp_path):
    """After a start at random TPE draws near what was best: a continued study is better than draws alone."""
    group = DRAWN[1] | {"criterion": "wanda", "sparsity": 0.6, "learning_rate": {"loguniform": [1e-6, 10.0]}}
    for samples in (12, 24):
        space = make_space(sweep=[group], search=OPTUNA | {"num_samples": samples})
        launch(space, storage=tmp_path, in_process=True)
    rows = chosen(load_results("tiny", tmp_path)).sort_values("started_at")
    best = math.log(rows.loc[rows.validation_perplexity.idxmin()].learning_rate)
    distance = rows.learning_rate.map(lambda rate: abs(math.log(rate) - best))
    assert distance[12:].mean() < 0.6 * distance[:10].mean()


def test_plans_count_the_trials_of_studies(make_space, tmp_path):
    prepared = prepare_launch(make_space(sweep=DRAWN, search=OPTUNA), tmp_path / "tiny", "cpu")
    assert (prepared.planned, prepared.finished) == (11, 0)
    launch(make_space(sweep=DRAWN, search=OPTUNA), storage=tmp_path, in_process=True)
    prepared = prepare_launch(
        make_space(sweep=DRAWN, search=OPTUNA | {"num_samples": 5}), tmp_path / "tiny", "cpu"
    )
    assert (prepared.planned, prepared.finished, prepared.others) == (13, 11, 0)


def test_a_scheduler_without_ray_is_refused(make_space, tmp_path):
    space = make_space(search={"scheduler": "asha"})
    with pytest.raises(UsageError, match="--in-process runs without Ray"):
        launch(space, storage=tmp_path, in_process=True)
    assert not (tmp_path / "tiny").exists()


def test_replicas_and_clusters_without_ray_are_refused(make_space, tmp_path):
    with pytest.raises(UsageError, match="--address names a cluster: local"):
        launch(make_space(), storage=tmp_path, in_process=True, address="local")
    with pytest.raises(UsageError, match="--in-process runs one trial at a time"):
        launch(make_space(execution={"replicas": 2}), storage=tmp_path, in_process=True)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"algorithm": "optuna"}, "num_samples is missing; algorithm 'optuna' needs it"),
        ({"algorithm": "tpe"}, "grid | random | optuna"),
        ({"scheduler": "hyperband"}, "none | asha"),
    ],
)
def test_wrong_searches_are_refused(make_space, search, said):
    with pytest.raises(UsageError, match=said.replace("|", r"\|")):
        make_space(search=search)


@pytest.fixture
def no_cluster(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


LADDER = [
    {
        "recovery": "reconstruct",
        "criterion": "wanda",
        "sparsity": 0.6,
        "granularity": ["block", "subblock"],
        "learning_rate": [1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05],
        "epochs": 2,
    }
]


@pytest.mark.long
def test_successive_halving_stops_trials_and_changes_no_number_of_the_others(
    make_space, tmp_path, no_cluster
):
    space = make_space(sweep=LADDER, search={"scheduler": "asha", "compare_within": ["granularity"]})
    rows = launch(space, storage=tmp_path, address="local")
    assert len(rows) == 17
    recovered = chosen(rows)
    assert set(recovered.status) == {"finished", "stopped"}, recovered.error.dropna().tolist()
    stopped = recovered[recovered.status == "stopped"]
    assert stopped.stopped_at.between(0.2, 0.3).all()  # one of four blocks at both rungs: there is one rung
    assert stopped.perplexity.isna().all()
    assert stopped.device_seconds.gt(0).all()
    assert recovered.groupby("granularity").status.nunique().eq(2).all()
    again = launch(space, storage=tmp_path, address="local")
    assert list(again.trial_id) == list(rows.trial_id)
    worse = [LADDER[0] | {"learning_rate": [*LADDER[0]["learning_rate"], 1e-7]}]
    search = {"scheduler": "asha", "compare_within": ["granularity"]}
    more = launch(make_space(sweep=worse, search=search), storage=tmp_path, address="local")
    assert list(more[more.learning_rate == 1e-7].status) == ["stopped"] * 2  # told of the rungs of the others
    alone = launch(make_space(sweep=LADDER), storage=tmp_path / "grid", in_process=True)
    finished = recovered[recovered.status == "finished"].set_index("trial_id")
    same = alone.set_index("trial_id").loc[finished.index]
    for name in ("perplexity", "validation_perplexity", "unit_error_after", "output_error_calibration"):
        assert list(same[name]) == list(finished[name])
    assert isinstance(space, SearchSpace)
