"""The plan of a launch as JSON has it, and what it is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raysweep.config.expansion import Sampled
from raysweep.results.uris import place_of

if TYPE_CHECKING:
    from raysweep.baseline.plan import RetrainPlan
    from raysweep.cluster.nodes import Node
    from raysweep.config.studies import Study
    from raysweep.launching.outlook import Outlook
    from raysweep.launching.prepared import Launch
    from raysweep.shards.memory import ShardMemory
    from raysweep.shards.plan import ShardPlan
    from raysweep.sweep.prepare import PreparedModel


@dataclass(frozen=True)
class Seen:
    """All that is known of a model's part of the sweep. peaks: bytes by kind of trial, if there were no others"""

    model: PreparedModel
    plan: ShardPlan
    retraining: RetrainPlan | None
    outlook: Outlook
    peaks: Mapping[tuple[str, str | None], int]


def plan_document(prepared: Launch, looks: Sequence[Seen], node: Node) -> dict[str, Any]:
    """The plan as JSON has it; bytes, seconds and numbers are plain."""
    from raysweep.launching.outlook import total_seconds

    outlooks = [seen.outlook for seen in looks]
    return {
        "sweep": prepared.space.name,
        "folder": place_of(prepared.folder),
        "trials": trial_counts(prepared),
        "machine": asdict(node),
        "seconds": total_seconds(outlooks),
        "seconds_in_process": total_seconds(outlooks, in_process=True),
        "flops": sum(each.work.flops for each in outlooks),
        "network_bytes": round(sum(each.work.network for each in outlooks)),
        "models": [_model_document(prepared, seen) for seen in looks],
    }


def trial_counts(prepared: Launch) -> dict[str, int]:
    """planned = finished + failed, which stay so, + to_run;  to_run = new + again, which failed otherwise"""
    again = sum(trial.trial_id in prepared.rows and not prepared.is_done(trial) for trial in prepared.trials)
    return {
        "planned": prepared.planned,
        "finished": prepared.finished,
        "failed": prepared.failed,
        "new": prepared.to_run - again,
        "again": again,
        "to_run": prepared.to_run,
    }


def _model_document(prepared: Launch, seen: Seen) -> dict[str, Any]:
    from raysweep.shards.costs import DENSE_PASS
    from raysweep.shards.plan import host_bytes

    model, plan, outlook = seen.model, seen.plan, seen.outlook
    return {
        "path": model.config.path,
        "parameters": model.shape.parameters,
        "blocks": len(model.shape.blocks),
        "dtype": model.dtype,
        "device": plan.device,
        "trials": [
            {
                "recovery": recovery,
                "granularity": granularity,
                "planned": planned,
                "to_run": to_run,
                "flops": outlook.flops_of((recovery, granularity)),
                "seconds": outlook.seconds_of((recovery, granularity)),
                "peak_bytes": seen.peaks.get((recovery, granularity)),
            }
            for (recovery, granularity), (planned, to_run) in kinds(prepared, model).items()
        ],
        "dense_pass": {"flops": outlook.flops_of(DENSE_PASS), "seconds": outlook.seconds_of(DENSE_PASS)},
        "flops": outlook.work.flops,
        "network_bytes": round(outlook.work.network),
        "seconds": _seconds_document(outlook),
        "retraining_instead": asdict(outlook.instead),
        "calibration_sets": len(model.phases),
        "studies": [_study_document(prepared, study) for phase in model.phases for study in phase.studies],
        "replicas": plan.replicas,
        "concurrent_trials": plan.concurrent_trials,
        "cpus_per_shard": plan.cpus,
        "gpus_per_shard": plan.gpus,
        "threads_per_shard": plan.threads,
        "shares_cores": plan.shares_cores,
        "activation_store": plan.placement.activations,
        "placement": {name: value for name, value in asdict(plan.placement).items() if name != "scratch"},
        "compiles": plan.compiles,
        "shards": [
            _shard_document(blocks, memory) for blocks, memory in zip(plan.ranges, plan.memory, strict=True)
        ],
        "host_bytes": host_bytes(plan),
        "storage_bytes": prepared.storage_bytes(model, plan.all_concurrent_trials),
        "kept_bytes": prepared.kept_bytes(model, prepared.space.execution.keep),
        "retraining": None if seen.retraining is None else asdict(seen.retraining),
    }


def _seconds_document(outlook: Outlook) -> dict[str, float] | None:
    took = outlook.durations
    if took is None:
        return None
    parts = ("total", "start", "dense_pass", "trials", "retraining", "in_process", "trials_busy")
    return {part: getattr(took, part) for part in parts}


def _study_document(prepared: Launch, study: Study) -> dict[str, Any]:
    fixed = {name: value for name, value in study.fixed.items() if value is not None}
    choices = {
        name: {values.kind: list(values.values)} if isinstance(values, Sampled) else list(values)
        for name, values in study.open.items()
    }
    left = prepared.left_of_study(study)
    return {"fixed": fixed, "chooses": choices, "trials": study.samples, "to_run": left}


def _shard_document(blocks: tuple[int, int], memory: ShardMemory) -> dict[str, Any]:
    """blocks: first, and behind the last"""
    sums = {name: getattr(memory, name) for name in ("at_work", "device", "host", "total", "disk")}
    return {"blocks": list(blocks), "memory": asdict(memory) | sums}


def kinds(prepared: Launch, model: PreparedModel) -> dict[tuple[str, str | None], tuple[int, int]]:
    """For each recovery and granularity: trials planned, and trials to run."""
    planned: Counter[tuple[str, str | None]] = Counter()
    to_run: Counter[tuple[str, str | None]] = Counter()
    for trial in model.trials:
        kind = (trial.trial.recovery, trial.trial.granularity)
        planned[kind] += 1
        to_run[kind] += not prepared.is_done(trial)
    for phase in model.phases:
        for study in phase.studies:
            example = next(study.corners()).trial
            recovery: str = "chosen" if "recovery" in study.open else example.recovery
            chosen = (recovery, "chosen" if "granularity" in study.open else example.granularity)
            planned[chosen] += study.samples
            to_run[chosen] += prepared.left_of_study(study)
    return {kind: (number, to_run[kind]) for kind, number in planned.items()}
