"""Computes a trial again from its row and its sweep's space, in this process; and measures an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raysweep.analysis.recipe import recipe_yaml
from raysweep.cluster.nodes import this_node
from raysweep.config.dialect import dump_yaml
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.errors import RaysweepError, UsageError, first_line
from raysweep.launching.launch import device_here
from raysweep.launching.model_run import ModelRun
from raysweep.launching.prepared import Launch
from raysweep.launching.progress import Silent
from raysweep.launching.recorder import recorded
from raysweep.launching.runners import InProcess
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape_reading import read_shape
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.results.artifacts import ALL, artifact_folder
from raysweep.results.reader import trial_rows
from raysweep.results.schema import PERPLEXITY_PREFIX
from raysweep.shards.setup import set_up, shard_specs
from raysweep.shards.trial import run_trial
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import Phase, PreparedModel, prepare
from raysweep.sweep.proposals import chosen_by

TOLERANCE = 0.005  # of the perplexity, where nothing says that it must be equal to the bit
SAME = ("raysweep_version", "torch_version", "transformers_version", "device_name", "threads")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Alone:
    """One trial of a sweep, in a space and with a model of its own."""

    space: SearchSpace
    model: PreparedModel
    trial: SweepTrial

    @property
    def phase(self) -> Phase:
        return self.model.phases[0]


def prepared_alone(row: Row, space: SearchSpace, source: ModelSource, tell: Callable[[str], None]) -> Alone:
    """Model and texts of a trial, checked to be those of its row.

    row: without what is null;  space: of its sweep;  source: of the dense model
    Raises UsageError, also where something has changed since.

    A space of the trial alone reads the least, and knows trials that the sweep's space no longer has. Not all of them
    are in it as they were: validation text comes from the first of several calibration data sets, for one.
    """
    tell("Reading model and data")
    settings = [
        f"model.revision={json.dumps(source.revision)}",
        f"model.dtype={row['dtype']}",
        f"execution.threads_per_worker={row.get('threads') or space.execution.threads_per_worker}",
        "execution.shards=1",
        "execution.concurrent_trials=1",
        f"execution.keep={ALL}",
        *([] if space.tasks_of_all else ["evaluation.tasks=[]"]),  # they are no part of the trial
    ]
    whole = space.to_dict() | {"execution": {}}  # it runs here, by itself
    whole["model"] |= {"path": row["model"]}
    texts = {"the trial's own space": recipe_yaml(space, dict(row)), "its sweep's space": dump_yaml(whole)}
    changed, errors = "", list[UsageError]()
    for name, text in texts.items():
        try:
            alone = SearchSpace.from_text(text, settings, name)
            models = prepare(alone, device_here())
        except UsageError as error:
            errors.append(error)
            continue
        if (found := _alone(row, alone, models)) is not None:
            return found
        changed = changed or _what_changed(row, models)
    if not changed:
        raise errors[0]
    also = "".join(f", and {first_line(error)}" for error in errors)
    raise UsageError(
        f"trial {row['trial_id']} cannot be computed again: {changed} since it was measured{also}",
        remedy="Launch what it was measured by under this name again (what has changed makes other trials).",
    )


def _alone(row: Row, space: SearchSpace, models: list[PreparedModel]) -> Alone | None:
    """The trial of a row among those of a space; None where it is none of them."""
    for model in models:
        for phase in model.phases:
            for trial in (*phase.trials, *_chosen(row, model, phase)):
                if trial.trial_id == row["trial_id"]:
                    mine = replace(phase, trials=(trial,), studies=())
                    return Alone(space, replace(model, phases=(mine,)), trial)
    return None


def _chosen(row: Row, model: PreparedModel, phase: Phase) -> Iterator[SweepTrial]:
    """The trial of a row where one of the phase's studies chose it."""
    for study in phase.studies:
        for chosen, _ in chosen_by(study, model.identify, {row["trial_id"]: dict(row)}).values():
            yield model.identify(study.planned(chosen), 0)


