"""What a sweep will take: work, bytes between shards, time as far as a probe knows the device, and what retraining
would need instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raysweep.baseline.plan import worker_bytes
from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.config.trial import Trial
from raysweep.launching.prepared import Launch
from raysweep.model.tokens import TokenSet
from raysweep.shards.costs import Asked, Kind, PhaseWork, Text, Work, count_work, retraining_flops, step_rate
from raysweep.shards.durations import Durations, Rates, durations, retraining_seconds
from raysweep.shards.plan import ShardPlan
from raysweep.shards.trial import DENSE_KEY, pruned_key
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import Phase, PreparedModel

Probing = Literal["none", "cached", "missing", "again"]
"""Whether rates are measured: not at all, nothing beyond what earlier probes have found, what these lack, or all."""


@dataclass(frozen=True)
class RetrainingInstead:
    """What one retraining of all weights on the same tokens would need, beside one recovery of this sweep.

    zero_stage, workers, bytes: of ZeRO, processes, and what each holds where it computes, libraries left out
    flops, seconds: of training
    recovery_bytes: what a shard holds for the recovery of a unit;  recovery_flops: of a trial's training, the mean
    """

    zero_stage: int
    workers: int
    bytes: int
    tokens: int
    flops: float
    seconds: float | None
    recovery_bytes: int | None
    recovery_flops: float | None


@dataclass(frozen=True)
class Outlook:
    """Of one model. durations: None where no probe has measured what it would take"""

    work: Work
    durations: Durations | None
    instead: RetrainingInstead

    def flops_of(self, kind: Kind) -> float:
        return self.work.flops_of(kind)

    def seconds_of(self, kind: Kind) -> float | None:
        return None if self.durations is None else self.durations.kinds.get(kind, 0.0)


def look_ahead(
    prepared: Launch, model: PreparedModel, plan: ShardPlan, nodes: Sequence[Node], probing: Probing
) -> Outlook:
    """What is left to do for a model. Measures on this machine only where `probing` says so."""
    phases = [_phase_work(prepared, model, phase) for phase in model.phases]
    work = count_work(model.shape, plan.dtype, plan.ranges, len(plan.heads), phases, plan.placement)
    example = _retraining_example(prepared, model)
    rates = _rates(model, plan, work, example, max(node.cpus for node in nodes), probing)
    workers = prepared.space.execution.retrain_workers
    alone, each = worker_bytes(
        example, model.phases[0].tokens.sequence_length, model.shape, model.dtype, nodes,
        None if workers == "auto" else workers,
    )  # fmt: skip
    took = None
    if rates is not None:
        took = durations(work, model.shape, plan, rates, alone, sum(node.cpus for node in nodes))
    return Outlook(work, took, _instead(model, plan, work, example, rates, alone, each))


def total_seconds(outlooks: Sequence[Outlook], in_process: bool = False) -> float | None:
    """Of a launch; None where that of a model is not known. Libraries and Ray start once for all models."""
    found = [each.durations for each in outlooks if each.work.trials]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    totals = [(each.in_process if in_process else each.total) - each.once[in_process] for each in known]
    return sum(totals) + max((each.once[in_process] for each in known), default=0.0)


def memory_by_kind(
    space: SearchSpace, model: PreparedModel, plan: ShardPlan, nodes: Sequence[Node]
) -> dict[Kind, int]:
    """What the largest shard would hold at most, on its device and on a CPU in all, if trials of a kind were all."""
    execution = space.execution.model_copy(update={"shards": plan.shards})
    found: dict[Kind, int] = {}
    for kind in dict.fromkeys((trial.trial.recovery, trial.trial.granularity) for trial in model.trials):
        phases = (replace(phase, trials=tuple(_of_kind(phase, kind)), studies=()) for phase in model.phases)
        alone = replace(model, phases=tuple(phases))
        (needed,) = make_plans([alone], replace(space, execution=execution), nodes)
        on_device = plan.device == "cuda"
        found[kind] = max(memory.device if on_device else memory.total for memory in needed.memory)
    return found


def _of_kind(phase: Phase, kind: Kind) -> Iterator[SweepTrial]:
    return (trial for trial in phase.trials if (trial.trial.recovery, trial.trial.granularity) == kind)


def _text(tokens: TokenSet) -> Text:
    return Text(len(tokens), tokens.sequence_length)


def _phase_work(prepared: Launch, model: PreparedModel, phase: Phase) -> PhaseWork:
    """The trials that a phase has left, those of studies as they may come out."""
    asked = [Asked.of(trial.trial) for trial in prepared.remaining(phase)]
    for study in phase.studies:
        example = next(study.corners()).trial
        recovery = "chosen" if "recovery" in study.open else example.recovery
        kind = (recovery, "chosen" if "granularity" in study.open else example.granularity)
        asked += [Asked(example, kind)] * prepared.left_of_study(study)
    asked += [
        Asked.of(trial.trial, _text(model.data[str(trial.data_hash)]))
        for trial in prepared.remaining(phase, retrained=True)
    ]
    return PhaseWork(
        calibration=_text(phase.tokens),
        validation=None if model.validation is None else _text(model.validation),
        evaluation=tuple(map(_text, model.evaluation.values())),
        trials=tuple(asked),
        known=frozenset(_known(prepared, model, phase)),
    )


def _known(prepared: Launch, model: PreparedModel, phase: Phase) -> Iterator[str]:
    """As `model_run` tells shards what earlier launches have found."""
    mine = {trial.trial_id for trial in phase.trials}
    for trial in (*model.phases[0].trials, *phase.trials):
        if trial.trial_id in prepared.finished_ids:
            if trial.trial.is_dense:
                yield DENSE_KEY
            elif trial.trial.recovery == "none" and trial.trial_id in mine:
                yield pruned_key(trial.trial)


def _retraining_example(prepared: Launch, model: PreparedModel) -> Trial:
    """One that retrains all weights: on the tokens of the longest recovery with steps, and its batches."""
    steps = [
        trial for trial in model.possible if trial.epochs is not None and trial.recovery == "reconstruct"
    ]
    longest = max(steps, key=lambda trial: trial.epochs or 0, default=None)
    stages = [trial.zero_stage for trial in model.possible if trial.zero_stage is not None]
    return Trial(
        recovery="retrain",
        criterion="magnitude",
        sparsity=0.5,
        learning_rate=1e-5,
        epochs=longest.epochs if longest else 1,
        batch_size=longest.batch_size if longest else 2,
        max_grad_norm=longest.max_grad_norm if longest else None,
        zero_stage=stages[0] if stages else 2,
    )


def _rates(
    model: PreparedModel, plan: ShardPlan, work: Work, example: Trial, cores: float, probing: Probing
) -> Rates | None:
    """cores: of one machine"""
    if probing == "none":
        return None
    from raysweep.shards.rates import Probed, probed_rates

    length = model.phases[0].tokens.sequence_length
    together = max(1, min(plan.all_shards, int(cores) // plan.threads))
    probed = Probed(
        model.source, model.shape, plan.dtype, plan.device, plan.threads, length, plan.compiles, together
    )
    wanted = work.samples | {step_rate(example): example}
    return probed_rates(probed, wanted, again=probing == "again", measures=probing != "cached")


def _instead(
    model: PreparedModel,
    plan: ShardPlan,
    work: Work,
    example: Trial,
    rates: Rates | None,
    workers: int,
    each: int,
) -> RetrainingInstead:
    text = _text(model.phases[0].tokens)
    epochs, batch = example.epochs or 1, example.batch_size or 1
    steps = epochs * -(-text.samples // batch)
    alone = None
    if rates is not None:
        alone = retraining_seconds(model.shape, rates, step_rate(example), steps, batch * text.length)
    trained = [piece for piece in work.pieces if piece.rate.startswith("step") and piece.kind[0] != "retrain"]
    recovered = {piece.trial for piece in trained}
    return RetrainingInstead(
        zero_stage=example.zero_stage or 0,
        workers=workers,
        bytes=each,
        tokens=epochs * text.tokens,
        flops=retraining_flops(model.shape, epochs * text.tokens),
        seconds=None if alone is None else alone / workers,
        recovery_bytes=max(memory.recovery for memory in plan.memory) or None,
        recovery_flops=sum(piece.flops for piece in trained) / len(recovered) if recovered else None,
    )
