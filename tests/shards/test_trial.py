"""A trial in rungs: it gives what it gives without them, and its costs hold all that was evaluated on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raysweep import at_once
from raysweep.cluster.nodes import Node
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.placement import Placement
from raysweep.shards import trial as trials
from raysweep.shards.local import LocalGroup
from raysweep.shards.outcome import Rung
from raysweep.shards.plan import make_plan
from raysweep.shards.setup import set_up, shard_specs
from raysweep.shards.worker import ShardWorker
from raysweep.sweep.planning import workload
from raysweep.sweep.prepare import prepare

NODE = Node(cpus=2, gpus=0, memory_bytes=0)


@pytest.fixture
def prepared(make_space):
    group = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
    return prepare(make_space(sweep=[group | {"granularity": "block"}]), "cpu")[0]


def test_rungs_change_no_number_and_count_as_costs(prepared, monkeypatch):
    model, (phase,) = prepared, prepared.phases
    plan = make_plan(model.shape, [NODE], workload(model), model.dtype, shards=2)
    texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
    trial = next(one for one in phase.trials if one.trial.recovery == "reconstruct")
    spent: list[float] = []
    cost_of = trials.evaluation_cost
    monkeypatch.setattr(
        trials,
        "evaluation_cost",
        lambda batches: spent.append(sum(b.seconds for b in batches)) or cost_of(batches),
    )
    with LocalGroup(shard_specs(plan, model.source)) as group:
        set_up(group, plan.ranges, texts, ["block"], model.shape)
        whole = trials.run_trial(group, trial.trial, "whole", 0)
        spent.clear()
        metric = "validation_perplexity"
        *rungs, last = trials.run_in_rungs(group, trial.trial, "in rungs", 0, (0.25, 0.5), metric)
    assert [rung.fraction for rung in rungs if isinstance(rung, Rung)] == [0.25, 0.5]
    assert len(spent) == 3  # the pruned and the dense model are known from the first trial
    assert last.columns["seconds_evaluation"] == pytest.approx(sum(spent))
    assert rungs[1].cost["seconds_evaluation"] == pytest.approx(spent[0] + spent[1])
    for name in ("perplexity", "validation_perplexity", "output_error_calibration", "unit_error_after"):
        assert last.columns[name] == whole.columns[name]


def test_batches_that_shards_measure_together_are_those_of_one_alone(prepared, monkeypatch):
    monkeypatch.setattr(at_once, "CPU_BATCH_TOKENS", 32)
    model, (phase,) = prepared, prepared.phases
    texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
    trial = next(one for one in phase.trials if one.trial.recovery == "reconstruct").trial
    calls: list[int] = []
    forward = ShardWorker.forward

    def noting(worker, name, ends_here, text, start, stop, before):
        calls.append(stop - start)
        return forward(worker, name, ends_here, text, start, stop, before)

    monkeypatch.setattr(ShardWorker, "forward", noting)
    found, longest = [], []
    for placement in (Placement(), Placement(weights="files", trials="disk")):
        plan = make_plan(model.shape, [NODE], workload(model), model.dtype, shards=2)
        plan = replace(plan, placement=placement)
        calls.clear()
        with LocalGroup(shard_specs(plan, model.source)) as group:
            set_up(group, plan.ranges, texts, ["block"], model.shape, placement=placement)
            found.append(trials.run_trial(group, trial, "alone", 0).columns)
        longest.append(max(calls))
    assert longest[1] > longest[0]
    timed = {name for name in found[0] if "seconds" in name} | {"peak_recovery_bytes", "peak_host_bytes"}
    assert all(found[0][name] == found[1][name] for name in found[0].keys() - timed)


def test_shards_with_the_head_take_turns(prepared, monkeypatch):
    model, (phase,) = prepared, prepared.phases
    texts = {name: tokens.input_ids for name, tokens in model.texts(phase).items()}
    trial = next(one for one in phase.trials if one.trial.recovery == "reconstruct").trial
    measured: list[tuple[bool, str, int, int]] = []
    measure = ShardWorker.measure

    def noting(worker, name, text, start, stop, before):
        measured.append((worker.shard.is_first, text, start, stop))
        return measure(worker, name, text, start, stop, before)

    monkeypatch.setattr(ShardWorker, "measure", noting)
    monkeypatch.setattr(
        ShardWorker, "text_batches", lambda _, samples, __: [(k, k + 1) for k in range(samples)]
    )
    evaluations, found = 3, []  # dense, pruned and recovered
    for shards in (1, 2, 3):
        plan = make_plan(model.shape, [NODE], workload(model), model.dtype, shards=shards)
        with LocalGroup(shard_specs(plan, model.source)) as group:
            info = set_up(group, plan.ranges, texts, ["block"], model.shape)
            assert info.heads == ((0,), (1, 0), (2, 0))[shards - 1]
            outcome = trials.run_trial(group, trial, "alone", 0)
            counts = [worker.counts for worker in group.workers]
        assert sum(one.units for one in counts) == len(model.shape.blocks)
        assert sum(one.evaluated_tokens for one in counts) == evaluations * sum(
            info.texts[name].samples * info.texts[name].tokens for name in info.texts if name != CALIBRATION
        )
        found.append({name: value for name, value in outcome.columns.items() if "perplexity" in name})
        batches = sum(len(text.batches) for name, text in info.texts.items() if name != CALIBRATION)
        assert len(measured) == (0 if shards == 1 else evaluations * (batches // 2))
        assert all(is_first for is_first, *_ in measured)
        measured.clear()
    assert batches > 2
    assert found[0] == found[1] == found[2]


def test_trials_know_the_models_that_they_are_compared_with(make_space, tmp_path, monkeypatch):
    """Also with a criterion of the user's own, whose source is part of the identity of its masks alone."""
    (tmp_path / "own_scores.py").write_text("def score(weight, statistics):\n    return weight.abs()\n")
    monkeypatch.syspath_prepend(tmp_path)
    recover = {"recovery": "reconstruct", "granularity": "block", "learning_rate": 0.01, "sparsity": 0.5}
    criteria = ["wanda", "own_scores:score"]
    space = make_space(
        sweep=[
            {"recovery": "none", "criterion": criteria, "sparsity": 0.5},
            recover | {"criterion": criteria},
            recover | {"criterion": "wanda", "statistics_stream": "recovered", "input_stream": "pruned"},
        ]
    )
    found = prepare(space, "cpu")[0].trials
    (dense,) = [one.trial_id for one in found if one.trial.is_dense]
    alone = {one.trial.criterion: one.trial_id for one in found if one.trial.is_pruned_only}
    assert {one.dense_id for one in found} == {dense}
    for one in found:
        of_its_own = one.trial.is_dense or one.trial.statistics_stream == "recovered"
        assert one.pruned_id == (None if of_its_own else alone[one.trial.criterion])
