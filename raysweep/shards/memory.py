"""The one memory model: bytes that a shard needs, from shapes alone. `plan` shows them, `launch` refuses by them.

Upper bounds: which linears of a block share their input cannot be read off shapes, so each counts as if it had its
own (Llama: 1.4 times the inputs and 1.2 times the Gram matrices that there are). Experts count for the share of tokens
that each sees if all see as many.

Compared with the quickstart before the first shard had a head too (float32, CPUs; peak resident MiB of a worker's
process, after all nine trials):
two shards under Ray with three trials in flight, predicted 1181 and 1277, measured 945 and 872; on twice the
calibration tokens predicted 1441 and 1537, measured 1383 and 1217; one shard in process with one trial at a time,
predicted 1572, measured 1194. On GPUs nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raysweep.model.shape import BlockShape, ModelShape
from raysweep.reconstruction.placement import ANEW, DEVICE, DISK, FILES, HOST, MADE, Placement

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# measured: 436 MiB once loaded; the rest is what calls side by side leave in the heap
PROCESS_BYTES = 768 << 20
# per number of a Gram matrix: four float64 copies while it is factorized, and the float32 factor
FACTORING_BYTES = 36
# per number of a Gram matrix and of a weight while a matrix is solved for: upper bounds of what `reconstruction` counts
SOLVING_GRAM, SOLVING_WEIGHT = 28, 56
# numbers kept for backward, per output of every linear and token; measured, Llama block
SAVED_PER_LINEAR_OUTPUT = 2.5
STATISTICS_SIZE = 4  # Gram matrices are float32
# whose inputs and targets a GPU holds: two that are read ahead or in hand, and the recorded one's
STEPS_GIVEN = 3


@dataclass(frozen=True)
class Workload:
    """What a sweep asks of its shards.

    texts: (samples, tokens) of every kept text (calibration, validation)
    evaluation_tokens: tokens of one window
    masks, updated: distinct masks kept at once, and those of them that come with updated weights (sparsegpt)
    factors: distinct factors of every Gram matrix, one for each dampening (sparsegpt)
    halves: whether boundaries within blocks are kept;  matrices: whether inputs of linears are
    span: most blocks that are trained together;  streams: whether trials carry activations of their own
    exact: whether matrices are solved for
    outputs: whether matrices are trained towards outputs, on other inputs than dense ones or with another loss than mse
    """

    texts: tuple[tuple[int, int], ...]
    evaluation_tokens: int
    batch_size: int
    masks: int
    halves: bool
    matrices: bool
    recovery: bool
    concurrent_trials: int
    updated: int = 0
    factors: int = 0
    span: int = 1
    streams: bool = False
    exact: bool = False
    outputs: bool = False


DEVICE_PARTS = ("weights", "trials", "recovery", "evaluation", "statistics", "masks", "factoring")


@dataclass(frozen=True)
class ShardMemory:
    """Bytes by what they are for. `device`: on the accelerator, or on a CPU part of the host's.

    weights, trials, masks, statistics: those that are in hand, which is all of them unless blocks come one by one
    masks: a byte a weight for each, and updated weights;  factoring: work on Gram matrices for these
    known_masks: those that trials share, wherever they lie
    waiting_on_host, waiting_on_disk: of weights, masks and statistics what waits there
    kept: inputs of linears, which `matrix` trains on, and factors of Gram matrices (sparsegpt): what later trials find
    and what is being made
    streams: activations of trials in flight whose units wait for one another, inputs of the matrix in hand on them, and
    what their units should give
    store: where activations are, with what is kept and streams: device, host or disk
    """

    weights: int
    activations: int
    statistics: int
    trials: int
    recovery: int
    evaluation: int
    masks: int
    factoring: int
    kept: int
    streams: int
    known_masks: int = 0
    waiting_on_host: int = 0
    waiting_on_disk: int = 0
    store: str = HOST

    @property
    def stored_on_device(self) -> bool:
        return self.store == DEVICE

    @property
    def device(self) -> int:
        computing: int = sum(getattr(self, part) for part in DEVICE_PARTS)
        return computing + self.stored * self.stored_on_device

    @property
    def host(self) -> int:
        return PROCESS_BYTES + self.waiting_on_host + self.stored * (self.store == HOST)

    @property
    def disk(self) -> int:
        """Of the folder for what finds no room in memory."""
        return self.waiting_on_disk + self.stored * (self.store == DISK)

    @property
    def stored(self) -> int:
        """Activations and what is made of them, wherever they are."""
        return self.activations + self.kept + self.streams

    @property
    def total(self) -> int:
        return self.device + self.host

    def keeping(self, limit: int, by_block: Sequence[int]) -> ShardMemory:
        """The same when of what can be kept, `by_block`, `limit` bytes are, at least one block's.

        A block's are made before the oldest ones go: for a moment they come on top.
        """
        largest = max(by_block, default=0)
        return replace(self, kept=min(sum(by_block), max(limit, largest) + largest))


def shard_memory(
    model: ModelShape,
    start: int,
    stop: int,
    dtype: str,
    work: Workload,
    head: bool = False,
    placement: Placement | None = None,
) -> ShardMemory:
    """The least that the shard with blocks `start` to `stop` works with, keeping one block's inputs and factors.

    head: whether it has the head; the last shard always does
    """
    blocks, size = model.blocks[start:stop], SIZES[dtype]
    has_head = head or stop == len(model.blocks)
    vocabularies = (start == 0) + has_head
    placement = placement or Placement()
    parameters = [block.parameters * size for block in blocks]
    trials = [2 * work.concurrent_trials * each for each in parameters]
    masks = [(work.masks + size * work.updated) * _prunable(block) for block in blocks]
    grams = [len(work.texts) * _gram_bytes(block) for block in blocks]
    memory = ShardMemory(
        weights=sum(parameters) + vocabularies * model.vocabulary_parameters * size,
        activations=_activation_bytes(model, len(blocks), size, work, placement),
        statistics=sum(grams),
        trials=sum(trials),
        recovery=_largest_recovery(blocks, model, size, work) if work.recovery else 0,
        evaluation=_evaluation_bytes(model, size, work, has_head),
        masks=sum(masks),
        factoring=_factoring_bytes(blocks, work),
        kept=0,
        streams=_stream_bytes(blocks, model, size, work),
        known_masks=sum(masks),
        store=placement.activations,
    ).keeping(0, keepable_bytes(blocks, size, work))
    waiting = {HOST: 0, DISK: 0, FILES: 0, ANEW: 0, DEVICE: 0}
    if placement.statistics != DEVICE:
        waiting[placement.statistics] += sum(grams)
        memory = replace(memory, statistics=max(map(_gram_bytes, blocks)))
    if placement.waits:
        in_hand = min(len(blocks), work.span + 1)  # those at work, and the one that comes next
        waiting[placement.weights] += sum(parameters)
        waiting[placement.trials] += sum(trials) + sum(masks)
        memory = replace(
            memory,
            weights=memory.weights - sum(parameters) + in_hand * max(parameters),
            trials=in_hand * max(parameters),
            masks=work.span * max(map(_prunable, blocks)),
        )
    return replace(memory, waiting_on_host=waiting[HOST], waiting_on_disk=waiting[DISK])


def _factoring_bytes(blocks: Sequence[BlockShape], work: Workload) -> int:
    """For updated weights that of the largest Gram matrix; on streams also a block's own Gram matrices and factors."""
    factoring = FACTORING_BYTES * max(map(_widest_input, blocks)) ** 2 if work.updated else 0
    on_streams = max(map(_gram_bytes, blocks)) * (1 + bool(work.updated)) * work.streams
    return factoring + on_streams


