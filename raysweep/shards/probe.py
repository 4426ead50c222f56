"""A few seconds on this machine's device that tell how long a sweep's work takes: a block of its model's shape, with
random weights, does what shards do.

What takes steps, masks or solutions is measured by the product's own code on the sweep's own settings. On CPUs long
sequences of large models are shortened: times then are extrapolated, along a line through two lengths, and attention,
which grows faster, comes out too low. The block of an 8B model takes a core a minute and a half, and its
statistics, which few tokens then pay for, come out too slow.
"""

# O outputs, I inputs of a linear; B samples of a batch, T tokens of a sample, H hidden

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from raysweep.shards.costs import (
    ALONE,
    FACTORS,
    FORWARD,
    GRAM_ERRORS,
    IMPORT,
    LOSSES,
    SOLVING,
    STATISTICS,
)
from raysweep.shards.rates import Probed

CPU_STEP_FLOPS = 1.5e10  # of a step on a block, a thread: about half a second
FEWEST_TOKENS = 16
LONG_S = 1.0  # calls that take longer are made once
PASSES = (STATISTICS, FORWARD, LOSSES, GRAM_ERRORS)
MOST_COMPANIONS = 31  # assumption: beyond, one more changes little
LONGEST_COMPANY_S = 120  # should this process be killed
COMPANION = f"""
import time
import numpy
matrix = numpy.ones((768, 768), dtype=numpy.float32)
print(flush=True)
ends = time.monotonic() + {LONGEST_COMPANY_S}
while time.monotonic() < ends:
    matrix @ matrix
"""
CPU_STEPS = 6
MASK_FLOPS = (
    500.0  # that a mask's scores and sorting are worth, a weight: what decides on how many are measured
)
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


