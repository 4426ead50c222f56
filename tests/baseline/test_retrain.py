"""Retraining against a plain loop of PyTorch, over ZeRO's stages and ranks, with masks exact throughout."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raysweep.baseline import retrain as module
from raysweep.baseline.job import RetrainJob
from raysweep.baseline.workers import retrain_here
from raysweep.model.block_files import read_block
from raysweep.shards.retrained import Retrained, failure_in
from tests.baseline.jobs import (
    largest_difference,
    make_job,
    results,
    retrain_trial,
    run_here,
    run_on_ranks,
    start_masks,
)


def naive(model: Path, job: RetrainJob) -> tuple[dict[str, Tensor], list[float]]:
    """AdamW on all parameters, one step after another, with zeros put back after each: none of the product's code."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    masks = start_masks(job)
    ids = torch.from_numpy(np.load(job.ids))
    trial, losses = job.trial, []
    optimizer = torch.optim.AdamW(net.parameters(), lr=trial.learning_rate, weight_decay=0.0)
    steps = [rows for _ in range(trial.epochs) for rows in torch.arange(len(ids)).split(trial.batch_size)]
    warmup = int(trial.warmup_fraction * len(steps))
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(f"{name}.weight").mul_(mask)
    for number, rows in enumerate(steps):
        factor = number / warmup if number < warmup else (len(steps) - number) / max(1, len(steps) - warmup)
        optimizer.param_groups[0]["lr"] = trial.learning_rate * factor
        scores = net(ids[rows]).logits.log_softmax(-1)
        if trial.loss == "distillation":
            target = dense(ids[rows]).logits.detach().log_softmax(-1)
            loss = (target.exp() * (target - scores)).sum(-1).mean()
        else:
            loss = -scores[:, :-1].gather(2, ids[rows][:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, mask in masks.items():
                net.get_parameter(f"{name}.weight").grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(net.parameters(), trial.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return dict(net.named_parameters()), losses


@pytest.mark.parametrize("loss", ["next_token", "distillation"])
def test_a_worker_without_zero_is_a_plain_loop(tiny_llama, tmp_path, loss):
    """20 steps; the last one of every epoch has one sample less, and none is dropped."""
    trial = retrain_trial(zero_stage=0, shuffle=False, epochs=5, loss=loss, learning_rate=0.001)
    job = make_job(tiny_llama, tmp_path, trial)
    found = run_here(job)
    expected, losses = naive(tiny_llama, job)
    assert (found.steps, found.workers) == (20, 1)
    assert found.loss_first == pytest.approx(losses[0], rel=1e-6)
    assert found.loss_last == pytest.approx(losses[-1], rel=1e-5)
    assert largest_difference(results(job), {name: expected[name].detach() for name in results(job)}) < 1e-6


def test_stages_agree_and_zeros_are_those_of_the_mask(tiny_llama, tmp_path):
    jobs = [make_job(tiny_llama, tmp_path, retrain_trial(zero_stage=stage, epochs=3)) for stage in range(4)]
    found = [run_here(job) for job in jobs]
    for job, result in zip(jobs, found, strict=True):
        assert result.loss_last == pytest.approx(found[0].loss_last, rel=1e-5)
        for name, mask in start_masks(job).items():
            assert torch.equal(results(job)[f"{name}.weight"] != 0, mask)
    assert all(result.training_flops == found[0].training_flops for result in found)


@pytest.mark.parametrize("stage", range(4))
def test_nothing_of_a_job_is_left_when_the_next_one_begins(tiny_llama, tmp_path, monkeypatch, stage):
    """Not of one that failed either, and without Python having looked for garbage by itself."""
    models: list[weakref.ref[torch.nn.Module]] = []
    left, begin = [], module.begin_training

    def watched(model, *arguments):
        left.append(sum(one() is not None for one in models))
        models.append(weakref.ref(model))
        return begin(model, *arguments)

    monkeypatch.setattr(module, "begin_training", watched)
    fields = [{}, {"learning_rate": 1e30}, {"loss": "distillation"}, {"trainable": "lora", "lora_rank": 4}]
    jobs = [
        make_job(tiny_llama, tmp_path, retrain_trial(zero_stage=stage, epochs=1, **one)) for one in fields
    ]
    gc.disable()
    try:
        retrain_here(jobs, threads=1)
    finally:
        gc.enable()
    assert [failure_in(job.folder) is None for job in jobs] == [True, False, True, True]
    assert left == [0, 0, 0, 0]
    assert not any(one() for one in models)


@pytest.mark.long
def test_two_workers_agree_with_one_in_every_stage(tiny_llama, tmp_path):
    trials = [retrain_trial(zero_stage=stage, epochs=3) for stage in range(4)]
    trials += [retrain_trial(gradient_accumulation=2, batch_size=4, epochs=2)]
    alone = [make_job(tiny_llama, tmp_path, trial) for trial in trials]
    for job in alone:
        run_here(job)
    together = [make_job(tiny_llama, tmp_path, trial) for trial in trials]
    run_on_ranks(together, 2)
    for one, two in zip(alone, together, strict=True):
        first, second = Retrained.read(one.folder), Retrained.read(two.folder)
        assert second.workers == 2
        assert second.loss_last == pytest.approx(first.loss_last, rel=1e-4)
        for name, mask in start_masks(two).items():
            assert torch.equal(results(two)[f"{name}.weight"] != 0, mask)


@pytest.mark.long
def test_tied_weights_stay_equal_and_go_by_both_names(tiny_llama, tmp_path):
    """Embedding and head are one tensor; both shards that need it find it."""
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    jobs = [make_job(tmp_path / "tied", tmp_path, retrain_trial(zero_stage=stage)) for stage in (2, 3)]
    run_on_ranks(jobs, 2)
    for job in jobs:
        found = results(job)
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert largest_difference(results(jobs[0]), results(jobs[1])) < 1e-5


def test_accumulation_and_checkpointing_change_nothing(tiny_llama, tmp_path):
    plain = make_job(tiny_llama, tmp_path, retrain_trial(batch_size=4, epochs=2))
    run_here(plain)
    for fields in ({"gradient_accumulation": 4}, {"gradient_checkpointing": True}):
        job = make_job(tiny_llama, tmp_path, retrain_trial(batch_size=4, epochs=2, **fields))
        run_here(job)
        assert largest_difference(results(job), results(plain)) < 1e-5


def test_bfloat16_keeps_its_zeros(tiny_llama, tmp_path):
    job = make_job(tiny_llama, tmp_path, retrain_trial(epochs=3), dtype="bfloat16")
    result = run_here(job)
    assert result.loss_last < result.loss_first
    for name, mask in start_masks(job).items():
        assert not results(job)[f"{name}.weight"][~mask].count_nonzero()


@pytest.mark.parametrize("trainable", ["blocks", "weights", "lora", "lora+norms"])
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_what_is_trained_changes_and_nothing_else(tiny_llama, tmp_path, trainable, stage):
    job = make_job(tiny_llama, tmp_path, retrain_trial(trainable=trainable, zero_stage=stage, lora_rank=4))
    run_here(job)
    dense = dict(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).named_parameters())
    start = {name: t for i in range(4) for name, t in read_block(job.start, i).items()}
    changed = {name for name, t in results(job).items() if not torch.equal(t, start.get(name, dense[name]))}
    norms = {name for name in results(job) if "norm" in name}
    weights = {f"{name}.weight" for name in start_masks(job)}
    assert changed == weights | (norms if trainable in ("blocks", "lora+norms") else set())
    for name, mask in start_masks(job).items():
        assert torch.equal(results(job)[f"{name}.weight"] != 0, mask)


def test_a_retraining_goes_on_at_its_last_checkpoint_bitwise(tiny_llama, tmp_path, monkeypatch):
    trial = retrain_trial(epochs=3, zero_stage=2)
    undisturbed = make_job(tiny_llama, tmp_path, trial)
    run_here(undisturbed)
    job = make_job(tiny_llama, tmp_path, trial, checkpoint_steps=4)
    step, taken = module._Retraining._step, []

    def dies(self, *arguments):
        taken.append(1)
        if len(taken) == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(module._Retraining, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_here(job)
    run_here(job)
    assert len(taken) == 7 + (12 - 4)  # it died in step 7, after the checkpoint of step 4
    assert largest_difference(results(job), results(undisturbed)) == 0.0
    first, second = Retrained.read(undisturbed.folder), Retrained.read(job.folder)
    assert (second.loss_first, second.loss_last) == (first.loss_first, first.loss_last)
    assert not (job.folder / "checkpoint").exists()


def test_a_retraining_that_diverges_has_failed_and_the_next_one_runs(tiny_llama, tmp_path):
    bad = make_job(tiny_llama, tmp_path, retrain_trial(learning_rate=1e30))
    good = make_job(tiny_llama, tmp_path, retrain_trial())
    retrain_here([bad, good], threads=1)
    assert "not finite" in str(failure_in(bad.folder))
    assert math.isfinite(Retrained.read(good.folder).loss_last)
