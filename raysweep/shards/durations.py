"""How long the work of a sweep takes, from what a probe of the device has measured. No torch.

Shards work side by side, so that the busiest one counts, as long as enough trials are in flight: what goes from shard
to shard in turn cannot take less than one trial after another, by as many as are in flight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import HOST
from raysweep.shards.costs import (
    ALONE,
    BLOCKS,
    DENSE_PASS,
    FORWARD,
    HEAD,
    IMPORT,
    LOSSES,
    WORKERS,
    Kind,
    Piece,
    Work,
)
from raysweep.shards.memory import SIZES
from raysweep.shards.plan import ShardPlan

# Assumptions, from two CPU cores and from the 16 beside an H200 in November 2026, as multiples of what
# importing torch takes there: starting is Python's work, and slow where that is.
RAY_START = 3.6  # libraries, `ray.init`, actors and processes of trials: what comes one after another
RAY_START_WORK = 8.8  # of cores that such processes share
IN_PROCESS_START = 3.0  # libraries, looking at model and data, and the end
TRIAL = 0.2  # of one that Tune starts in a process that is there; and of writing its row
PHASE = 0.5  # that Tune takes for a calibration set
ASSUMED_CORES = 2  # of a machine that does not say
RESTART = 3.0  # of shards, after retraining
BUSY_SHARE = 0.8  # of the busiest shard's time while trials run over Ray; measured there too (0.75 to 0.85)
LOADING_BYTES_S = 1e9  # of weights from storage, a shard; assumption
LOCKING_BYTES_S = 8e9  # of host memory beside a GPU, page by page; measured, host of an H200
RETRAINING_START_S = 30.0  # of Ray Train and DeepSpeed, a trial
COMPILING_S = 26.0  # of a kind of unit on a GPU: H100, 1.2B shape


@dataclass(frozen=True)
class Rates:
    """What a probe has measured.

    seconds: by rate, of one block or of the head;  weights: of the linears of that block
    """

    seconds: Mapping[str, float]
    weights: int


@dataclass(frozen=True)
class Durations:
    """Seconds on the clock. kinds: of `dense_pass`, `trials` and `retraining`, by kind of trial

    in_process: of all with `--in-process`;  trials_busy: of all shards together, for trials, on CPUs of
    every core
    once: of `total` and of `in_process`, what a launch takes once for all its models
    """

    start: float
    dense_pass: float
    trials: float
    retraining: float
    kinds: Mapping[Kind, float]
    in_process: float
    trials_busy: float
    once: tuple[float, float] = (0.0, 0.0)

    @property
    def total(self) -> float:
        return self.start + self.dense_pass + self.trials + self.retraining


def durations(
    work: Work, model: ModelShape, plan: ShardPlan, rates: Rates, workers: int, cores: float
) -> Durations | None:
    """Of all trials of a model; None where the probe has not measured all that they do.

    workers: that retrain;  cores: of all machines, 0 = unknown
    """
    if any(rate not in rates.seconds for rate in (ALONE, FORWARD, IMPORT, *(p.rate for p in work.pieces))):
        return None
    pace = rates.seconds[IMPORT]
    if not work.trials:
        return Durations(0.0, 0.0, 0.0, 0.0, {}, 0.0, 0.0)
    scales = [_scale(model.blocks[start:stop], rates) for start, stop in plan.ranges]
    heads = {shard: 1 / len(plan.heads) for shard in plan.heads}
    slower = max(1.0, plan.all_shards * plan.threads / cores) if cores and plan.device == "cpu" else 1.0

    def busy(piece: Piece) -> list[float]:
        seconds = rates.seconds[piece.rate] * piece.amount * slower
        if piece.place == HEAD:
            return [seconds * heads.get(shard, 0.0) for shard in range(plan.shards)]
        return [seconds * scale for scale in scales]

    on_shards = [piece for piece in work.pieces if piece.place in (BLOCKS, HEAD)]
    dense = [
        sum(column) for column in zip(*(busy(p) for p in on_shards if p.kind == DENSE_PASS), strict=True)
    ]
    totals, latencies = [0.0] * plan.shards, defaultdict[int, float](float)
    by_kind, in_turn = defaultdict[Kind, float](float), defaultdict[int, float](float)
    apart = defaultdict[int, list[float]](lambda: [0.0] * plan.shards)
    for piece in on_shards:
        if piece.kind != DENSE_PASS:
            mine = busy(piece)
            by_kind[piece.kind] += sum(mine)
            totals = [a + b for a, b in zip(totals, mine, strict=True)]
            if piece.in_turn:
                in_turn[piece.trial] += sum(mine)
            else:
                apart[piece.trial] = [a + b for a, b in zip(apart[piece.trial], mine, strict=True)]
    for trial in range(work.trials):
        latencies[trial] = TRIAL * pace + in_turn[trial] + max(apart[trial])
    at_once = min(plan.all_concurrent_trials, work.trials)
    compiling = COMPILING_S * sum(rate.startswith("step") for rate in work.samples) if plan.compiles else 0.0
    trials = max(max(totals) / plan.replicas / BUSY_SHARE, sum(latencies.values()) / at_once) + compiling
    retraining = {
        piece.trial: (piece.kind, RETRAINING_START_S + _retraining(piece, model, rates) / workers)
        for piece in work.pieces
        if piece.place == WORKERS
    }
    size = SIZES[plan.dtype]
    loading = max(memory.weights for memory in plan.memory) / LOADING_BYTES_S
    kinds = {kind: trials * seconds / sum(by_kind.values()) for kind, seconds in by_kind.items()}
    for kind, seconds in retraining.values():
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    own = sum(dense) + sum(totals)
    all_weights = model.parameters * size / LOADING_BYTES_S
    locking = _locking_seconds(plan)
    ray_start = pace * (RAY_START + RAY_START_WORK / (cores or ASSUMED_CORES))
    forward = rates.seconds[FORWARD]  # of tiny models too little for the clock
    alone = min(1.0, rates.seconds[ALONE] / forward) if forward else 1.0
    in_process = IN_PROCESS_START * pace + all_weights + sum(locking) + own / slower * alone + compiling
    retrained = sum(seconds for _, seconds in retraining.values())
    return Durations(
        start=loading + ray_start + pace * (PHASE * work.phases + RESTART * work.retrains),
        dense_pass=max(dense, default=0.0) + max(locking),
        trials=trials,
        retraining=retrained,
        kinds=kinds | {DENSE_PASS: max(dense, default=0.0) + max(locking)},
        in_process=in_process + retrained,
        trials_busy=sum(totals) / slower * (plan.threads if plan.device == "cpu" else 1),
        once=(ray_start, pace * IN_PROCESS_START),
    )


def retraining_seconds(
    model: ModelShape, rates: Rates, rate: str, steps: float, step_tokens: int
) -> float | None:
    """Of training the whole model by one worker, its start left out; None where the probe knows nothing of it.

    rate: of the same step on a block;  step_tokens: of all its sequences
    """
    if rate not in rates.seconds or LOSSES not in rates.seconds:
        return None
    blocks = rates.seconds[rate] * _scale(model.blocks, rates)
    return steps * (blocks + 3 * rates.seconds[LOSSES] * step_tokens)


def _locking_seconds(plan: ShardPlan) -> list[float]:
    """Of what waits on the host beside a GPU, by shard, once: in the dense pass most of it is put there."""
    if plan.device != "cuda":
        return [0.0] * len(plan.memory)
    locked = [memory.waiting_on_host + memory.activations * (memory.store == HOST) for memory in plan.memory]
    return [nbytes / LOCKING_BYTES_S for nbytes in locked]


def _retraining(piece: Piece, model: ModelShape, rates: Rates) -> float:
    return piece.amount * rates.seconds[piece.rate] * _scale(model.blocks, rates)


def _scale(blocks: Sequence[BlockShape], rates: Rates) -> float:
    """How many of the probe's block these are."""
    weights = sum(o * i * block.share(name) for block in blocks for name, (o, i) in block.linears.items())
    return weights / rates.weights
