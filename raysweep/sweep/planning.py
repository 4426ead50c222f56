"""What the trials of a sweep ask of its shards, and the plans that follow."""

from __future__ import annotations

from collections.abc import Sequence

from raysweep.cluster.nodes import Node
from raysweep.config.space import SearchSpace
from raysweep.config.spellings import MODEL, window_length
from raysweep.config.trial import Trial
from raysweep.pruning.recipe import MaskRecipe
from raysweep.shards.memory import Workload
from raysweep.shards.plan import ShardPlan, make_plan
from raysweep.shards.stores import Stores
from raysweep.sweep.prepare import Phase, PreparedModel

COMPILE_FROM_FLOPS = 3e16
"""Of a sweep's training on units. Compiling takes half a minute (H100, 1.2B shape: 26 s), and pays by about here."""


def make_plans(
    models: Sequence[PreparedModel], space: SearchSpace, nodes: Sequence[Node], one_at_a_time: bool = False
) -> list[ShardPlan]:
    """One plan per model, on all nodes. Raises CapacityError when one cannot fit.

    one_at_a_time: whether trials run one after another, whatever the space says
    """
    execution = space.execution
    in_flight = None if execution.concurrent_trials == "auto" else execution.concurrent_trials
    return [
        make_plan(
            model.shape,
            nodes,
            workload(model),
            model.dtype,
            shards=None if execution.shards == "auto" else execution.shards,
            threads=execution.threads_per_worker,
            concurrent_trials=1 if one_at_a_time else in_flight,
            stores=Stores(
                execution.weight_store,
                execution.activation_store,
                execution.statistics_store,
                execution.boundaries,
                execution.scratch,
            ),
            replicas=execution.replicas,
            compiles=execution.compile == "always"
            or (execution.compile == "auto" and training_flops(model, space) >= COMPILE_FROM_FLOPS),
        )
        for model in models
    ]


def workload(model: PreparedModel) -> Workload:
    """What the trials of a model ask of its shards, for the memory model: of every part the most that a phase asks."""
    trials = model.possible
    calibrations = [phase.tokens for phase in model.phases]
    largest = max(calibrations, key=lambda tokens: len(tokens) * tokens.sequence_length)
    texts = [largest, *([model.validation] if model.validation is not None else [])]
    every_text = [*texts, *model.evaluation.values()]
    return Workload(
        texts=tuple((len(tokens), tokens.sequence_length) for tokens in texts),
        evaluation_tokens=max(tokens.sequence_length for tokens in model.evaluation.values()),
        batch_size=max((trial.batch_size or 1 for trial in trials), default=1),
        masks=max(len(_recipes(phase)) for phase in model.phases),
        updated=max(
            sum(recipe.criterion == "sparsegpt" for recipe in _recipes(phase)) for phase in model.phases
        ),
        factors=max(len(_dampenings(phase)) for phase in model.phases),
        granularities=frozenset(_unit_kind(trial) for trial in trials if trial.granularity),
        concurrent_trials=1,
        most_trials=max(map(_trials_of, model.phases)),
        span=max((_span(trial, len(model.shape.blocks)) for trial in trials), default=1),
        streams=any(trial.is_sequential or trial.statistics_stream == "pruned" for trial in trials),
        own_masks=any(
            trial.statistics_stream == "recovered" or trial.recovery == "retrain" for trial in trials
        ),
        exact=any(trial.optimizer == "exact" for trial in trials),
        inputs=any(map(_trains_on_inputs, trials)),
        kept_share=max((_kept_share(trial) for trial in trials if not trial.is_dense), default=1.0),
        outputs=any(map(_trains_towards_outputs, trials)),
        ranks_matrices=any(trial.comparison_group == "matrix" for trial in trials),
        trained_tokens=max((trial.epochs or 0 for trial in trials), default=0)
        * len(largest)
        * largest.sequence_length,
        most_tokens=max(len(tokens) * tokens.sequence_length for tokens in every_text),
    )


def training_flops(model: PreparedModel, space: SearchSpace) -> float:
    """Of all steps on units of more than a matrix that the space asks for on this model, finished or not: six a weight
    and token."""
    tokens = {phase.calibration: len(phase.tokens) * phase.tokens.sequence_length for phase in model.phases}
    weights = sum(outputs * inputs for outputs, inputs in model.shape.linears.values())
    epochs = sum(
        (one.trial.epochs or 0) * tokens[one.calibration]
        for one in space.typical()
        if one.model == model.config and one.calibration in tokens
        if one.trial.recovery == "reconstruct" and one.trial.granularity != "matrix"
    )
    return 6.0 * weights * epochs


def _trials_of(phase: Phase) -> int:
    """That have weights of their own, with those that retraining starts from."""
    changed = [trial.trial for trial in phase.trials if not trial.trial.is_dense]
    starts = sum(trial.recovery == "retrain" for trial in changed)
    return len(changed) + starts + 2 * sum(study.samples for study in phase.studies)


def _recipes(phase: Phase) -> set[MaskRecipe]:
    """Of the masks of a phase, which its shards keep until the next calibration set comes."""
    corners = (corner.trial for study in phase.studies for corner in study.corners())
    trials = (*(trial.trial for trial in phase.trials), *corners)
    return {MaskRecipe.of(trial) for trial in trials if not trial.is_dense}


def _dampenings(phase: Phase) -> set[float | None]:
    """Of the factors that masks of the phase share; behind pruned blocks every mask has its own."""
    return {recipe.dampening for recipe in _recipes(phase) if recipe.stream == "dense"} - {None}


def _unit_kind(trial: Trial) -> str:
    """Its granularity, of windows without their length."""
    return str(trial.granularity).partition(":")[0]


def _trains_on_inputs(trial: Trial) -> bool:
    """Whether inputs of its matrices are kept; the exact optimum on dense ones follows from their Gram matrices."""
    by_gram = trial.optimizer == "exact" and trial.input_stream == "dense"
    return trial.granularity == "matrix" and not by_gram


def _kept_share(trial: Trial) -> float:
    """Of the weights of a pruned linear, at most."""
    recipe = MaskRecipe.of(trial)
    if recipe.n_of_m is not None:
        return recipe.n_of_m[0] / recipe.n_of_m[1]
    return 1.0 - trial.sparsity if isinstance(trial.sparsity, float) else 1.0


def _trains_towards_outputs(trial: Trial) -> bool:
    return trial.granularity == "matrix" and (trial.input_stream == "pruned" or trial.loss != "mse")


def _span(trial: Trial, blocks: int) -> int:
    """How many blocks the trial trains together."""
    return blocks if trial.granularity == MODEL else window_length(str(trial.granularity)) or 1
