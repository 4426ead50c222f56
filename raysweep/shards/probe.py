"""A few seconds on this machine's device that tell how long a sweep's work takes: a block of its model's shape, with
random weights, does what shards do.

What takes steps, masks or solutions is measured by the product's own code on the sweep's own settings. On CPUs long
sequences of large models are shortened: times then are extrapolated, along a line through two lengths, and attention,
which grows faster, comes out too low.
"""

# O outputs, I inputs of a linear; B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raysweep.config.trial import Trial
from raysweep.errors import NumericalError
from raysweep.model.evaluation import window_losses
from raysweep.model.shard import ModelShard
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.device_stage import DeviceStage
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import units_in
from raysweep.reconstruction.solving import Solver
from raysweep.reconstruction.stage import Stage
from raysweep.shards.costs import FACTORS, FORWARD, GRAM_ERRORS, LOSSES, SOLVING, STATISTICS
from raysweep.shards.rates import Probed

CPU_STEP_FLOPS = 1.5e10  # of a step on a block, a thread: about half a second
FEWEST_TOKENS = 16
FEW_STEPS, MORE_STEPS = 2, 8
DEVICE_STEPS = 6, 24  # a graph is recorded from the fourth


def measure(probed: Probed, wanted: Mapping[str, Trial]) -> dict[str, float]:
    """Seconds by rate: what all sweeps need, and what these trials do. Leaves torch's threads as they were."""
    before = torch.get_num_threads()
    if probed.device == "cpu":
        torch.set_num_threads(probed.threads)
    try:
        shard = ModelShard.random(
            probed.source, probed.index, probed.index + 1, probed.dtype, probed.device, head=True
        )
        return _Probe(probed, shard).all(wanted)
    finally:
        torch.set_num_threads(before)


