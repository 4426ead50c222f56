"""Sweeps with retraining: phases of one launch, shared start weights, costs, and what a killed launch leaves."""

from __future__ import annotations

from typing import Any

import pytest

from raysweep.baseline import retrain as module
from raysweep.errors import UsageError
from raysweep.launching.launch import launch, prepare_launch
from raysweep.launching.retraining import Retraining
from raysweep.results.folders import RETRAINING
from raysweep.results.reader import load_results, load_units
from raysweep.shards.recovery import Recovery
from raysweep.shards.retrained import StartCost
from tests.frames import assert_same_numbers

MASK = {"criterion": "wanda", "sparsity": 0.5}
RETRAIN = {"recovery": "retrain", **MASK, "learning_rate": 0.003, "epochs": 2}
SWEEP = [
    {"recovery": "none", **MASK},
    {"recovery": "reconstruct", **MASK, "granularity": "block", "learning_rate": 0.01},
    RETRAIN,
    RETRAIN | {"trainable": "lora", "lora_rank": 4},
    RETRAIN | {"loss": "distillation", "start_from": {"granularity": "block", "learning_rate": 0.01}},
]


@pytest.fixture
def retrained(make_space, tmp_path) -> Any:
    return launch(make_space(sweep=SWEEP), storage=tmp_path / "first", in_process=True)


def test_one_launch_does_it_all_and_leaves_nothing_but_rows(retrained, tmp_path):
    assert (retrained.status == "finished").all(), retrained.error.dropna().tolist()
    assert len(retrained) == 1 + 5
    rows = retrained[retrained.recovery == "retrain"]
    assert rows.realized_sparsity.nunique() == 1
    assert (rows.realized_sparsity == retrained[retrained.recovery == "none"].realized_sparsity.iloc[0]).all()
    assert (rows.pruned_perplexity == retrained[retrained.recovery == "none"].perplexity.iloc[0]).all()
    assert (rows.perplexity < rows.pruned_perplexity).all()
    costs = ("seconds_recovery", "device_seconds", "peak_recovery_bytes", "training_flops", "tokens_trained")
    assert rows[[*costs]].gt(0).all().all()
    assert (rows.device_seconds_standalone >= rows.device_seconds).all()
    assert (rows.seconds_total > 0).all()
    assert (rows.optimizer_steps == 6).all()
    assert (rows.tokens_unique == 6 * 32).all()
    assert (rows.tokens_trained == 2 * 6 * 32).all()
    units = load_units("tiny", tmp_path / "first")
    kinds = units[units.trial_id.isin(rows.trial_id)].groupby(["trial_id", "kind"]).size()
    assert set(kinds.xs("linear", level=1)) == {28}
    assert set(kinds.xs("block", level=1)) == {4}
    assert not (tmp_path / "first" / "tiny" / "retraining").exists()


def test_retraining_after_reconstruction_starts_where_it_ended(make_space, tmp_path):
    """With a learning rate of next to nothing retraining keeps what it starts from."""
    start = {"granularity": "block", "learning_rate": 0.01}
    still = {"recovery": "retrain", **MASK, "learning_rate": 1e-12}
    sweep = [SWEEP[0], SWEEP[1], still, still | {"start_from": start}]
    rows = launch(make_space(sweep=sweep), storage=tmp_path, in_process=True).set_index("recovery")
    fresh, continued = rows.loc["retrain"].sort_values("start_from", na_position="first").perplexity
    assert fresh == pytest.approx(rows.loc["none"].perplexity, rel=1e-6)
    assert continued == pytest.approx(rows.loc["reconstruct"].perplexity, rel=1e-6)


def test_start_weights_that_a_trial_makes_anyway_are_made_once(make_space, tmp_path, monkeypatch):
    """The reconstruction writes them, and its row pays; without it in the sweep the retraining does."""
    finished: list[str] = []
    go_on = Recovery.go_on

    def counted(self, fraction):
        finished.append(self.calls.name)
        return go_on(self, fraction)

    monkeypatch.setattr(Recovery, "go_on", counted)
    monkeypatch.setattr(Retraining, "clean_up", lambda *_: None)
    alone = launch(make_space(sweep=SWEEP[4:]), storage=tmp_path / "alone", in_process=True)
    assert len(finished) == 1
    both = launch(make_space(sweep=[SWEEP[1], *SWEEP[4:]]), storage=tmp_path / "both", in_process=True)
    assert len(finished) == 2
    (start,) = (tmp_path / "both" / "tiny" / RETRAINING).glob("start-*")
    assert StartCost.read(start).owner == both[both.recovery == "reconstruct"].trial_id.item()
    retrained, other = both[both.recovery == "retrain"], alone[alone.recovery == "retrain"]
    assert retrained.perplexity.item() == other.perplexity.item()
    assert retrained.device_seconds_standalone.item() > retrained.device_seconds.item()


def test_text_of_its_own_is_counted_and_part_of_the_identity(make_space, space_dict, tmp_path):
    data = {
        "dataset": space_dict["calibration"]["dataset"],
        "num_samples": 4,
        "sequence_length": 16,
        "seed": 3,
    }
    sweep = [RETRAIN, RETRAIN | {"data": data}, RETRAIN | {"data": data | {"seed": 4}}]
    rows = launch(make_space(sweep=sweep), storage=tmp_path, in_process=True)
    rows = rows[rows.recovery == "retrain"]
    assert sorted(rows.tokens_unique) == [64, 64, 192]
    assert rows.recovery_id.nunique() == rows.perplexity.nunique() == 3


