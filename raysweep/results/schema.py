"""The columns of `trials` and `units`: the one list that files, readers and reference are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa

from raysweep.config.calibration import CALIBRATION_COLUMNS, CalibrationConfig
from raysweep.config.expansion import PlannedTrial
from raysweep.config.field_groups import JSON_FIELDS
from raysweep.config.trial import Trial

SCHEMA_VERSION = 1
STATUSES = ("finished", "failed", "stopped")
NUMERICAL, OTHER = "numerical", "other"  # kinds of errors
UNIT_KINDS = ("unit", "linear", "block")
PERPLEXITY_PREFIX, TASK_PREFIX = "perplexity_", "task_"
OPEN_PREFIXES = (PERPLEXITY_PREFIX, TASK_PREFIX)  # of columns, all REAL, that the evaluation of a space names

TEXT, REAL, WHOLE, TRUTH = pa.string(), pa.float64(), pa.int64(), pa.bool_()
MOMENT = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """One column. group: identity, trial, calibration, quality, structure, cost or provenance."""

    name: str
    type: pa.DataType
    group: str
    description: str


def _trial_columns() -> tuple[Column, ...]:
    columns = [
        Column(
            name,
            TEXT if name in JSON_FIELDS else _arrow_type(info.annotation),
            "trial",
            _trial_description(name),
        )
        for name, info in Trial.model_fields.items()
    ]
    after = 1 + [column.name for column in columns].index("sparsity")
    by_name = Column(
        "sparsity_by_name",
        TEXT,
        "trial",
        "sparsity where it differs by name, as JSON; then `sparsity` is null",
    )
    return (*columns[:after], by_name, *columns[after:])


def _trial_description(name: str) -> str:
    info = Trial.model_fields[name]
    words = str(info.description)
    return f"{words}; dense = the unpruned model" if name == "recovery" else words


def _calibration_columns() -> tuple[Column, ...]:
    fields = CalibrationConfig.model_fields
    names = [column.removeprefix("calibration_") for column in CALIBRATION_COLUMNS]
    return tuple(
        Column(
            f"calibration_{name}",
            _arrow_type(fields[name].annotation),
            "calibration",
            f"calibration set: {fields[name].description}",
        )
        for name in names
    )


def _arrow_type(annotation: Any) -> pa.DataType:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _arrow_type(get_args(annotation)[0])
    if origin is Literal:
        return _arrow_type(type(get_args(annotation)[0]))
    if origin in (Union, UnionType):
        return next(_arrow_type(part) for part in get_args(annotation) if part is not NoneType)
    return {str: TEXT, float: REAL, int: WHOLE, bool: TRUTH}[annotation]


_STREAMS = "over the calibration set, in the trial's own streams, mean over units; depends on the granularity"
_OUTPUT = "squared error over squared target at the last block's output, whole pruned model against dense"

TRIAL_COLUMNS: tuple[Column, ...] = (
    Column(
        "trial_id",
        TEXT,
        "identity",
        "identity of the row: the weights and how they were measured (16 hex digits)",
    ),
    Column(
        "recovery_id", TEXT, "identity", "identity of the weights: trial, model, dtype and calibration set"
    ),
    Column("sweep", TEXT, "provenance", "name of the sweep"),
    Column("status", TEXT, "identity", "finished, failed, or stopped by the scheduler"),
    Column("error", TEXT, "provenance", "why a trial failed"),
    Column(
        "error_kind",
        TEXT,
        "provenance",
        "numerical: a mask, unit or evaluation gave numbers that are not finite, as it would again, so that the trial "
        "stays failed unless `--retry-failed`; other: the next launch runs it again",
    ),
    Column(
        "stopped_at",
        REAL,
        "provenance",
        "fraction of the blocks that were pruned and recovered when the scheduler stopped the trial",
    ),
    Column(
        "rungs",
        TEXT,
        "provenance",
        "the search's metric at the rungs of the scheduler, by their number, as JSON: of a model that is partly dense",
    ),
    Column("study", TEXT, "provenance", "the study that chose the trial; null where it was listed"),
    *_trial_columns(),
    *_calibration_columns(),
    Column("dtype", TEXT, "identity", "number format of the weights, resolved"),
    Column("requested_sparsity", REAL, "trial", "fraction of zeros that was asked for"),
    Column("realized_sparsity", REAL, "quality", "fraction of zeros among the prunable weights, counted"),
    Column(
        "perplexity", REAL, "quality", "perplexity of the first evaluation entry; reported, never selected on"
    ),
    Column(
        "validation_perplexity",
        REAL,
        "quality",
        "perplexity on the validation sequences; what searches select on",
    ),
    Column("dense_perplexity", REAL, "quality", "`perplexity` of the dense model"),
    Column("pruned_perplexity", REAL, "quality", "`perplexity` under the same mask before recovery"),
    Column(
        "unit_error_before", REAL, "quality", f"squared error over squared target before recovery, {_STREAMS}"
    ),
    Column("unit_error_after", REAL, "quality", f"the same after recovery, {_STREAMS}"),
    Column(
        "output_error_calibration",
        REAL,
        "quality",
        f"{_OUTPUT}, on the calibration set; comparable in every row",
    ),
    Column("output_error_validation", REAL, "quality", f"{_OUTPUT}, on the validation sequences"),
    Column(
        "seconds_total",
        REAL,
        "cost",
        "wall-clock of the trial, from its first call to its row; of a retrained one its start, steps and measuring, "
        "without the weights that it starts from",
    ),
    Column(
        "seconds_statistics",
        REAL,
        "cost",
        "busy seconds of this trial alone for statistics: 0, since the dense pass is shared and takes part in "
        "`device_seconds_standalone` only",
    ),
    Column("seconds_mask", REAL, "cost", "busy seconds for scores and masks, summed over devices"),
    Column("seconds_recovery", REAL, "cost", "busy seconds for recovery, summed over devices"),
    Column("seconds_evaluation", REAL, "cost", "busy seconds for evaluation, summed over devices"),
    Column(
        "device_seconds", REAL, "cost", "busy time of this trial summed over devices; on CPU core-seconds"
    ),
    Column(
        "device_seconds_standalone",
        REAL,
        "cost",
        "the same with the full cost of everything shared that it used, as if it ran alone",
    ),
    Column(
        "training_flops",
        REAL,
        "cost",
        "floating-point operations of recovery, by formula; of a retraining without those of the weights that it "
        "starts from",
    ),
    Column("optimizer_steps", WHOLE, "cost", "optimizer steps of one unit"),
    Column("tokens_unique", WHOLE, "cost", "distinct calibration tokens that recovery saw"),
    Column("tokens_trained", WHOLE, "cost", "tokens times epochs through one unit"),
    Column("trainable_parameters", WHOLE, "cost", "parameters that recovery trained"),
    Column("devices", WHOLE, "cost", "devices (on CPU: workers) that took part"),
    Column(
        "peak_recovery_bytes",
        WHOLE,
        "cost",
        "largest over units and devices of what recovery itself allocated: weights, masters, gradients, "
        "optimizer state, activations, teacher",
    ),
    Column(
        "peak_device_bytes",
        WHOLE,
        "cost",
        "peak device memory of a worker; null on CPU, where another trial shared the worker, and of the dense model",
    ),
    Column(
        "peak_host_bytes",
        WHOLE,
        "cost",
        "peak host memory of a worker; null where another trial shared the worker, and of the dense model",
    ),
    Column(
        "fallbacks",
        WHOLE,
        "provenance",
        "linears and units for which a numerical fallback was used, or whose expert had too few tokens",
    ),
    Column("retries", WHOLE, "provenance", "how often the trial was started again"),
    Column("model", TEXT, "provenance", "the dense model, as written in the search space"),
    Column("model_hash", TEXT, "provenance", "hash of the model's contents"),
    Column("calibration_hash", TEXT, "provenance", "hash of the calibration tokens"),
    Column("validation_hash", TEXT, "provenance", "hash of the validation tokens"),
    Column("evaluation_protocol", TEXT, "provenance", "how perplexity was measured, as JSON"),
    Column(
        "tasks",
        TEXT,
        "provenance",
        "how the columns `task_<name>` were measured, as JSON: by task the metric, its standard error, the documents, "
        "a hash of the task with them, and the version of lm-eval",
    ),
    Column("started_at", MOMENT, "provenance", "when the trial began (UTC)"),
    Column("finished_at", MOMENT, "provenance", "when its row was made (UTC)"),
    Column("raysweep_version", TEXT, "provenance", "version of raysweep"),
    Column("torch_version", TEXT, "provenance", "version of torch"),
    Column("transformers_version", TEXT, "provenance", "version of transformers"),
    Column("ray_version", TEXT, "provenance", "version of ray; null without it"),
    Column("device_name", TEXT, "provenance", "processor or accelerator"),
    Column("shards", WHOLE, "provenance", "shards of the sweep"),
    Column("threads", WHOLE, "provenance", "CPU threads of each shard"),
    Column("schema_version", WHOLE, "provenance", "version of these columns"),
)

UNIT_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", TEXT, "identity", "the trial that the row belongs to"),
    Column("kind", TEXT, "identity", "unit (of reconstruction), linear (every pruned one), or block"),
    Column("unit", TEXT, "identity", "name within the model, such as `3.attention`"),
    Column(
        "block", WHOLE, "identity", "number of the decoder block, from 0; the first one of a unit of several"
    ),
    Column("linears", TEXT, "identity", "full names of its pruned linears, separated by commas"),
    Column(
        "loss_before", REAL, "quality", "unit: reconstruction loss on the calibration set before recovery"
    ),
    Column("loss_after", REAL, "quality", "unit: the same after recovery"),
    Column(
        "validation_loss_before",
        REAL,
        "quality",
        "unit: reconstruction loss on the validation set before recovery",
    ),
    Column("validation_loss_after", REAL, "quality", "unit: the same after recovery"),
    Column(
        "error_before", REAL, "quality", "unit and linear: squared error over squared target before recovery"
    ),
    Column(
        "error_after",
        REAL,
        "quality",
        "unit: the same after recovery; block: output error of the whole pruned model",
    ),
    Column("steps", WHOLE, "structure", "unit: optimizer steps"),
    Column("seconds", REAL, "cost", "unit: busy seconds of its recovery"),
    Column("realized_sparsity", REAL, "structure", "fraction of zeros among its prunable weights, counted"),
    Column("dead_inputs", WHOLE, "structure", "linear: inputs that were never active in calibration"),
    Column(
        "dampening_used", REAL, "structure", "linear: dampening of its Gram matrix; null where none is needed"
    ),
    Column("fallback", TEXT, "structure", "linear: the numerical fallback that was used; null = none"),
    Column("peak_device_bytes", WHOLE, "cost", "unit: what its recovery allocated at most; null on CPU"),
    Column("shard", WHOLE, "provenance", "the shard that computed it"),
)

NOT_NUMBERS: frozenset[str] = frozenset(
    column.name for column in (*TRIAL_COLUMNS, *UNIT_COLUMNS) if column.group in ("cost", "provenance")
)
"""The columns of `trials` and `units` that may differ between runs of a trial: cost, provenance and `shard`.
All others are the numbers of a trial and are compared bitwise."""


def trial_schema(names: Sequence[str] = (), tasks: Sequence[str] = ()) -> pa.Schema:
    """Schema of `trials`; each of `names` (of the evaluation entries) has a column `perplexity_<name>`, each of `tasks`
    a column `task_<name>`."""
    fields = [pa.field(column.name, column.type) for column in TRIAL_COLUMNS]
    for before, prefix, wanted in (
        ("pruned_perplexity", TASK_PREFIX, tasks),
        ("perplexity", PERPLEXITY_PREFIX, names),
    ):
        position = 1 + [column.name for column in TRIAL_COLUMNS].index(before)
        fields[position:position] = [pa.field(prefix + name, REAL) for name in wanted]
    return pa.schema(fields)


def unit_schema() -> pa.Schema:
    """Schema of `units`."""
    return pa.schema([pa.field(column.name, column.type) for column in UNIT_COLUMNS])


def planned_columns(planned: PlannedTrial) -> dict[str, Any]:
    """The columns of a row that are known before the trial runs: its fields, model and calibration set."""
    trial, calibration = planned.trial, planned.calibration
    columns: dict[str, Any] = trial.columns()
    columns |= {"requested_sparsity": columns["sparsity"], "model": planned.model.path}
    if calibration is not None:
        columns |= {
            name: getattr(calibration, name.removeprefix("calibration_")) for name in CALIBRATION_COLUMNS
        }
    return columns