class _Probe:
    def __init__(self, probed: Probed, shard: ModelShard) -> None:
        self.probed, self.shard, self.device = probed, shard, shard.device
        self.generator = torch.Generator().manual_seed(0)

    def all(self, wanted: Mapping[str, Trial]) -> dict[str, float]:
        length = self._length(batch=2)
        found = self._passes(length)
        for rate, trial in wanted.items():
            if rate == SOLVING:
                found[SOLVING] = self._solving(trial)
            elif rate.startswith("step"):
                found |= self._steps(rate, trial)
            elif rate.startswith("mask"):
                found |= self._masks(rate, trial)
        return found

    def _length(self, batch: int) -> int:
        """Tokens of a sequence, of which a step on a CPU takes about half a second at most."""
        if self.device.type != "cpu":
            return self.probed.length
        most = CPU_STEP_FLOPS * self.probed.threads / (6 * self.probed.weights * batch)
        return int(min(self.probed.length, max(FEWEST_TOKENS, most)))

    def _range(self, length: int, samples: int) -> BlockRange:
        """A range of one block behind its dense pass over so many random samples."""
        blocks = BlockRange(self.shard)
        blocks.compiles = self.probed.compiles
        blocks.dense_pass(CALIBRATION, samples, slice(0, samples), self._hidden(samples, length))
        return blocks

    def _hidden(self, samples: int, length: int) -> Tensor:
        size = (samples, length, self.probed.shape.hidden)
        return torch.randn(size, generator=self.generator).to(self.device, self.shard.dtype)

    def _seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Of the median call, after one that does not count."""
        call()
        taken = []
        for _ in range(repeats):
            with self._drained() as clock:
                call()
            taken.append(clock())
        return sorted(taken)[len(taken) // 2]

    @contextlib.contextmanager
    def _drained(self) -> Iterator[Callable[[], float]]:
        def now() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter()

        begun = now()
        ended: list[float] = []
        yield lambda: ended[0] - begun
        ended.append(now())

    def _passes(self, length: int) -> dict[str, float]:
        """Of what passes batches through the block and the head, a token."""
        samples = batches(1 << 20, length, self.device)[0].stop
        blocks, rows, hidden_BTH = (
            self._range(length, samples),
            slice(0, samples),
            self._hidden(samples, length),
        )
        tokens = samples * length
        ids_BT = torch.randint(self.probed.shape.vocabulary, (samples, length), generator=self.generator)
        piece = max(1, min(samples, 2048 // length))
        blocks.begin("probe")
        self._masked(blocks, "probe", Trial(recovery="none", criterion="magnitude", sparsity=0.5))
        block = next(iter(blocks.blocks.values()))
        linears, weights = list(block.linears.values()), blocks.weights["probe"]

        def gram_errors() -> None:
            for linear in linears:
                weight_OI = linear.from_stored(weights[f"{linear.name}.weight"])
                blocks.matrix_error(CALIBRATION, block, linear, weight_OI)

        return {
            STATISTICS: self._seconds(lambda: blocks.dense_pass("again", samples, rows, hidden_BTH)) / tokens,
            FORWARD: self._seconds(lambda: blocks.forward("probe", "other", rows, hidden_BTH)) / tokens,
            LOSSES: self._seconds(lambda: window_losses(self.shard, hidden_BTH[:piece], ids_BT[:piece]))
            / (piece * length),
            GRAM_ERRORS: self._seconds(gram_errors),
        }

    def _masked(self, blocks: BlockRange, name: str, trial: Trial) -> None:
        blocks.begin(name)
        for block in blocks.blocks.values():
            blocks.prune(name, MaskRecipe.of(trial), block)

    def _masks(self, rate: str, trial: Trial) -> dict[str, float]:
        """Of all linears of the block; with sparsegpt of its factors, which masks share, apart."""
        length = self._length(batch=2)
        enough = (
            max(1, max(i for _, i in self.shard_shapes) // length + 1) if self.device.type != "cpu" else 4
        )
        blocks = self._range(length, max(enough, batches(1 << 20, length, self.device)[0].stop))
        asked = (
            trial if rate.split()[1] == trial.criterion else trial.model_copy(update={"criterion": "wanda"})
        )
        asked = asked.model_copy(update={"targets": None, "statistics_stream": "dense"})
        taken = []
        for name in (
            "warm",
            "first",
            "second",
        ):  # each a recipe of its own; the second finds the first one's factors
            if name == "first":
                blocks.knowledge.clear()
            with self._drained() as clock:
                self._masked(blocks, name, asked.model_copy(update={"ignore": (f"{name} of none",)}))
            taken.append(clock())
            blocks.release(name)
        if trial.criterion != "sparsegpt":
            return {rate: taken[2]}
        return {rate: taken[2], FACTORS: max(0.0, taken[1] - taken[2])}

    @property
    def shard_shapes(self) -> list[tuple[int, int]]:
        return list(self.probed.shape.blocks[self.probed.index].linears.values())

    def _steps(self, rate: str, trial: Trial) -> dict[str, float]:
        """Of a step on the block's units, one after another, and of what comes before the first."""
        batch = trial.batch_size or 1
        length = self._length(batch)
        step, opening = self._step_seconds(trial, length)
        if length < self.probed.length:
            half, _ = self._step_seconds(trial, length // 2)
            step += max(0.0, step - half) / (length - length // 2) * (self.probed.length - length)
        return {rate: step, f"open {rate}": opening}

    def _step_seconds(self, trial: Trial, length: int) -> tuple[float, float]:
        few, more = (FEW_STEPS, MORE_STEPS) if self.device.type == "cpu" else DEVICE_STEPS
        blocks = self._range(length, trial.batch_size or 1)
        given = self._as_probed(trial)
        self._trained(blocks, given, few)
        short = min(self._trained(blocks, given, few) for _ in range(2))
        long = min(self._trained(blocks, given, more) for _ in range(2))
        step = max(0.0, long - short) / (more - few)
        return step, max(0.0, short - few * step)

    def _as_probed(self, trial: Trial) -> Trial:
        """The trial on dense streams, of a block alone where its units are larger."""
        changes: dict[str, Any] = {
            "recovery": "reconstruct",
            "criterion": "magnitude",
            "sparsity": 0.5,
            "pattern": "unstructured",
            "comparison_group": "row",
            "targets": None,
            "ignore": None,
            "statistics_stream": None,
            "input_stream": "dense",
            "target_stream": "dense",
            "learning_rate": 1e-6,
        }
        if trial.granularity not in ("matrix", "subblock", "block"):
            changes["granularity"] = "block"
        if trial.recovery == "retrain":
            changes |= {"loss": "mse", "trainable": "all" if trial.trainable == "blocks" else trial.trainable}
        if trial.granularity == "matrix" and trial.input_stream == "pruned" and trial.loss == "mse":
            changes["loss"] = "normalized_mse"  # goes by tokens as well
        return trial.model_copy(update=changes)

    def _trained(self, blocks: BlockRange, trial: Trial, steps: int) -> float:
        """Seconds of training all units of the block, their objectives made before."""
        trial, seconds = trial.model_copy(update={"epochs": steps}), 0.0
        self._masked(blocks, "probe", trial)
        kind = Stage if self.device.type == "cpu" else DeviceStage
        for unit in units_in(blocks, str(trial.granularity)):
            objective = objective_of(blocks, "probe", trial, unit)
            objective.inputs(CALIBRATION)
            with self._drained() as clock, contextlib.suppress(NumericalError):
                kind(blocks, "probe", trial, unit, objective).train()
            seconds += clock()
        blocks.release("probe")
        return seconds

    def _solving(self, trial: Trial) -> float:
        """Of an iteration for all matrices of the block."""
        length = self._length(batch=2)
        blocks = self._range(length, batches(1 << 20, length, self.device)[0].stop)
        given = trial.model_copy(
            update={"criterion": "magnitude", "statistics_stream": None, "input_stream": "dense"}
        )
        given = given.model_copy(update={"target_stream": "dense", "targets": None, "ignore": None})
        self._masked(blocks, "probe", given)
        seconds = 0.0
        for unit in units_in(blocks, "matrix"):
            solver = Solver(blocks, "probe", given, unit)
            with self._drained() as clock:
                solved = solver.solve()
            seconds += clock() / (solved.iterations + 2)
        return seconds