@contextlib.contextmanager
def _companions(number: int, threads: int) -> Iterator[None]:
    """Within the context so many other processes multiply matrices: shards on one machine share caches, bandwidth of
    memory and, where two cores are one core's threads, arithmetic units."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    others: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(min(number, MOST_COMPANIONS)):
            command = [sys.executable, "-c", COMPANION]
            others.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        for other in others:
            if other.stdout is not None:
                other.stdout.readline()  # it works by now
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.communicate()


def _import_seconds() -> float:
    """Of a core, that a process which imports torch takes: how fast Python starts here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class _Probe:
    def __init__(self, probed: Probed, shard: ModelShard) -> None:
        self.probed, self.shard, self.device = probed, shard, shard.device
        self.generator = torch.Generator(self.device).manual_seed(0)

    def all(self, wanted: Mapping[str, Trial]) -> dict[str, float]:
        length = self._length(batch=2)
        alone = {ALONE: self._passes(length, (FORWARD,))[FORWARD], IMPORT: _import_seconds()}
        on_cpus = self.device.type == "cpu"
        with _companions(self.probed.together - 1 if on_cpus else 0, self.probed.threads):
            found = self._passes(length)
            for rate, trial in wanted.items():
                if rate == SOLVING:
                    found[SOLVING] = self._solving(trial)
                elif rate.startswith("step"):
                    found |= self._steps(rate, trial)
                elif rate.startswith("mask"):
                    found |= self._masks(rate, trial)
        return found | alone

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
        numbers = torch.randn(size, device=self.device, generator=self.generator)
        return numbers.to(self.shard.dtype)

    def _samples(self, length: int) -> int:
        """Of a batch that passes: as shards have it, or on CPUs as many as pass in about half a second."""
        whole: int = batches(1 << 20, length, self.device)[0].stop
        if self.device.type != "cpu":
            return whole
        most = CPU_STEP_FLOPS * self.probed.threads / (2 * self.probed.weights * length)
        return max(1, min(whole, int(most)))

    def _cheap(self, flops: Mapping[str, float]) -> tuple[list[str], float]:
        """Names of linears to measure something on, and what it takes on all by what it takes on these: on CPUs the
        cheapest alone where all would take long."""
        total = sum(flops.values())
        if self.device.type != "cpu" or total <= CPU_STEP_FLOPS * self.probed.threads:
            return list(flops), 1.0
        cheapest = min(flops, key=lambda name: flops[name])
        return [cheapest], total / flops[cheapest]

    def _seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Of the median call, after one that does not count, unless it takes long."""
        with self._drained() as clock:
            call()
        taken = [clock()] if clock() > LONG_S else []
        for _ in range(0 if taken else repeats):
            with self._drained() as clock:
                call()
            taken.append(clock())
        return sorted(taken)[len(taken) // 2]

    @contextlib.contextmanager
    def _drained(self) -> Iterator[Callable[[], float]]:
        """Seconds within the context; on CPUs those of a core, as if no other program were there."""

        def now() -> float:
            if self.device.type == "cpu":
                return time.process_time() / self.probed.threads
            torch.cuda.synchronize(self.device)
            return time.perf_counter()

        begun = now()
        ended: list[float] = []
        yield lambda: ended[0] - begun
        ended.append(now())

    def _passes(self, length: int, names: Sequence[str] = PASSES) -> dict[str, float]:
        """Of what passes batches through the block and the head, a token; and of errors from Gram matrices."""
        samples = self._samples(length)
        blocks, rows, hidden_BTH = (
            self._range(length, samples),
            slice(0, samples),
            self._hidden(samples, length),
        )
        tokens = samples * length
        ids_BT = torch.randint(
            self.probed.shape.vocabulary, (samples, length), device=self.device, generator=self.generator
        )
        piece = max(1, min(samples, 2048 // length))
        blocks.begin("probe")
        self._masked(blocks, "probe", Trial(recovery="none", criterion="magnitude", sparsity=0.5))
        block = next(iter(blocks.blocks.values()))
        weights = blocks.weights["probe"]
        names_here, of_all = self._cheap({name: 2.0 * o * i**2 for name, (o, i) in self.shapes.items()})

        def gram_errors() -> None:
            for linear in (block.linears[name] for name in names_here):
                weight_OI = linear.from_stored(weights[f"{linear.name}.weight"])
                blocks.matrix_error(CALIBRATION, block, linear, weight_OI)

        calls: dict[str, tuple[Callable[[], object], int]] = {
            STATISTICS: (lambda: blocks.dense_pass("again", samples, rows, hidden_BTH), tokens),
            FORWARD: (lambda: blocks.forward("probe", "other", rows, hidden_BTH), tokens),
            LOSSES: (
                lambda: window_losses(self.shard, hidden_BTH[:piece], ids_BT[:piece]),
                piece * length,
            ),
            GRAM_ERRORS: (gram_errors, 1),
        }
        found = {name: self._seconds(calls[name][0]) / calls[name][1] for name in names}
        return found | ({GRAM_ERRORS: found[GRAM_ERRORS] * of_all} if GRAM_ERRORS in found else {})

    def _masked(self, blocks: BlockRange, name: str, trial: Trial) -> None:
        blocks.begin(name)
        for block in blocks.blocks.values():
            blocks.prune(name, MaskRecipe.of(trial), block)

    def _masks(self, rate: str, trial: Trial) -> dict[str, float]:
        """Of all linears of the block; with sparsegpt of its factors, which masks share, apart."""
        length = self._length(batch=2)
        blocks = self._range(length, self._samples(length))
        asked = (
            trial if rate.split()[1] == trial.criterion else trial.model_copy(update={"criterion": "wanda"})
        )
        names, of_all = self._cheap({name: MASK_FLOPS * o * i for name, (o, i) in self.shapes.items()})
        of_factors = 1.0
        if trial.criterion == "sparsegpt":
            names, of_all = self._cheap({name: float(o * i**2) for name, (o, i) in self.shapes.items()})
            groups = self.probed.shape.blocks[self.probed.index].grams
            mine = sum(i**3 for i in {self.shapes[name][1] for name in names})
            of_factors = sum(i**3 for i, _ in groups) / mine if len(names) == 1 else 1.0
        changes = {"targets": tuple(names), "statistics_stream": "dense", "sparsity": asked.sparsity}
        asked, taken = asked.model_copy(update=changes), list[float]()
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
        found = {rate: taken[2] * of_all}
        if trial.criterion == "sparsegpt":
            found[FACTORS] = max(0.0, taken[1] - taken[2]) * of_factors
        return found

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(O, I) of the block's linears."""
        return self.probed.shape.blocks[self.probed.index].linears

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
        blocks, given = self._range(length, trial.batch_size or 1), self._as_probed(trial)
        few, more = (1, CPU_STEPS) if self.device.type == "cpu" else DEVICE_STEPS
        first = self._trained(blocks, given, few)
        if self.device.type == "cpu" and first > LONG_S:
            return first, 0.0
        long = min(self._trained(blocks, given, more) for _ in range(2))
        if self.device.type == "cpu":  # where a unit's first step takes little more than others
            return long / more, 0.0
        short = min(self._trained(blocks, given, few) for _ in range(2))
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
        blocks = self._range(length, self._samples(length))
        names, of_all = self._cheap({name: 60.0 * o * i**2 for name, (o, i) in self.shapes.items()})
        given = trial.model_copy(
            update={"criterion": "magnitude", "statistics_stream": None, "input_stream": "dense"}
        )
        given = given.model_copy(update={"target_stream": "dense", "targets": None, "ignore": None})
        self._masked(blocks, "probe", given)
        seconds = 0.0
        for unit in units_in(blocks, "matrix"):
            if not set(unit.linears) & set(names):
                continue
            solver = Solver(blocks, "probe", given, unit)
            with self._drained() as clock:
                solved = solver.solve()
            seconds += clock() / (solved.iterations + 2)
        return seconds * of_all
