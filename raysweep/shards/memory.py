"""The one memory model: bytes that a shard needs, from shapes alone. `plan` shows them, `launch` refuses by them, and
says at its end what was held.

What lasts adds up; of what is held at work only the most counts, since a shard does one thing at a time. Linears that
share their input are known by their names, and experts count for the share of tokens that each sees if all see as
many. Constants say how they were found; `benchmarks/plan_reality.py` and `benchmarks/large_models.py` hold the whole
against what shards have held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from raysweep.at_once import (
    COLUMNS_AT_ONCE,
    RANKED_AT_ONCE,
    batch_tokens,
    solving_bytes,
    tokens_at_once,
)
from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import ANEW, DEVICE, DISK, FILES, HOST, IN_HAND, MADE, Placement

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 416 << 20  # measured over Ray on CPUs
BLOCK_PROCESS_BYTES = (
    600 << 10
)  # of a block beside its tensors: modules and results; measured: 670 KiB with tensors of 115 KiB
# Of what is held at work, so much again stays in the heap of a process on CPUs, and where blocks come into hand, which
# gives it back; measured
HEAP_SHARE, WAITING_HEAP_SHARE = 1.0, 0.1
# Beside a GPU, with its libraries; and more where units of several matrices are trained. Measured on the host of an
# H200: 1.15 to 1.22 GiB, and 1.28, with a small unit that is being written 1.35 to 1.5.
DEVICE_PROCESS_BYTES, DEVICE_TRAINING_BYTES = 1280 << 20, 128 << 20
# A recovered unit is written where that takes less time than it took (`UnfinishedUnits`): so much a second; assumption,
# a network file system. And FLOPs a second that plans take training for, to know whether it will be; assumptions.
WRITING_BYTES_S = 200e6
TRAINING_FLOPS_S = {"cpu": 1e11, "cuda": 4e14}
# per number of a Gram matrix: four float64 copies while it is factorized, and the float32 factor
FACTORING_BYTES = 36
# numbers kept for backward, per output of every linear and token; measured, Llama block
SAVED_PER_LINEAR_OUTPUT = 2.5
FORWARD_PER_WIDEST = 4  # numbers of a forward pass in a row of the widest output; measured, Llama block
SOLVED_BYTES = 5  # per weight that a matrix is solved for: the new one and its mask
RANKING_BYTES = 20  # per score: thresholds, ties and positions
STATISTICS_SIZE = 4  # Gram matrices are float32
# whose inputs and targets a GPU holds: two that are read ahead or in hand, and the recorded one's
STEPS_GIVEN = 3
BATCHES_GIVEN = 2  # of an error pass


@dataclass(frozen=True)
class Workload:
    """What a sweep asks of its shards.

    texts: (samples, tokens) of every kept text (calibration, validation)
    evaluation_tokens: tokens of one window;  most_tokens: of the largest text, kept or not; None = unknown
    masks, updated: distinct masks kept at once, and those of them that come with updated weights (sparsegpt)
    factors: distinct factors of every Gram matrix, one for each dampening (sparsegpt)
    granularities: of the units that are trained;  span: most blocks that are trained together
    concurrent_trials: in flight;  most_trials: with weights of their own, that a calibration set has; None = unknown
    own_masks: whether some have masks of their own, behind what they have recovered
    streams: whether trials carry activations of their own
    exact: whether matrices are solved for;  inputs: whether some are trained on their inputs, which are kept
    outputs: whether matrices are trained towards outputs, on other inputs than dense ones or with another loss than mse
    trained_tokens: that a unit sees in all epochs, at most
    kept_share: the most of the weights that a mask keeps;  ranks_matrices: whether some rank whole matrices
    """

    texts: tuple[tuple[int, int], ...]
    evaluation_tokens: int
    batch_size: int
    masks: int
    granularities: frozenset[str]
    concurrent_trials: int
    most_trials: int | None = None
    updated: int = 0
    factors: int = 0
    span: int = 1
    streams: bool = False
    own_masks: bool = False
    exact: bool = False
    inputs: bool = False
    outputs: bool = False
    kept_share: float = 1.0
    ranks_matrices: bool = False
    most_tokens: int | None = None
    trained_tokens: int = 0

    @property
    def halves(self) -> bool:
        """Whether boundaries within blocks are kept."""
        return "subblock" in self.granularities

    @property
    def matrices(self) -> bool:
        """Whether matrices are recovered alone."""
        return "matrix" in self.granularities

    @property
    def summed_texts(self) -> int:
        """Texts whose Gram matrices are needed: errors of matrices follow from those of the validation set."""
        return len(self.texts) if self.matrices else min(1, len(self.texts))


class Keepable(NamedTuple):
    """Bytes of a block that later trials can find: the calibration inputs of its linears where matrices are trained
    alone, and the factors of their Gram matrices."""

    inputs: int
    factors: int

    @property
    def total(self) -> int:
        return self.inputs + self.factors


@dataclass(frozen=True)
class ShardMemory:
    """Bytes by what they are for. `device`: on the accelerator, or on a CPU part of the host's.

    weights, trials, masks, statistics: those that are in hand, which is all of them unless blocks come one by one
    masks: a bit a weight for each, and updated weights; on a GPU where blocks come into hand those of the blocks at
    work, a byte a weight
    dense, pruning, recovery, evaluation: what is held at work, of which only the most counts; errors of units are part
    of evaluation
    kept, factors: inputs of linears, which `matrix` trains on, and of Gram matrices (sparsegpt), in host memory: what
    later trials find and what is being made
    streams: activations of trials in flight whose units wait for one another, inputs of the matrix in hand on them, and
    what their units should give
    known_masks: those that trials share, wherever they lie
    left: of a recovered unit, which waits in host memory to be written while the next one is recovered
    waiting_on_host, waiting_on_disk: of weights, masks and statistics what waits there
    heap: what calls before have left there
    store: where activations are, with kept inputs and streams: device, host or disk
    process: of a process that holds no tensors yet
    """

    weights: int
    trials: int
    masks: int
    statistics: int
    dense: int
    pruning: int
    recovery: int
    evaluation: int
    activations: int
    kept: int
    streams: int
    factors: int = 0
    known_masks: int = 0
    left: int = 0
    waiting_on_host: int = 0
    waiting_on_disk: int = 0
    heap: int = 0
    store: str = HOST
    process: int = PROCESS_BYTES

    @property
    def at_work(self) -> int:
        """Of what is held at work the most."""
        return max(self.dense, self.pruning, self.recovery, self.evaluation)

    @property
    def stored_on_device(self) -> bool:
        return self.store == DEVICE

    @property
    def device(self) -> int:
        lasting = self.weights + self.trials + self.masks + self.statistics
        return lasting + self.at_work + self.heap + self.stored * self.stored_on_device

    @property
    def host(self) -> int:
        waiting = self.waiting_on_host + self.left + self.factors
        return self.process + waiting + self.stored * (self.store == HOST)

    @property
    def disk(self) -> int:
        """Of the folder for what finds no room in memory."""
        return self.waiting_on_disk + self.stored * (self.store == DISK)

    @property
    def stored(self) -> int:
        """Activations and inputs made of them, wherever they are."""
        return self.activations + self.kept + self.streams

    @property
    def total(self) -> int:
        return self.device + self.host

    def keeping(self, limit: int, by_block: Sequence[Keepable]) -> ShardMemory:
        """The same when of what can be kept, `by_block`, `limit` bytes are, at least one block's.

        A block's are made before the oldest ones go: for a moment they come on top.
        """
        everything = sum(block.total for block in by_block)
        largest = max((block.total for block in by_block), default=0)
        kept = min(everything, max(limit, largest) + largest)
        factors = sum(block.factors for block in by_block) * kept // everything if everything else 0
        return replace(self, kept=kept - factors, factors=factors)


def shard_memory(
    model: ModelShape,
    start: int,
    stop: int,
    dtype: str,
    work: Workload,
    head: bool = False,
    placement: Placement | None = None,
    device: str = "cpu",
) -> ShardMemory:
    """The least that the shard with blocks `start` to `stop` works with, keeping one block's inputs and factors.

    head: whether it has the head; the last shard always does;  device: cpu or cuda
    """
    blocks, size = model.blocks[start:stop], SIZES[dtype]
    has_head = head or stop == len(model.blocks)
    vocabularies = (start == 0) + has_head
    placement, on_gpu = placement or Placement(), device == "cuda"
    parameters = [block.parameters * size for block in blocks]
    trials = [work.concurrent_trials * (1 + work.own_masks) * each for each in parameters]
    masks = [_mask_bytes(block, size, work) for block in blocks]
    grams = [work.summed_texts * gram_bytes(block) for block in blocks]
    forward = _forward_bytes(model, size, work, on_gpu)
    given = 2 * BATCHES_GIVEN * _batch_tokens(on_gpu, work) * model.hidden * size * on_gpu
    waits_elsewhere = placement.statistics != DEVICE
    made = work.summed_texts * max(map(gram_bytes, blocks)) if placement.statistics == ANEW else 0
    memory = ShardMemory(
        weights=sum(parameters) + vocabularies * model.vocabulary_parameters * size,
        trials=sum(trials),
        masks=sum(masks),
        statistics=sum(grams),
        dense=forward + max(waits_elsewhere * max(map(gram_bytes, blocks)), made),
        pruning=_pruning_bytes(blocks, size, work)
        + waits_elsewhere * 4 * max(map(_widest_input, blocks)) ** 2,
        recovery=_largest_recovery(blocks, model, size, work, on_gpu, made),
        evaluation=max(forward + given, _logits_bytes(model, size, work, on_gpu) if has_head else 0)
        + _joined_bytes(placement, on_gpu, model, size, work),
        activations=_activation_bytes(model, len(blocks), size, work, placement),
        kept=0,
        streams=_stream_bytes(blocks, model, size, work),
        known_masks=sum(masks),
        left=_left_bytes(blocks, size, work, device),
        store=placement.activations,
        process=_process_bytes(work, on_gpu) + len(blocks) * BLOCK_PROCESS_BYTES,
    ).keeping(0, keepable_bytes(blocks, size, work))
    waiting = {HOST: 0, DISK: 0, FILES: 0, ANEW: 0, DEVICE: 0}
    if waits_elsewhere:
        waiting[placement.statistics] += sum(grams)
        memory = replace(memory, statistics=0, pruning=memory.pruning + made)
    if placement.waits:
        in_hand = min(len(blocks), work.span + IN_HAND - 1)
        open_at_once = work.concurrent_trials if work.span > 1 else 1  # as of `_largest_recovery`
        # then none is ever put away; weights that were retrained wait first, and then are in hand as well
        stay = len(blocks) <= IN_HAND and not work.own_masks
        waiting[placement.weights] += sum(parameters)
        waiting[placement.trials] += sum(masks) + (0 if stay else sum(trials))
        memory = replace(
            memory,
            weights=memory.weights - sum(parameters) + in_hand * max(parameters),
            trials=sum(trials) if stay else in_hand * max(parameters) * open_at_once,
            masks=work.span * max(map(_prunable, blocks)) if on_gpu else 0,
        )
    heap = 0 if on_gpu else int((WAITING_HEAP_SHARE if placement.waits else HEAP_SHARE) * memory.at_work)
    return replace(memory, waiting_on_host=waiting[HOST], waiting_on_disk=waiting[DISK], heap=heap)


def _pruning_bytes(blocks: Sequence[BlockShape], size: int, work: Workload) -> int:
    """Of the linear that takes most: its scores and their ranking, then the error of its output in float64; updated
    weights, and the factor that they come from; on streams also a block's own Gram matrices and factors."""
    shapes = [shape for block in blocks for shape in block.linears.values()]
    together = max(o * i for o, i in shapes) if work.ranks_matrices else RANKED_AT_ONCE
    ranking = max(5 * o * i + RANKING_BYTES * min(o * i, together) for o, i in shapes)
    error = max((12 + size) * o * i + 8 * (o + i) * min(i, COLUMNS_AT_ONCE) for o, i in shapes)
    updating = max(12 * o * i + FACTORING_BYTES * i**2 for o, i in shapes) if work.updated else 0
    on_streams = max(map(gram_bytes, blocks)) * (1 + bool(work.updated)) * work.streams
    return max(ranking, error, updating) + on_streams


