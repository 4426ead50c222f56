"""What probes have found is kept by device and shape, and a damaged or lost file costs a plan nothing."""

from __future__ import annotations

import json

import pytest
import torch

from raysweep.config.trial import Trial
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.shards import probe
from raysweep.shards.costs import SOLVING, mask_rate, step_rate
from raysweep.shards.rates import ALWAYS, CACHE_FILE, Probed, probed_rates

STEPS = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.5, "learning_rate": 0.01}
BLOCK = Trial.model_validate(STEPS | {"granularity": "block"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / CACHE_FILE


@pytest.fixture
def probed(tiny_llama):
    source = ModelSource(str(tiny_llama))
    return Probed(source, read_shape(source), "float32", "cpu", 1, 32)


@pytest.fixture
def measured(monkeypatch):
    """What was asked of the probe, which answers with ones."""
    asked = []

    def measure(probed, wanted):
        asked.append(set(wanted))
        opening = [f"open {rate}" for rate in wanted]
        return dict.fromkeys([*ALWAYS, *wanted, *opening], 1.0)

    monkeypatch.setattr(probe, "measure", measure)
    return asked


def test_a_device_is_asked_once_and_for_what_is_missing(cache, probed, measured):
    wanted = {step_rate(BLOCK): BLOCK}
    first = probed_rates(probed, wanted)
    assert probed_rates(probed, wanted) == first
    assert probed_rates(probed, {}, measures=False) == first
    mask = {mask_rate(BLOCK): BLOCK}
    assert probed_rates(probed, wanted | mask, measures=False) is None
    probed_rates(probed, wanted | mask)
    probed_rates(probed, wanted, again=True)
    assert measured == [{step_rate(BLOCK)}, {mask_rate(BLOCK)}, {step_rate(BLOCK)}]
    assert probed_rates(probed, mask, measures=False) is not None  # measuring some anew forgets no others


def test_another_number_of_threads_or_length_is_another_device(cache, probed, measured):
    from dataclasses import replace

    keys = {
        probed.key,
        replace(probed, threads=2).key,
        replace(probed, length=16).key,
        replace(probed, dtype="bfloat16").key,
    }
    assert len(keys) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\0", None])
def test_a_damaged_file_is_measured_again(content, cache, probed, measured):
    cache.parent.mkdir()
    cache.write_text(
        content if content is not None else json.dumps({probed.key: dict.fromkeys(ALWAYS, "fast")})
    )
    assert probed_rates(probed, {}) is not None
    assert probed_rates(probed, {}) is not None
    assert len(measured) == 1


def test_a_file_that_cannot_be_written_costs_nothing(cache, probed, measured):
    cache.mkdir(parents=True)  # a folder in its place
    assert probed_rates(probed, {}) is not None


def test_a_probe_that_fails_leaves_times_unknown(cache, probed, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probe, "measure", fail)
    assert probed_rates(probed, {}) is None
    assert "out of memory" in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "matrix"},
        {"granularity": "matrix", "input_stream": "pruned"},
        {"granularity": "subblock", "loss": "cosine"},
        {"granularity": "window:2", "trainable": "lora"},
        {"granularity": "model", "max_grad_norm": 1.0, "optimizer": "sgd"},
    ],
)
def test_steps_of_every_kind_are_measured(fields, cache, probed):
    trial, threads = Trial.model_validate(STEPS | fields), torch.get_num_threads()
    found = probe.measure(probed, {step_rate(trial): trial})
    assert all(seconds >= 0 for seconds in found.values())
    assert found[step_rate(trial)] > 0
    assert set(found) == {*ALWAYS, step_rate(trial), f"open {step_rate(trial)}"}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria", "sparsegpt", "random", "module:function"])
@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_masks_of_every_kind_are_measured(criterion, pattern, cache, probed):
    trial = Trial.model_validate({"recovery": "none", "criterion": criterion} | pattern)
    found = probe.measure(probed, {mask_rate(trial): trial})
    assert found[mask_rate(trial)] > 0
    assert ("factors" in found) == (criterion == "sparsegpt")


def test_exact_solutions_are_measured(cache, probed):
    fields = {name: value for name, value in STEPS.items() if name != "learning_rate"}
    trial = Trial.model_validate(fields | {"granularity": "matrix", "optimizer": "exact"})
    assert probe.measure(probed, {SOLVING: trial})[SOLVING] > 0


def test_long_sequences_of_large_models_are_shortened_on_cpus(probed, monkeypatch):
    monkeypatch.setattr(probe, "CPU_STEP_FLOPS", 6 * probed.weights * 2 * 16.0)
    trial = BLOCK
    lengths = []
    original = probe._Probe._range

    def spy(self, length, samples):
        lengths.append(length)
        return original(self, length, samples)

    monkeypatch.setattr(probe._Probe, "_range", spy)
    assert probe.measure(probed, {step_rate(trial): trial})[step_rate(trial)] > 0
    assert set(lengths) == {16, 8}


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_what_would_take_long_is_measured_on_one_matrix(criterion, probed, monkeypatch):
    monkeypatch.setattr(probe, "CPU_STEP_FLOPS", 1.0)
    masks = Trial.model_validate({"recovery": "none", "criterion": criterion, "sparsity": 0.5})
    fields = {name: value for name, value in STEPS.items() if name != "learning_rate"}
    exact = Trial.model_validate(fields | {"granularity": "matrix", "optimizer": "exact"})
    found = probe.measure(probed, {mask_rate(masks): masks, SOLVING: exact})
    assert all(seconds > 0 for rate, seconds in found.items() if rate != "factors")