def test_a_launch_that_ends_in_retraining_goes_on_with_the_same_numbers(
    make_space, tmp_path, retrained, monkeypatch
):
    step, taken = module._Retraining._step, []

    def dies(self, *arguments):
        taken.append(1)
        if len(taken) == 9:  # in the third step of the second retraining
            raise KeyboardInterrupt
        return step(self, *arguments)

    space = make_space(sweep=SWEEP, execution={"checkpoint_steps": 2})
    monkeypatch.setattr(module._Retraining, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        launch(space, storage=tmp_path / "second", in_process=True)
    before = load_results("tiny", tmp_path / "second")
    assert set(before.recovery) == {"dense", "none", "reconstruct"}
    launch(space, storage=tmp_path / "second", in_process=True)
    assert len(taken) == 3 * 6 + 1
    assert_same_numbers(tmp_path / "first" / "tiny", tmp_path / "second" / "tiny")
    again = load_results("tiny", tmp_path / "second")
    kept = again[again.trial_id.isin(before.trial_id)]
    assert list(kept.started_at) == list(before.started_at)


def test_interrupted_launches_say_nothing_against_a_retraining(make_space, tmp_path, monkeypatch):
    """A job whose workers end three times has failed, but every launch counts anew."""
    space = make_space(sweep=[RETRAIN])

    def dies(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Retraining, "_step", dies)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                launch(space, storage=tmp_path, in_process=True)
    rows = launch(space, storage=tmp_path, in_process=True)
    assert (rows.status == "finished").all(), rows.error.dropna().tolist()


def test_a_criterion_that_fails_makes_a_failed_row_of_a_retraining_too(make_space, tmp_path, monkeypatch):
    (tmp_path / "own_failing.py").write_text("def score(weight, statistics):\n    raise KeyError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sweep = [RETRAIN | {"criterion": "own_failing:score"}, RETRAIN]
    rows = launch(make_space(sweep=sweep), storage=tmp_path, in_process=True).set_index("criterion")
    assert rows.loc["own_failing:score"].status == "failed"
    assert "KeyError" in rows.loc["own_failing:score"].error
    assert rows.loc["wanda"].status == "finished"


def test_cleaning_up_leaves_what_others_still_need(make_space, tmp_path):
    prepared = prepare_launch(make_space(sweep=SWEEP), tmp_path / "tiny", "cpu")
    model = prepared.models[0]
    trials = prepared.to_retrain(model)
    retraining = Retraining(tmp_path / "tiny", model, trials, 10)
    folders = [trial.retraining(tmp_path / "tiny") for trial in trials]
    foreign = tmp_path / "tiny" / "retraining" / "of-another-model"
    for folder in (foreign, *(each.weights for each in folders), *(each.start for each in folders)):
        folder.mkdir(parents=True, exist_ok=True)
    retraining.clean_up({trials[0].trial_id: "finished", trials[2].trial_id: "finished"})
    assert [each.weights.exists() for each in folders] == [False, True, False]
    assert [each.start.exists() for each in folders] == [True, True, False]  # two start at the same weights
    retraining.clean_up({trial.trial_id for trial in trials})
    assert list((tmp_path / "tiny" / "retraining").iterdir()) == [foreign]


def test_a_retraining_that_diverges_is_a_failed_row_and_runs_again_when_asked(make_space, tmp_path):
    space = make_space(sweep=[RETRAIN | {"learning_rate": [1e30, 0.003]}])
    began = []
    for retry in (False, False, True):
        rows = launch(space, storage=tmp_path, in_process=True, retry_failed=retry).set_index("learning_rate")
        assert rows.loc[1e30].status == "failed"
        assert rows.loc[1e30].error_kind == "numerical"
        assert "not finite" in rows.loc[1e30].error
        assert rows.loc[0.003].status == "finished"
        began.append(rows.loc[1e30].started_at)
    assert began[0] == began[1] < began[2]
    assert not (tmp_path / "tiny" / "retraining").exists()


def test_plans_count_retraining(make_space, tmp_path):
    prepared = prepare_launch(make_space(sweep=SWEEP), tmp_path / "tiny", "cpu")
    assert (prepared.planned, len(prepared.to_retrain(prepared.models[0]))) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "search", "said"),
    [
        ({"loss": "mse"}, {}, "next_token . distillation"),
        ({"optimizer": "exact"}, {}, "adamw"),
        ({"zero_stage": 4}, {}, r"0 \| 1 \| 2 \| 3"),
        ({"offload": "cpu", "zero_stage": 0}, {}, "zero_stage 1 to 3"),
        ({"gradient_accumulation": 3}, {}, "cannot be cut into 3"),
        ({"start_from": {"granularity": "block"}}, {}, r"start_from\.learning_rate"),
        ({"start_from": {"granularty": "block"}}, {}, "did you mean 'granularity'"),
        ({"start_from": {"granularity": "block", "learning_rate": "fast"}}, {}, "a number above 0"),
        ({"data": {"datset": "x"}}, {}, "did you mean 'dataset'"),
        ({"data": {"num_samples": 8}}, {}, r"sweep\[0\]\.data\.dataset: key 'dataset' is missing"),
        ({"start_from": {"granularity": "block", "lr": 0.1}}, {}, "did you mean 'learning_rate'"),
        ({"start_from": {1: 2, "granularity": "block"}}, {}, "start_from"),
        ({"statistics_stream": "recovered"}, {}, "needs recovery 'reconstruct'"),
        ({}, {"scheduler": "asha"}, "cannot be chosen by a study or stopped"),
        ({"learning_rate": [0.1, 0.2]}, {"algorithm": "optuna", "num_samples": 2}, "a sweep of its own"),
    ],
)
def test_what_cannot_be_retrained_is_refused(make_space, changes, search, said):
    with pytest.raises(UsageError, match=said):
        make_space(sweep=[RETRAIN | changes], search=search)
