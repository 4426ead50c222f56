"""`raysweep evaluate`: the numbers of a sweep's rows, on whatever says what to measure on, and refusals that help."""

from __future__ import annotations

import pytest
import torch

from raysweep.launching.launch import launch


@pytest.fixture
def dense_row(space_file, tmp_path):
    """The dense model's row of the small sweep, in process on one thread."""
    rows = launch(str(space_file), storage=tmp_path / "storage", in_process=True)
    return rows[rows.recovery == "dense"].iloc[0]


def text_options(tiny_text) -> list[object]:
    file = tiny_text / "test.parquet"
    return ["--dataset", file, "--split", "train", "--sequence-length", 32, "--max-windows", 4]


def test_the_number_is_that_of_the_row(raysweep, tiny_llama, tiny_text, dense_row):
    ran = raysweep("evaluate", tiny_llama, *text_options(tiny_text), "--threads", 1, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["perplexity"] == {"text": dense_row.perplexity}  # to the bit
    assert ran.json["dtype"] == "float32"
    (protocol,) = ran.json["protocol"]
    assert (protocol["windows"], protocol["tokens"]) == (4, 128)


def test_a_space_says_what_is_measured(raysweep, tiny_llama, space_file, tmp_path, dense_row):
    for space in (space_file, tmp_path / "storage" / "small" / "space.yaml"):
        ran = raysweep("evaluate", tiny_llama, "--space", space, "--threads", 1, "--json")
        assert ran.json["perplexity"] == {"tiny": dense_row.perplexity}
    fewer = "evaluation.perplexity.0.max_windows=2"
    ran = raysweep("evaluate", tiny_llama, "--space", space_file, "--set", fewer, "--json")
    assert ran.json["protocol"][0]["windows"] == 2


def test_a_table_for_people(raysweep, tiny_llama, tiny_text, dense_row):
    ran = raysweep("evaluate", tiny_llama, *text_options(tiny_text))
    assert ran.out.split()[-4:] == ["text", "4", "128", f"{dense_row.perplexity:.4f}"]
    assert "windows of 32 tokens" in ran.err


def test_the_usual_window_is_no_longer_than_the_model_takes(raysweep, tiny_llama, tiny_text):
    ran = raysweep("evaluate", tiny_llama, "--dataset", tiny_text / "test.parquet", "--split", "train")
    assert "windows of 64 tokens" in ran.err


def test_options_change_how_a_builtin_text_is_measured(raysweep):
    ran = raysweep("evaluate", "builtin:pystdlib", "--max-windows", 2, "--sequence-length", 64, "--json")
    (protocol,) = ran.json["protocol"]
    assert [protocol[name] for name in ("dataset", "windows", "tokens")] == ["builtin:pystdlib", 2, 128]


def test_a_builtin_model_has_its_own_text(raysweep):
    ran = raysweep("evaluate", "builtin:pystdlib", "--json")
    assert ran.status == 0, ran.err
    (protocol,) = ran.json["protocol"]
    assert (protocol["name"], protocol["sequence_length"], protocol["windows"]) == ("pystdlib", 128, 32)
    assert ran.json["perplexity"]["pystdlib"] == pytest.approx(9.15, abs=0.005)  # as the README's table says


REFUSED = {
    "nothing to measure on": (["{model}"], ["nothing to measure", "--dataset", "--space", "--tasks"]),
    "no model": (["no/such/model", "--dataset", "{text}"], ["no/such/model"]),
    "an unknown builtin": (["builtin:pystdlb", "--dataset", "{text}"], ["builtin:pystdlib"]),
    "a text's option alone": (["{model}", "--split", "test"], ["--split", "--dataset"]),
    "text and space": (["{model}", "--dataset", "{text}", "--space", "quickstart"], ["--space", "--dataset"]),
    "settings without a space": (["{model}", "--set", "a=1"], ["--set", "--space"]),
    "an unknown space": (["{model}", "--space", "quickstrt"], ["did you mean 'quickstart'?"]),
    "an unknown dtype": (
        ["{model}", "--dataset", "{text}", "--dtype", "float8"],
        ["--dtype", "float8", "bfloat16"],
    ),
    "unknown kernels": (["{model}", "--kernels", "sparce"], ["sparce", "did you mean 'sparse'?"]),
    "an unknown device": (["{model}", "--dataset", "{text}", "--device", "tpu"], ["tpu", "auto, cpu, cuda"]),
    "a number on the CPU": (["{model}", "--dataset", "{text}", "--device", "cpu:1"], ["cpu:1"]),
    "a window longer than the model takes": (
        ["{model}", "--dataset", "{text}", "--sequence-length", "65"],
        ["--sequence-length: 65", "set it to 64"],
    ),
    "no such text": (["{model}", "--dataset", "no.txt"], ["--dataset: ", "no.txt"]),
    "no such split of its own text": (["builtin:pystdlib", "--split", "dev"], ["--split: ", "validation"]),
    "a window of a space": (
        ["{model}", "--space", "quickstart"],
        ["--space quickstart: evaluation.perplexity: sequence_length: ", "set it to 64"],
    ),
    "no folder, and nothing to measure it on": (["./none"], ["./none", "config.json"]),
    "no name of a model": (["", "--dataset", "{text}"], ["PATH: "]),
    "sparse kernels on a CPU": (
        [
            "{model}",
            "--dataset",
            "{text}",
            "--sequence-length",
            "32",
            "--device",
            "cpu",
            "--kernels",
            "sparse",
        ],
        ["--kernels sparse", "NVIDIA GPUs", "cpu"],
    ),
    "sparse kernels and tasks": (
        ["{model}", "--tasks", "x", "--kernels", "sparse"],
        ["--tasks", "--kernels"],
    ),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused(raysweep, here, tiny_llama, tiny_text, arguments, said):
    places = {"{model}": str(tiny_llama), "{text}": str(tiny_text / "test.parquet")}
    ran = raysweep("evaluate", *(places.get(word, word) for word in arguments))
    assert ran.status == 2, ran.err
    assert all(word in ran.err for word in said), ran.err
    assert "Traceback" not in ran.err
    assert list(here.iterdir()) == []


def test_a_gpu_that_is_not_there(raysweep, tiny_llama, tiny_text):
    ran = raysweep(
        "evaluate", tiny_llama, *text_options(tiny_text), "--device", f"cuda:{torch.cuda.device_count()}"
    )
    assert ran.status == 2
    assert "is not here" in ran.err
