"""What the trials of a sweep ask of its shards, and the plans that follow."""

from __future__ import annotations

from collections.abc import Sequence

from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.shards.memory import Workload
from raysweep.shards.plan import ShardPlan, make_plan
from raysweep.sweep.prepare import PreparedModel


def make_plans(models: Sequence[PreparedModel], space: SearchSpace, nodes: Sequence[Node]) -> list[ShardPlan]:
    """One plan per model, on all nodes. Raises CapacityError when one cannot fit."""
    execution = space.execution
    return [
        make_plan(
            model.shape,
            nodes,
            workload(model),
            model.dtype,
            shards=None if execution.shards == "auto" else execution.shards,
            threads=execution.threads_per_worker,
            concurrent_trials=None if execution.concurrent_trials == "auto" else execution.concurrent_trials,
        )
        for model in models
    ]


def workload(model: PreparedModel) -> Workload:
    """What the trials of a model ask of its shards, for the memory model."""
    trials = [trial.trial for trial in model.trials]
    granularities = {trial.granularity for trial in trials}
    texts = [model.phases[0].tokens, *([model.validation] if model.validation is not None else [])]
    masks = {(t.criterion, t.sparsity, t.pattern, t.comparison_group) for t in trials if not t.is_dense}
    return Workload(
        texts=tuple((len(tokens), tokens.sequence_length) for tokens in texts),
        evaluation_tokens=max(tokens.sequence_length for tokens in model.evaluation.values()),
        batch_size=max((trial.batch_size or 1 for trial in trials), default=1),
        masks=len(masks),
        halves="subblock" in granularities,
        matrices="matrix" in granularities,
        recovery=any(trial.recovery == "reconstruct" for trial in trials),
        concurrent_trials=1,
    )
