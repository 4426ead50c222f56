"""The sections of a search space beside its sweep: model, data, evaluation, search and execution."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from raysweep.config.calibration import CALIBRATION_COLUMNS, DATASET_VALUES, SEED_VALUES, WHOLE_VALUES
from raysweep.config.field_groups import MASK_FIELDS, RECOVERY_FIELDS
from raysweep.config.fields import FROZEN, NAME_VALUES, Count, Name, Seed, Text, as_tuple, setting
from raysweep.config.limits import MAX_COUNT
from raysweep.errors import UsageError, nearest_name

BUILTIN_PREFIX = "builtin:"
VALIDATION_METRICS = ("validation_perplexity", "output_error_validation")
METRICS = (*VALIDATION_METRICS, "output_error_calibration")
TRACKERS = ("tensorboard", "mlflow", "wandb")
CELL_COLUMNS = (
    "model",
    *CALIBRATION_COLUMNS,
    "recovery",
    *MASK_FIELDS,
    "sparsity_by_name",
    *RECOVERY_FIELDS,
    "seed",
)


class ModelConfig(BaseModel):
    """The model that is pruned."""

    model_config = FROZEN

    path: Text = setting(
        "the dense model",
        values="builtin:NAME, a Hugging Face id, or a folder with config.json and safetensors",
    )
    revision: Text | None = setting(
        "branch, tag or commit on Hugging Face; null = its default", default=None, values="text, or null"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "number format of the weights; auto = float32 on CPU, the checkpoint's own on a device",
        default="auto",
    )
    trust_remote_code: bool = setting("whether code that comes with the model may run", default=False)


class ValidationConfig(BaseModel):
    """Held-out sequences that searches select on: fixed, and disjoint from every calibration set."""

    model_config = FROZEN

    samples: Annotated[int, Field(ge=0, le=MAX_COUNT)] = setting(
        "number of sequences, as long as those of the first evaluation entry; 0 = no validation",
        default=16,
        values=SEED_VALUES,
    )
    dataset: Text | None = setting(
        "where the text comes from; null = the calibration data set with its config, files and split",
        default=None,
        values=f"{DATASET_VALUES}; or null",
    )
    config: Text | None = setting(
        "as in calibration, of `validation.dataset`", default=None, values="text, or null"
    )
    data_files: Text | None = setting(
        "as in calibration, of `validation.dataset`", default=None, values="text, or null"
    )
    split: Text | None = setting(
        "split of the data set; null = the split of the calibration set", default=None, values="text, or null"
    )
    seed: Seed = setting("which sequences are drawn", default=0, values=SEED_VALUES)

    @model_validator(mode="after")
    def _check_dataset(self) -> Self:
        for name in ("config", "data_files"):
            if self.dataset is None and getattr(self, name) is not None:
                raise UsageError(
                    f"{name} is given without a dataset", where=name, remedy="give validation.dataset as well"
                )
        return self

    def protocol(self, sequence_length: int) -> dict[str, Any]:
        """What of it belongs to the identity of a trial (the text enters by its hash)."""
        return {"samples": self.samples, "seed": self.seed, "sequence_length": sequence_length}


class PerplexityConfig(BaseModel):
    """One text on which perplexity is measured. The first entry fills the column `perplexity`."""

    model_config = FROZEN

    name: Name = setting("names the column `perplexity_<name>`", values=NAME_VALUES)
    dataset: Text = setting("where the text comes from", values=DATASET_VALUES)
    config: Text | None = setting(
        "configuration of a Hugging Face data set", default=None, values="text, or null"
    )
    data_files: Text | None = setting(
        "files of a Hugging Face data set", default=None, values="text, or null"
    )
    split: Text = setting("split of the data set", default="test", values="text")
    sequence_length: Annotated[int, Field(ge=2, le=MAX_COUNT)] = setting(
        "tokens in one window", values="a whole number from 2"
    )
    max_windows: Count | None = setting(
        "no more windows than this; null = the whole text", default=None, values=f"{WHOLE_VALUES}, or null"
    )
    bos_each_window: bool = setting(
        "begin every window with the tokenizer's BOS token (another protocol, not comparable)", default=False
    )

    def protocol(self) -> dict[str, Any]:
        """What of it belongs to the identity of a trial; values at their default are left out."""
        fields: dict[str, Any] = {"name": self.name, "sequence_length": self.sequence_length}
        if self.max_windows is not None:
            fields["max_windows"] = self.max_windows
        if self.bos_each_window:
            fields["bos_each_window"] = True
        return fields


class EvaluationConfig(BaseModel):
    """What every trial is measured on."""

    model_config = FROZEN

    perplexity: Annotated[tuple[PerplexityConfig, ...], BeforeValidator(as_tuple)] = setting(
        "texts on which perplexity is measured, reported and never selected on",
        values="a list with at least one entry: name, dataset, split, sequence_length, ...",
        shown_default="with a builtin calibration data set its test split, 64 windows; else required",
    )
    tasks: Annotated[tuple[Text, ...], BeforeValidator(as_tuple)] = setting(
        "tasks of the lm-eval library (groups too), measured on whole models once trials have ended; each fills the "
        "column `task_<name>`",
        default=(),
        values="a list of task names",
    )
    tasks_include: Text | None = setting(
        "folder with task files of your own, in the form of lm-eval; paths in them count from the current folder",
        default=None,
        values="a folder, or null",
    )
    tasks_on: Literal["kept", "all"] = setting(
        "the trials that tasks are measured on, beside the dense model: those whose weights are kept "
        "(`execution.keep`), or all, whose weights wait in the storage until then",
        default="kept",
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        for place, name in enumerate(self.tasks):
            if name in self.tasks[:place]:
                raise UsageError(f"task {name!r} is named twice", where="tasks", allowed="every task once")
        return self

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.perplexity]


class SearchConfig(BaseModel):
    """How the search space is walked, and what best means."""

    model_config = FROZEN

    algorithm: Literal["grid", "random", "optuna"] = setting(
        "grid = every combination; random = also draws of the sampled fields; optuna = in each cell a study of its "
        "own (TPE) chooses sampled fields and lists that are no part of `compare_within`",
        default="grid",
    )
    scheduler: Literal["none", "asha"] = setting(
        "what may stop trials early; asha = successive halving within each cell, by the metric of a model of which a "
        "sixteenth, then a quarter of the blocks is pruned and recovered and the rest dense",
        default="none",
    )
    num_samples: Count | None = setting(
        "random: draws per point of the listed axes, more draws keep the earlier ones; optuna: trials per cell, those "
        "of earlier launches counted",
        default=None,
        values=f"{WHOLE_VALUES} with algorithm random or optuna, null with grid",
    )
    seed: Seed = setting("which values are drawn", default=0, values=SEED_VALUES)
    metric: Literal["validation_perplexity", "output_error_validation", "output_error_calibration"] = setting(
        "the column by which trials are compared", default="validation_perplexity"
    )
    mode: Literal["min", "max"] = setting("whether lower or higher is better", default="min")
    compare_within: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        "columns that are equal among trials that may be compared (a cell)",
        default=("model", "sparsity", "sparsity_by_name", "pattern", "recovery"),
        values="a list of column names: `model`, `calibration_*`, or fields of a trial",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.algorithm != "grid" and self.num_samples is None:
            what = f"num_samples is missing; algorithm {self.algorithm!r} needs it"
            raise UsageError(what, where="num_samples", allowed=WHOLE_VALUES)
        if self.algorithm == "grid" and self.num_samples is not None:
            what = f"num_samples {self.num_samples} does not apply to algorithm 'grid'"
            raise UsageError(
                what, where="num_samples", allowed="null", remedy="set search.algorithm: random or optuna"
            )
        for name in self.compare_within:
            if name not in CELL_COLUMNS:
                raise UsageError(
                    f"unknown column {name!r}",
                    where="compare_within",
                    allowed=", ".join(CELL_COLUMNS),
                    nearest=nearest_name(name, list(CELL_COLUMNS)),
                )
        return self


AutoOrCount = Literal["auto"] | Count


def _known_trackers(value: object) -> object:
    """Their names, each once; what is no list is left to who takes it."""
    if not isinstance(value, list | tuple):
        return value
    for name in value:
        if name not in TRACKERS:
            raise UsageError(
                f"unknown tracker {name!r}",
                allowed=" | ".join(TRACKERS),
                nearest=nearest_name(str(name), list(TRACKERS)),
            )
    return tuple(dict.fromkeys(value))


class ExecutionConfig(BaseModel):
    """Where and how it runs. Changes no number of a trial beyond rounding, and no identity."""

    model_config = FROZEN

    shards: AutoOrCount = setting(
        "actors over which the blocks are spread; auto = as many as there are places for, divided by replicas",
        default="auto",
        values=f"auto, or {WHOLE_VALUES}",
    )
    replicas: Count = setting(
        "groups of shards that each hold the whole model; trials are spread over them",
        default=1,
        values=WHOLE_VALUES,
    )
    threads_per_worker: Count = setting(
        "CPU threads of one shard; other numbers of threads may differ in the last bits",
        default=1,
        values=WHOLE_VALUES,
    )
    concurrent_trials: AutoOrCount = setting(
        "trials in flight at once, in each replica", default="auto", values=f"auto, or {WHOLE_VALUES}"
    )
    retrain_workers: AutoOrCount = setting(
        "processes of a retraining; auto = one a GPU, as many as batches can be cut for, and without GPUs one",
        default="auto",
        values=f"auto, or {WHOLE_VALUES}",
    )
    checkpoint_steps: Count = setting(
        "steps of a retraining after which a checkpoint is written", default=200, values=WHOLE_VALUES
    )
    weight_store: Literal["auto", "device", "host", "disk"] = setting(
        "where weights and masks wait until their block is in hand: device = all are in hand (on CPUs also host); "
        "disk = dense ones in the model's own files, those of trials in `scratch`; auto = the first where all fits",
        default="auto",
    )
    activation_store: Literal["auto", "device", "host", "disk"] = setting(
        "where activations are kept; disk = in `scratch`; auto = on the GPUs where all fits, else in the memory of "
        "their hosts, else on disk",
        default="auto",
    )
    statistics_store: Literal["auto", "device", "host", "disk", "anew"] = setting(
        "where Gram matrices are kept; anew = nowhere: they are summed up again from the activations whenever masks "
        "or matrices of a block need them",
        default="auto",
    )
    boundaries: Literal["auto", "all"] | Count = setting(
        "activations that are kept: all = between blocks and within them; N = every N-th of those between blocks, "
        "while others are computed anew; auto = all where they have room",
        default="auto",
        values=f"auto, all, or {WHOLE_VALUES}",
    )
    scratch: Text | None = setting(
        "folder, of every node its own and on a disk, for what is kept there while a sweep runs, in files that "
        "are gone with it; null = the node's temporary folder (TMPDIR)",
        default=None,
        values="a folder, or null",
    )
    compile: Literal["auto", "always", "never"] = setting(
        "whether the training of units is compiled on GPUs, which takes each shard half a minute and makes every step "
        "faster; auto = where the sweep has enough of it",
        default="auto",
    )
    storage: Text | None = setting(
        "folder or URI of the results; `--storage` and RAYSWEEP_STORAGE come first; null = ./raysweep-results",
        default=None,
        values="a folder, a URI such as s3://BUCKET/PREFIX, or null",
    )
    task_batch_size: Count = setting(
        "requests of lm-eval tasks that pass through the model at once", default=8, values=WHOLE_VALUES
    )
    keep: Literal["none", "best", "all"] = setting(
        "trials whose weights stay on storage, for `raysweep export`: none, the best one of every cell of "
        "`search.compare_within` by `search.metric`, or all; a better one takes the place of what was kept",
        default="best",
    )
    trackers: Annotated[tuple[str, ...], BeforeValidator(_known_trackers)] = setting(
        "experiment trackers that are told of every trial, by Ray Tune's own callbacks; each needs its package",
        default=(),
        values=f"a list of {', '.join(TRACKERS)}",
    )