def _what_changed(row: Row, models: list[PreparedModel]) -> str:
    model, phase = models[0], models[0].phases[0]
    if model.model_hash != row.get("model_hash"):
        return f"model {row['model']!r} has changed"
    if phase.tokens.content_hash != row.get("calibration_hash"):
        return "the calibration text, or its tokenizer, has changed"
    if any(trial.recovery_id == row["recovery_id"] for trial in phase.trials):
        return "the text that it is measured on, or the protocol, has changed"
    return "its criterion, the data that it is trained on, or raysweep's arithmetic has changed"


def recompute(alone: Alone, scratch: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Runs the trial in this process; returns its row, and the folder with its weights by block.

    scratch: a folder for that, which is made. Raises CapacityError where this machine cannot hold it, RaysweepError
    where the trial fails.
    """
    node, runner = this_node(), InProcess()
    launch = Launch(alone.space, scratch / alone.space.name, [alone.model], {})
    (plan,) = make_plans([alone.model], alone.space, [node], runner.one_at_a_time)
    retrain_plan = launch.retrain_plan(alone.model, [node])
    with recorded(launch, runner, plan.all_shards, _Telling(tell), lambda: None) as recorder:
        ModelRun(launch, alone.model, plan, retrain_plan, runner, recorder, [node]).run()
    row = trial_rows(launch.folder)[alone.trial.trial_id]
    if row["status"] != "finished":
        raise RaysweepError(f"trial {row['trial_id']} failed when it was computed again: {row.get('error')}")
    folder = artifact_folder(launch.folder, alone.trial.trial_id)
    if not folder.exists():
        raise RaysweepError(f"the weights of trial {row['trial_id']} could not be written to {scratch}")
    return row, folder


class _Telling(Silent):
    """Passes stages on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def stage(self, text: str) -> None:
        self._tell(text)


def compared(row: Row, again: Row) -> str:
    """In words how a trial that was computed again compares with its row. Raises RaysweepError where it differs.

    On a CPU in float32 with the versions, the processor and the threads of the row its perplexities are equal to the
    bit; else they may differ by rounding. Threads and workers of a retraining are in no row.
    """
    alike = all(row.get(name) == again.get(name) for name in SAME) and row.get("threads") is not None
    on_cpu = row["dtype"] == "float32" and device_here() == "cpu"
    bitwise = alike and on_cpu and row["recovery"] != "retrain"
    columns = [name for name in row if name == "perplexity" or name.startswith(PERPLEXITY_PREFIX)]
    pairs = {name: (float(row[name]), float(again[name])) for name in columns if name in again}
    furthest = max(pairs, key=lambda name: abs(pairs[name][1] / pairs[name][0] - 1.0))
    before, now = pairs[furthest]
    difference = abs(now / before - 1.0)
    if difference > (0.0 if bitwise else TOLERANCE):
        limit = (
            "its versions, processor and threads are those of the row"
            if bitwise
            else f"{TOLERANCE:.1%} are allowed"
        )
        raise RaysweepError(
            f"computed again the trial has {furthest} {now!r}, its row {before!r}, and {limit}: nothing was written"
        )
    how = "equal to the bit" if difference == 0.0 else f"{difference:.2e} apart"
    return f"computed again for this export; its perplexity and that of the row are {how}"


def measured(alone: Alone, folder: Path, tell: Callable[[str], None]) -> dict[str, float]:
    """The perplexities of an exported folder by column, as the trial's own were measured."""
    tell("Measuring the rounded weights")
    config = alone.model.config
    source = ModelSource(str(folder), trust_remote_code=config.trust_remote_code)
    model = replace(alone.model, source=source, shape=read_shape(source, alone.model.dtype))
    (plan,) = make_plans([model], alone.space, [this_node()], one_at_a_time=True)
    texts = {name: text.input_ids for name, text in model.texts(alone.phase).items() if name != CALIBRATION}
    with InProcess().group("export", shard_specs(plan, source), plan) as group:
        set_up(group, plan.ranges, texts, [], model.shape, placement=plan.placement)
        columns = run_trial(group, Trial.dense(), "exported", 0).columns
    names = ("perplexity", "validation_perplexity")
    return {
        name: float(value)
        for name, value in columns.items()
        if value is not None and (name in names or name.startswith(PERPLEXITY_PREFIX))
    }
