"""How long the work of a sweep takes, from what a probe of the device has measured. No torch.

Shards work side by side, so that the busiest one counts, as long as enough trials are in flight: what goes from shard
to shard in turn cannot take less than one trial after another, by as many as are in flight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    if not work.trials:
        return Durations(0.0, 0.0, 0.0, 0.0, {}, 0.0, 0.0)
    return _Counted(work, model, plan, rates, workers, cores).durations()


class _Counted:
    """Work in seconds. `busy` are of every shard, while as many others work beside it as the plan has.

    slower: how many times, where shards share cores
    """

    def __init__(
        self, work: Work, model: ModelShape, plan: ShardPlan, rates: Rates, workers: int, cores: float
    ) -> None:
        self.work, self.model, self.plan, self.rates, self.workers = work, model, plan, rates, workers
        self.pace = rates.seconds[IMPORT]
        self.ray_start = self.pace * (RAY_START + RAY_START_WORK / (cores or ASSUMED_CORES))
        shared = bool(cores) and plan.device == "cpu"
        self.slower = max(1.0, plan.all_shards * plan.threads / cores) if shared else 1.0
        self.scales = [_scale(model.blocks[start:stop], rates) for start, stop in plan.ranges]
        self.on_shards = [
            (piece, self._busy(piece)) for piece in work.pieces if piece.place in (BLOCKS, HEAD)
        ]
        self.dense = self._sums(busy for piece, busy in self.on_shards if piece.kind == DENSE_PASS)
        self.busy = self._sums(busy for piece, busy in self.on_shards if piece.kind != DENSE_PASS)
        kinds_of_steps = sum(rate.startswith("step") for rate in work.samples)
        self.compiling = COMPILING_S * kinds_of_steps if plan.compiles else 0.0

    def durations(self) -> Durations:
        work, plan, retraining = self.work, self.plan, self._retraining()
        loading = max(memory.weights for memory in plan.memory) / LOADING_BYTES_S
        dense_pass = max(self.dense) + max(_locking_seconds(plan))
        trials, retrained = self._trials(), sum(retraining.values())
        kinds = self._kinds(trials)
        for kind, seconds in retraining.items():
            kinds[kind] = kinds.get(kind, 0.0) + seconds
        return Durations(
            start=loading + self.ray_start + self.pace * (PHASE * work.phases + RESTART * work.retrains),
            dense_pass=dense_pass,
            trials=trials,
            retraining=retrained,
            kinds=kinds | {DENSE_PASS: dense_pass},
            in_process=self._in_process() + retrained,
            trials_busy=sum(self.busy) / self.slower * (plan.threads if plan.device == "cpu" else 1),
            once=(self.ray_start, self.pace * IN_PROCESS_START),
        )

    def _trials(self) -> float:
        """As long as the busiest shard takes, or as the trials one after another, as many as are in flight at once."""
        in_turn = defaultdict[int, float](float)
        apart = defaultdict[int, list[float]](lambda: [0.0] * self.plan.shards)
        for piece, busy in self.on_shards:
            if piece.in_turn:
                in_turn[piece.trial] += sum(busy)
            else:
                apart[piece.trial] = [a + b for a, b in zip(apart[piece.trial], busy, strict=True)]
        each = [TRIAL * self.pace + in_turn[n] + max(apart[n]) for n in range(self.work.trials)]
        at_once = min(self.plan.all_concurrent_trials, self.work.trials)
        return max(max(self.busy) / self.plan.replicas / BUSY_SHARE, sum(each) / at_once) + self.compiling

    def _kinds(self, trials: float) -> dict[Kind, float]:
        """Seconds of trials on shards, by their shares of what shards do."""
        found, total = defaultdict[Kind, float](float), sum(self.busy)
        for piece, busy in self.on_shards:
            if piece.kind != DENSE_PASS:
                found[piece.kind] += trials * sum(busy) / total
        return dict(found)

    def _retraining(self) -> dict[Kind, float]:
        """Seconds of workers, by kind. A trial has one such piece."""
        found = defaultdict[Kind, float](float)
        for piece in self.work.pieces:
            if piece.place == WORKERS:
                steps = piece.amount * self.rates.seconds[piece.rate] * _scale(self.model.blocks, self.rates)
                found[piece.kind] += RETRAINING_START_S + steps / self.workers
        return dict(found)

    def _in_process(self) -> float:
        """Of all but retraining: shards work one after another, none beside them."""
        weights = self.model.parameters * SIZES[self.plan.dtype] / LOADING_BYTES_S
        forward = self.rates.seconds[FORWARD]  # of tiny models too little for the clock
        alone = min(1.0, self.rates.seconds[ALONE] / forward) if forward else 1.0
        own = (sum(self.dense) + sum(self.busy)) / self.slower * alone
        start = IN_PROCESS_START * self.pace
        return start + weights + sum(_locking_seconds(self.plan)) + own + self.compiling

    def _busy(self, piece: Piece) -> list[float]:
        seconds = self.rates.seconds[piece.rate] * piece.amount * self.slower
        if piece.place == HEAD:
            heads = self.plan.heads
            return [seconds / len(heads) * (shard in heads) for shard in range(self.plan.shards)]
        return [seconds * scale for scale in self.scales]

    def _sums(self, each: Iterable[list[float]]) -> list[float]:
        """By shard."""
        return [sum(column) for column in zip([0.0] * self.plan.shards, *each, strict=True)]


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


def _scale(blocks: Sequence[BlockShape], rates: Rates) -> float:
    """How many of the probe's block these are."""
    weights = sum(o * i * block.share(name) for block in blocks for name, (o, i) in block.linears.items())
    return weights / rates.weights
