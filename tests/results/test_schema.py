"""The columns are those of the reference, in one schema for every file."""

from pathlib import Path

import pyarrow as pa

from raysweep.config.sections import CELL_COLUMNS, METRICS
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.results.describe import main
from raysweep.results.schema import (
    NOT_NUMBERS,
    TRIAL_COLUMNS,
    UNIT_COLUMNS,
    planned_columns,
    trial_schema,
    unit_schema,
)

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "results.md"

QUALITY = """perplexity validation_perplexity dense_perplexity pruned_perplexity unit_error_before
unit_error_after output_error_calibration output_error_validation requested_sparsity realized_sparsity"""
COST = """seconds_total seconds_statistics seconds_mask seconds_recovery seconds_evaluation device_seconds
device_seconds_standalone training_flops optimizer_steps tokens_unique tokens_trained trainable_parameters
devices peak_recovery_bytes peak_device_bytes peak_host_bytes"""
PROVENANCE = """fallbacks retries model model_hash calibration_hash validation_hash evaluation_protocol
started_at finished_at raysweep_version torch_version transformers_version ray_version
device_name shards schema_version"""
IDENTITY = "trial_id recovery_id sweep status error"
CALIBRATION = """calibration_dataset calibration_num_samples calibration_sequence_length calibration_sampling
calibration_seed"""
UNITS = """trial_id kind unit block linears loss_before loss_after validation_loss_before
validation_loss_after steps seconds realized_sparsity dead_inputs dampening_used fallback
peak_device_bytes shard"""


def test_every_column_that_users_rely_on_is_there():
    promised = " ".join([IDENTITY, CALIBRATION, QUALITY, COST, PROVENANCE]).split()
    assert {*promised, *Trial.model_fields} <= set(trial_schema().names)
    assert set(UNITS.split()) <= set(unit_schema().names)


def test_names_are_unique_and_described():
    for columns in (TRIAL_COLUMNS, UNIT_COLUMNS):
        assert len({column.name for column in columns}) == len(columns)
        assert all(column.description for column in columns)


def test_numbers_are_all_but_cost_provenance_and_shard():
    varying = {
        *COST.split(),
        *PROVENANCE.split(),
        "sweep",
        "error",
        "error_kind",
        "stopped_at",
        "rungs",
        "study",
        "seconds",
        "shard",
        "threads",
        "tasks",
    }
    assert varying == NOT_NUMBERS


def test_perplexity_columns_follow_perplexity():
    names = trial_schema(["b", "a.c"]).names
    start = names.index("perplexity")
    assert names[start : start + 3] == ["perplexity", "perplexity_b", "perplexity_a.c"]
    assert trial_schema(["b"]).field("perplexity_b").type == pa.float64()


def test_fields_of_a_trial_have_their_types():
    schema = trial_schema()
    expected = {
        "sparsity": "double",
        "epochs": "int64",
        "shuffle": "bool",
        "criterion": "string",
        "seed": "int64",
    }
    assert {name: str(schema.field(name).type) for name in expected} == expected


def test_what_searches_refer_to_are_columns():
    assert {*METRICS, *CELL_COLUMNS} <= set(trial_schema().names)


def test_a_planned_trial_fills_its_own_columns():
    space = SearchSpace.from_dict(
        {
            "name": "a",
            "model": {"path": "m"},
            "calibration": {"dataset": "builtin:x", "seed": 3},
            "sweep": [{"recovery": "none", "criterion": "random", "pattern": "2:4"}],
        }
    )
    dense, pruned = (planned_columns(planned) for planned in space.expand())
    assert set(dense) | set(pruned) <= set(trial_schema().names)
    assert (dense["recovery"], dense.get("calibration_seed"), dense["model"]) == ("dense", None, "m")
    assert (pruned["requested_sparsity"], pruned["calibration_seed"], pruned["seed"]) == (0.5, 3, 3)
    assert (pruned["calibration_dataset"], pruned["calibration_sampling"]) == ("builtin:x", "pack")


def test_the_reference_is_up_to_date(tmp_path):
    target = tmp_path / "results.md"
    main([str(target)])
    assert target.read_text(encoding="utf-8") == REFERENCE.read_text(encoding="utf-8"), (
        "run `python -m raysweep.results.describe docs/results.md`"
    )