def keepable_bytes(blocks: Sequence[BlockShape], size: int, work: Workload) -> list[int]:
    """Block by block what later trials can find: the calibration inputs of its linears where matrices are trained
    alone, and the factors of their Gram matrices."""
    samples, tokens = work.texts[0] if work.texts else (0, 0)
    inputs = samples * tokens * size * work.matrices
    return [inputs * _input_widths(block) + work.factors * _gram_bytes(block) for block in blocks]


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


def _input_widths(block: BlockShape) -> int:
    """Of all linears' inputs: an upper bound, since some linears share theirs."""
    return math.ceil(sum(inputs * block.share(name) for name, (_, inputs) in block.linears.items()))


def _gram_bytes(block: BlockShape) -> int:
    """Gram matrix and sums of every linear's input: an upper bound, since some linears share theirs."""
    return STATISTICS_SIZE * sum(inputs * (inputs + 1) for _, inputs in block.linears.values())


def _activation_bytes(model: ModelShape, blocks: int, size: int, work: Workload, placement: Placement) -> int:
    """Of the boundaries that are kept, and of the few that are held when others are made anew."""
    kept = -(-(blocks + 1) // placement.every)
    halves = blocks if work.halves else 0
    is_all = placement.every == 1 and (placement.halves or not halves)
    boundaries = blocks + 1 + halves if is_all else min(kept + MADE + 1, blocks + 1 + halves)
    return _text_tokens(work) * boundaries * model.hidden * size


def _text_tokens(work: Workload) -> int:
    return sum(samples * tokens for samples, tokens in work.texts)


def _largest_recovery(blocks: Sequence[BlockShape], model: ModelShape, size: int, work: Workload) -> int:
    """Of the most blocks in a row that are trained together, and of the largest matrix that is solved for.

    One unit at a time; but where units reach over several shards, every trial in flight may have its part of one open.
    """
    each = [_recovery_bytes(block, model, size, work) for block in blocks]
    span = min(work.span, len(each))
    trained = max(sum(each[first : first + span]) for first in range(len(each) - span + 1))
    shapes = [shape for block in blocks for shape in block.linears.values()]
    solved = work.exact * max(SOLVING_GRAM * inputs**2 + SOLVING_WEIGHT * o * inputs for o, inputs in shapes)
    open_at_once = work.concurrent_trials if work.span > 1 else 1
    return max(trained * open_at_once, solved)


def _recovery_bytes(block: BlockShape, model: ModelShape, size: int, work: Workload) -> int:
    """Gradients, moments, masks as float32 and, below float32, masters; activations of one step, and inputs and targets
    of it and of those that are read ahead."""
    state = block.parameters * (size + 3 * 4 + (8 if size < 4 else 0))
    tokens = work.batch_size * max((tokens for _, tokens in work.texts), default=0)
    given = 2 * STEPS_GIVEN * (_widest_input(block) if work.matrices else model.hidden)
    return state + int(tokens * size * (_saved_per_token(block, model) + given))


def _evaluation_bytes(model: ModelShape, size: int, work: Workload, has_head: bool) -> int:
    tokens = max(2048, work.evaluation_tokens)
    widest = max(outputs for block in model.blocks for outputs, _ in block.linears.values())
    logits = (
        min(tokens * model.vocabulary, max(1 << 27, work.evaluation_tokens * model.vocabulary))
        if has_head
        else 0
    )
    return tokens * 4 * widest * size + 3 * 4 * logits


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