def keepable_bytes(blocks: Sequence[BlockShape], size: int, work: Workload) -> list[Keepable]:
    """Block by block."""
    samples, tokens = work.texts[0] if work.texts else (0, 0)
    inputs = samples * tokens * size * work.inputs
    return [Keepable(inputs * _input_widths(block), work.factors * gram_bytes(block)) for block in blocks]


def _stream_bytes(blocks: Sequence[BlockShape], model: ModelShape, size: int, work: Workload) -> int:
    """Of every trial in flight; targets of a matrix of the one whose turn it is."""
    inputs = max(map(_widest_input, blocks)) * work.matrices
    outputs = max(outputs for block in blocks for outputs, _ in block.linears.values()) * work.outputs
    streams = work.streams * work.concurrent_trials * (2 * model.hidden + inputs)
    return _text_tokens(work) * size * (streams + outputs)


def _widest_input(block: BlockShape) -> int:
    return max(inputs for _, inputs in block.linears.values())


def _prunable(block: BlockShape) -> int:
    return sum(outputs * inputs for outputs, inputs in block.linears.values())


def _mask_bytes(block: BlockShape, size: int, work: Workload) -> int:
    packed = sum(-(-outputs * inputs // 8) for outputs, inputs in block.linears.values())
    return work.masks * packed + size * work.updated * _prunable(block)


def _input_widths(block: BlockShape) -> int:
    """Of the inputs of all linears, those that several share once."""
    return math.ceil(sum(inputs * share for inputs, share in block.grams))


def gram_bytes(block: BlockShape) -> int:
    """Gram matrix and sums of every input."""
    return STATISTICS_SIZE * sum(inputs * (inputs + 1) for inputs, _ in block.grams)


def _activation_bytes(model: ModelShape, blocks: int, size: int, work: Workload, placement: Placement) -> int:
    """Of the boundaries that are kept, and of the few that are held when others are made anew."""
    kept = -(-(blocks + 1) // placement.every)
    halves = blocks if work.halves else 0
    is_all = placement.every == 1 and (placement.halves or not halves)
    boundaries = blocks + 1 + halves if is_all else min(kept + MADE + 1, blocks + 1 + halves)
    return _text_tokens(work) * boundaries * model.hidden * size


def _process_bytes(work: Workload, on_gpu: bool) -> int:
    if not on_gpu:
        return PROCESS_BYTES
    return DEVICE_PROCESS_BYTES + DEVICE_TRAINING_BYTES * any(name != "matrix" for name in work.granularities)


def _text_tokens(work: Workload) -> int:
    return sum(samples * tokens for samples, tokens in work.texts)


def _largest_recovery(
    blocks: Sequence[BlockShape], model: ModelShape, size: int, work: Workload, on_gpu: bool, made: int
) -> int:
    """Of the unit that takes most when it is trained, and of the largest matrix that is solved for.

    made: Gram matrices of a block, which are made again once for all its matrices

    One unit at a time; but where units reach over several shards, every trial in flight may have its part of one open.
    """
    if not work.granularities:
        return 0
    each = [_recovery_bytes(block, model, size, work, on_gpu, made) for block in blocks]
    span = min(work.span, len(each))
    trained = max(sum(each[first : first + span]) for first in range(len(each) - span + 1))
    shapes = [shape for block in blocks for shape in block.linears.values()]
    solved = work.exact * max(solving_bytes(o, inputs) + SOLVED_BYTES * o * inputs for o, inputs in shapes)
    open_at_once = work.concurrent_trials if work.span > 1 else 1
    return max(trained * open_at_once, solved + work.exact * made)


def _recovery_bytes(
    block: BlockShape, model: ModelShape, size: int, work: Workload, on_gpu: bool, made: int
) -> int:
    """Gradients, moments, masks and, below float32, masters of the largest unit of the block; activations of one step,
    and inputs and targets of it and of those that are read ahead."""
    tokens = work.batch_size * max((tokens for _, tokens in work.texts), default=0)
    largest = 0
    for granularity in work.granularities:
        for names in units_in(block, granularity):
            shapes = [block.linears[name] for name in names]
            weights = sum(outputs * inputs for outputs, inputs in shapes)
            if granularity not in ("matrix", "subblock"):
                weights = block.parameters
            outputs = sum(block.linears[name][0] * block.share(name) for name in names)
            saved = SAVED_PER_LINEAR_OUTPUT * outputs + 4 * model.hidden
            widest = max(inputs for _, inputs in shapes) if granularity == "matrix" else model.hidden
            given = 2 * STEPS_GIVEN * widest if on_gpu else 2 * widest
            state = weights * _state_bytes(size, work, on_gpu)
            beside = made if granularity == "matrix" else 0
            largest = max(largest, int(state + tokens * size * (saved + given)) + beside)
    return largest


def _left_bytes(blocks: Sequence[BlockShape], size: int, work: Workload, device: str) -> int:
    """Of the largest unit's weights, where it will be written; one that reaches over several shards is written block by
    block."""
    if 6 * work.trained_tokens / TRAINING_FLOPS_S[device] < size / WRITING_BYTES_S:
        return 0
    span = work.span if work.span <= len(blocks) else 1
    largest = [
        max(
            sum(outputs * inputs for outputs, inputs in map(block.linears.__getitem__, names))
            if granularity in ("matrix", "subblock")
            else block.parameters * span
            for names in units_in(block, granularity)
        )
        for granularity in work.granularities
        for block in blocks
    ]
    return size * max(largest, default=0)


def _state_bytes(size: int, work: Workload, on_gpu: bool) -> float:
    """Of a trained weight, beside itself: on GPUs in 16 bits gradient, mask, and master and moments if it is kept; else
    gradient, moments, mask, the same as a factor and, below float32, master and its gradient."""
    if on_gpu and size < 4:
        return size + 1 + 12 * work.kept_share
    return size + 1 + 3 * 4 + (8 if size < 4 else 0)


def units_in(block: BlockShape, granularity: str) -> list[list[str]]:
    """Names of the linears of every unit: those of a half are the ones below the same part of the block."""
    names = list(block.linears)
    if granularity == "matrix":
        return [[name] for name in names]
    if granularity != "subblock":
        return [names]
    parts = [name.split(".") for name in names]
    depth = next((k for k, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), 0)
    halves: dict[str, list[str]] = {}
    for name, words in zip(names, parts, strict=True):
        halves.setdefault(words[depth], []).append(name)
    return list(halves.values())


def _batch_tokens(on_gpu: bool, work: Workload) -> int:
    """Of a forward pass: as many windows as make a batch, and no less than one."""
    longest = max((tokens for _, tokens in work.texts), default=0)
    return max(batch_tokens(on_gpu), work.evaluation_tokens, longest)


def _forward_bytes(model: ModelShape, size: int, work: Workload, on_gpu: bool) -> int:
    widest = max(outputs for block in model.blocks for outputs, _ in block.linears.values())
    return _batch_tokens(on_gpu, work) * FORWARD_PER_WIDEST * widest * size


def _joined_bytes(placement: Placement, on_gpu: bool, model: ModelShape, size: int, work: Workload) -> int:
    """Of batches that pass the blocks together: as they came, as they are, and, where boundaries are made anew, in the
    dense model."""
    if placement.together == 1:
        return 0
    tokens = placement.together * _batch_tokens(on_gpu, work)
    tokens = tokens if work.most_tokens is None else min(tokens, work.most_tokens)
    return (2 + (placement.every > 1)) * tokens * model.hidden * size


def _logits_bytes(model: ModelShape, size: int, work: Workload, on_gpu: bool) -> int:
    """Logits, the same in float32, and what their logarithm takes."""
    tokens = min(_batch_tokens(on_gpu, work), tokens_at_once(model.vocabulary, on_gpu))
    numbers = tokens * model.vocabulary
    return numbers * (size + (4 if size < 4 else 0) + 4)


def retraining_bytes(
    parameters: int,
    trained: int,
    size: int,
    stage: int,
    workers: int,
    saved: int,
    teacher: bool = False,
    offload: bool = False,
) -> int:
    """What one worker of a retraining holds where it computes: weights, gradients, optimizer, activations, teacher.

    ZeRO (Rajbhandari et al., arXiv 1910.02054) spreads over the workers: from stage 1 moments and masters, from stage 2
    gradients, with stage 3 weights. saved: activations of a micro-batch;  offload: the optimizer's part lies elsewhere
    """
    spread = [workers if stage >= first else 1 for first in (1, 2, 3)]
    optimizer = trained * (8 + (4 if size < 4 else 0)) // spread[0]
    gradients = trained * size // spread[1]
    weights = parameters * size // spread[2]
    return weights + gradients + (0 if offload else optimizer) + saved + parameters * size * teacher


def saved_activation_bytes(model: ModelShape, tokens: int, size: int, checkpointing: bool) -> int:
    """Of a forward pass over so many tokens through the whole model: what blocks keep, and logits in float32.

    checkpointing: only what flows between the blocks, and what the largest of them keeps
    """
    blocks = [tokens * size * _saved_per_token(block, model) for block in model.blocks]
    logits = 3 * 4 * tokens * model.vocabulary
    if not checkpointing:
        return int(sum(blocks)) + logits
    return int(max(blocks)) + len(blocks) * tokens * size * model.hidden + logits


def _saved_per_token(block: BlockShape, model: ModelShape) -> float:
    """Numbers that a block keeps for backward, per token."""
    outputs = sum(outputs * block.share(name) for name, (outputs, _) in block.linears.items())
    return SAVED_PER_LINEAR_OUTPUT * outputs + 4 * model.hidden
