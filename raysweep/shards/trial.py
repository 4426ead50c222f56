"""One trial through a shard group: masks, units, evaluation, release. The same over Ray and in process; no torch."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raysweep.config.field_groups import MASK_FIELDS
from raysweep.config.trial import Trial
from raysweep.errors import NumericalError, RaysweepError, ShardLostError, first_line
from raysweep.fingerprint import fingerprint
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION
from raysweep.shards.artifact import Artifact
from raysweep.shards.calls import Calls, Stop
from raysweep.shards.columns import RowColumns, first_text
from raysweep.shards.group_info import GroupInfo, ShardGroup, TextInfo
from raysweep.shards.measured import MeasuredBatches
from raysweep.shards.outcome import (
    Evaluated,
    Finished,
    Outcome,
    Quality,
    Rung,
    as_shared,
    block_rows,
    evaluation_cost,
    fallbacks_of,
    quality_of,
    unit_columns,
    unit_row,
)
from raysweep.shards.recovery import Recovery, prune_blocks
from raysweep.shards.retrained import Retrained, RetrainingFolders, StartCost
from raysweep.shards.streams import Stream


@dataclass(frozen=True)
class TrialFolders:
    """Where a trial finds and leaves what is no result.

    retraining: of a trial that was retrained, of which only the measuring is left
    start: for the recovered weights, as `write_start` writes them: retraining starts from them
    artifact: for the weights of a trial that is kept
    unfinished: for its units and batches, until it is finished
    pruned, dense: the same of the model before recovery and of the dense one, which other trials need as well
    """

    retraining: RetrainingFolders | None = None
    start: Path | None = None
    artifact: Artifact | None = None
    unfinished: Path | None = None
    pruned: Path | None = None
    dense: Path | None = None


NO_FOLDERS = TrialFolders()


def run_trial(group: ShardGroup, trial: Trial, name: str, order: int) -> Outcome:
    """Runs one trial under a name that no other trial in flight has. `order`: lower goes first at every shard.

    Raises NumericalError when a mask, a unit or an evaluation gives numbers that are not finite.
    """
    (outcome,) = run_in_rungs(group, trial, name, order, ())
    if isinstance(outcome, Rung):
        raise RuntimeError("a trial without rungs came to one")
    return outcome


def run_in_rungs(
    group: ShardGroup,
    trial: Trial,
    name: str,
    order: int,
    rungs: Sequence[float],
    metric: str | None = None,
    folders: TrialFolders = NO_FOLDERS,
    label: str = "",
) -> Generator[Rung | Outcome]:
    """The same with a halt at each of `rungs`, fractions of the blocks; the outcome comes last.

    metric: the column to be measured at a rung. Closing the iterator between two of them ends the trial there.
    label: what people see of the trial while it runs; its name by default
    """
    started = time.monotonic()
    run = _Run(group, name, order, folders, label)
    if trial.is_dense:
        outcome = run.dense()
    elif trial.is_pruned_only:
        outcome = run.pruned_only(trial)
    elif folders.retraining is not None:
        outcome = run.retrained(trial, folders.retraining)
    else:
        outcome = yield from run.reconstructed(trial, rungs, metric)
    before = outcome.columns.get("seconds_total", 0.0)
    yield replace(outcome, columns=outcome.columns | {"seconds_total": before + time.monotonic() - started})


def write_start(
    group: ShardGroup,
    trial: Trial,
    name: str,
    order: int,
    folder: Path,
    owner: str,
    unfinished: Path,
    label: str = "",
) -> None:
    """Makes the masks of a retraining and the weights that it starts from, and writes them by block.

    owner: the trial on whose account they are made;  unfinished: for their units, until they are written
    label: as of `run_in_rungs`
    Raises NumericalError as `run_trial` does.
    """
    _Run(group, name, order, TrialFolders(unfinished=unfinished), label).write_start(trial, folder, owner)
    shutil.rmtree(unfinished, ignore_errors=True)


DENSE_KEY = "dense"
OF_THE_MOMENT = ("seconds", "peak_bytes", "peak_device_bytes")  # in rows of units, whatever their weights


def pruned_key(trial: Trial) -> str:
    """Equal for trials with equal masks: stands for the trial that only prunes."""
    return f"pruned-{fingerprint(only_pruned(trial).identity())}"


def known_perplexity(info: GroupInfo, value: float) -> Evaluated:
    """A model whose perplexity is known from an earlier launch, as far as other trials need it."""
    return Evaluated([], Quality({first_text(info): value}), [])


def only_pruned(trial: Trial) -> Trial:
    """The trial with the same mask that ends there."""
    fields = {name: getattr(trial, name) for name in MASK_FIELDS if getattr(trial, name) is not None}
    return Trial(recovery="none", seed=trial.seed, **fields)


class _Run:
    def __init__(self, group: ShardGroup, name: str, order: int, folders: TrialFolders, label: str) -> None:
        self.group, self.name, self.order, self.folders = group, name, order, folders
        self.info: GroupInfo = group.info
        self.calls = Calls(group, name, order, label or name)
        self.columns = RowColumns(self.info)
        self._evaluations: Finished = []  # of the trial's own weights, at rungs and at the end
        self._kept = False
        self._not_kept: str | None = None

    # The kinds of trial

    def dense(self) -> Outcome:
        dense, own = self._shared_dense()
        columns = self.columns.quality(dense.quality)
        columns |= self.columns.cost(dense.finished if own else as_shared(dense.finished))
        columns |= {
            "dense_perplexity": dense.quality.perplexities[first_text(self.info)],
            "output_error_calibration": 0.0,
        }
        if VALIDATION in self.info.texts:
            columns["output_error_validation"] = 0.0
        return Outcome(columns, [])

    def pruned_only(self, trial: Trial) -> Outcome:
        masks = self._shared_masks(trial)
        pruned, own = self._shared_pruned(trial)
        if isinstance(pruned, NumericalError):
            raise pruned
        columns = self.columns.quality(pruned.quality) | self._compared(pruned)
        columns |= self.columns.cost([*masks, *(pruned.finished if own else as_shared(pruned.finished))])
        columns |= self.columns.peaks(pruned.finished) if own else {}
        columns["fallbacks"] = fallbacks_of(pruned.linear_rows)
        self._keep_pruned(columns, trial)
        return self._outcome(columns, [*pruned.linear_rows, *block_rows(pruned.quality)])

    def reconstructed(
        self, trial: Trial, rungs: Sequence[float], metric: str | None
    ) -> Generator[Rung, None, Outcome]:
        masks = self._shared_masks(trial)
        try:
            self.calls.everywhere("begin", self.name)
            recovery = Recovery(self.calls, trial, self.folders.unfinished)
            yield from self._up_to_the_last(recovery, rungs, metric, masks)
            if self.folders.start is not None:
                self._keep_weights(masks, self.folders.start)
            linear_rows = self._linear_rows()
            batches = self._batches("end", recovery.rows)
            quality, finished = self._evaluate(self.name, list(self.info.texts), batches)
            is_own = trial.statistics_stream == "recovered"
            before = self._before_recovery(linear_rows) if is_own else None
            self._keep(self.columns.quality(quality), self.name)
        finally:
            self.calls.release(self.name)
        pruned = before or self._shared_pruned(trial)[0]
        units = recovery.rows
        columns = self.columns.quality(quality) | self._compared(pruned)
        columns |= unit_columns(units) | self.columns.cost([*masks, *finished], units, trial)
        columns |= self.columns.peaks(finished)
        columns["fallbacks"] = fallbacks_of([*linear_rows, *units])
        return self._outcome(columns, [*map(unit_row, units), *linear_rows, *block_rows(quality)])

    def retrained(self, trial: Trial, folders: RetrainingFolders) -> Outcome:
        cost, start = Retrained.read(folders.weights), StartCost.read(folders.start)
        self._shared_masks(trial)
        masks = f"masks@{self.name}"  # `start` has paid for them, so they are on another account
        try:
            self.calls.everywhere("begin", masks)
            linear_rows = self._prune(masks, trial)
            self.calls.everywhere("begin", self.name)
            self.calls.everywhere("read_weights", self.name, folders.weights)
            batches = self._batches("end", [asdict(cost)])
            quality, finished = self._evaluate(self.name, list(self.info.texts), batches)
            self._keep(self.columns.quality(quality), self.name, masks, folders.weights)
        finally:
            self.calls.release(self.name)
        columns = self.columns.quality(quality) | self._compared(self._shared_pruned(trial)[0])
        columns |= self.columns.retraining(
            self.columns.cost(finished), trial, cost, start, folders.tokens, self.name
        )
        columns |= self.columns.peaks(finished)
        columns["fallbacks"] = fallbacks_of(linear_rows)
        return self._outcome(columns, [*linear_rows, *block_rows(quality)])

    def write_start(self, trial: Trial, folder: Path, owner: str) -> None:
        masks = self._shared_masks(trial)
        try:
            self.calls.everywhere("begin", self.name)
            if trial.start is None:
                self._prune(self.name, trial)
            else:
                Recovery(self.calls, trial.start, self.folders.unfinished).go_on(1.0)
            self._write_weights(masks, folder, owner)
        finally:
            self.calls.release(self.name)

    # Their parts

    def _up_to_the_last(
        self, recovery: Recovery, rungs: Sequence[float], metric: str | None, masks: Finished
    ) -> Iterator[Rung]:
        """Recovers everything, with a halt at each rung that lies between two portions of the model."""
        for number, fraction in enumerate(rungs):
            if recovery.go_on(fraction) and recovery.remains:
                batches = self._batches(f"rung-{number}", recovery.rows)
                value, finished = self._measured(str(metric), batches)
                yield Rung(number, recovery.done, value, self.columns.cost([*masks, *finished]))
        recovery.go_on(1.0)

    def _measured(self, metric: str, batches: MeasuredBatches) -> tuple[float | None, Finished]:
        """The metric of the weights as they are, and what it took so far."""
        text = CALIBRATION if metric == "output_error_calibration" else VALIDATION
        quality, finished = self._evaluate(self.name, [text], batches)
        value = self.columns.of_text(quality, text).get(metric)
        if value is not None and not math.isfinite(value):
            raise NumericalError(f"{metric} is {value} with a part of the model recovered")
        return value, finished

    def _keep_weights(self, masks: Finished, folder: Path) -> None:
        """For a retraining, whose failure it is where they cannot be written: it has them made again."""
        try:
            self._write_weights(masks, folder, owner=self.name)
        except ShardLostError:
            raise
        except RaysweepError:
            shutil.rmtree(folder, ignore_errors=True)

    def _keep_pruned(self, columns: Mapping[str, Any], trial: Trial) -> None:
        """Of a model whose weights are gone, or were another trial's: its masks are known, so that they are there again
        at once."""
        name = f"kept@{self.name}"  # on an account of its own: the trial's row is not to pay
        if not self._is_wanted(columns):
            return
        try:
            self.calls.everywhere("begin", name)
            self._prune(name, trial)
            self._fill(name)
        except ShardLostError:
            raise
        except Exception as error:  # whatever it is, the trial is measured
            self._not_kept = first_line(error)
        finally:
            self.calls.release(name)

    def _keep(
        self, columns: Mapping[str, Any], name: str, masks: str | None = None, beside: Path | None = None
    ) -> None:
        """Leaves the weights under a name where kept trials lie, if those with such numbers are wanted there.

        masks, beside: as of `Artifact.fill`
        """
        if self._is_wanted(columns):
            self._fill(name, masks, beside)

    def _is_wanted(self, columns: Mapping[str, Any]) -> bool:
        return self.folders.artifact is not None and self.folders.artifact.wants(columns)

    def _fill(self, name: str, masks: str | None = None, beside: Path | None = None) -> None:
        if self.folders.artifact is not None:
            self._not_kept = self.folders.artifact.fill(self.calls, name, masks, beside)
            self._kept = self._not_kept is None

    def _outcome(self, columns: dict[str, Any], rows: list[dict[str, Any]]) -> Outcome:
        return Outcome(columns, self._placed(rows), self._kept, self._not_kept)

    def _write_weights(self, masks: Finished, folder: Path, owner: str) -> None:
        """Writes the weights as they are by block, and what they took so far."""
        columns = self.columns.cost([*masks, *self._finish(self.name)])
        self.calls.everywhere("write_weights", self.name, folder)
        StartCost(owner, columns["device_seconds"], columns["device_seconds_standalone"]).write(folder)

    def _shared_masks(self, trial: Trial) -> Finished:
        """Masks behind pruned blocks are made by one pass along the chain, for all trials that share them.

        Returns what the pass cost, for this trial's account.
        """
        if trial.statistics_stream != "pruned":
            return []
        name, made_here = f"{pruned_key(trial)}/masks@{self.name}", False

        def make() -> Finished:
            nonlocal made_here
            made_here = True
            try:
                self.calls.everywhere("begin", name)
                Stream.enter(self.calls, name, [CALIBRATION]).prune(name, trial, 0, self.info.blocks)
                return self._finish(name)
            finally:
                self.calls.release(name)

        finished = self.group.share(f"{pruned_key(trial)}/masks", self.name, make, everywhere=False)
        costs = [shard | {"dense_seconds": 0.0} for shard in finished]
        return costs if made_here else as_shared(costs)

    def _shared_pruned(self, trial: Trial) -> tuple[Evaluated | NumericalError, bool]:
        """What every trial with this mask shares: its evaluation before recovery. And whether it was made here.

        A model that is too damaged to be evaluated is shared as the error, which a recovery may well mend.
        """
        alone, name = only_pruned(trial), f"{pruned_key(trial)}@{self.name}"
        made_here: list[bool] = []

        def make() -> Evaluated | NumericalError:
            made_here.append(True)
            try:
                self.calls.everywhere("begin", name)
                linear_rows = self._prune(name, alone)
                batches = MeasuredBatches.of(self.folders.pruned, "pruned", linear_rows)
                return Evaluated(linear_rows, *self._evaluate(name, list(self.info.texts), batches))
            except NumericalError as error:
                return error
            finally:
                self.calls.release(name)

        return self.group.share(pruned_key(trial), self.name, make), bool(made_here)

    def _compared(self, pruned: Evaluated | NumericalError) -> dict[str, Any]:
        first = first_text(self.info)
        dense, _ = self._shared_dense()
        before = None if isinstance(pruned, NumericalError) else pruned.quality.perplexities[first]
        return {"dense_perplexity": dense.quality.perplexities[first], "pruned_perplexity": before}

    def _before_recovery(self, linear_rows: list[dict[str, Any]]) -> Evaluated | NumericalError:
        """The same of masks that no other trial has, as far as this one's row needs it."""
        name = f"pruned@{self.name}"
        self.calls.everywhere("copy_pruned", self.name, name)
        try:
            batches = self._batches("before", linear_rows)
            return Evaluated([], *self._evaluate(name, [first_text(self.info)], batches))
        except NumericalError as error:
            return error

    def _shared_dense(self) -> tuple[Evaluated, bool]:
        """The dense model's perplexities, for all trials."""
        made_here: list[bool] = []

        def make() -> Evaluated:
            made_here.append(True)
            texts = [text for text in self.info.texts if text != CALIBRATION]
            return Evaluated(
                [], *self._evaluate(None, texts, MeasuredBatches.of(self.folders.dense, "dense"))
            )

        return self.group.share(DENSE_KEY, self.name, make), bool(made_here)

    def _prune(self, name: str, trial: Trial) -> list[dict[str, Any]]:
        return prune_blocks(self.calls, name, trial, range(self.info.blocks))

    def _linear_rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.calls.everywhere("pruned_rows", self.name) for row in rows]

    def _evaluate(
        self, weights: str | None, texts: list[str], known: MeasuredBatches
    ) -> tuple[Quality, Finished]:
        """How good the weights are on the texts, and what all that was done under their name took.

        Batches that are not known yet pass through the chain, several at once; every shard works on another one.
        """
        wanted = [known.missing(self.info.texts[text], self.info.together) for text in texts]
        for text, measured in self.calls.routed(wanted, self._evaluation_route(weights)):
            known.add(measured, self.info.texts[text])
        batches = [batch for text in texts for batch in known.of_text(self.info.texts[text])]
        finished, cost = self._finish(weights or DENSE_KEY), evaluation_cost(batches)
        quality = quality_of(batches, finished, self.info.texts)
        if weights != self.name:
            return quality, [*finished, cost]
        self._evaluations.append(cost)
        return quality, [*finished, *self._evaluations]

    def _evaluation_route(self, weights: str | None) -> Callable[[TextInfo], list[Stop]]:
        """Batches through all shards; those that have the head take turns with it."""
        turns, last = itertools.cycle(self.info.heads), self.info.shards - 1

        def route(text: TextInfo) -> list[Stop]:
            head = last if text.name == CALIBRATION else next(turns)
            stops = [(shard, "forward", (weights, head == last)) for shard in range(self.info.shards)]
            return stops if head == last else [*stops, (head, "measure", (weights,))]

        return route

    def _batches(self, what: str, made_of: Sequence[Mapping[str, Any]]) -> MeasuredBatches:
        """Of an evaluation of the trial. made_of: rows whose numbers tell its weights from others"""
        told = [{name: value for name, value in row.items() if name not in OF_THE_MOMENT} for row in made_of]
        return MeasuredBatches.of(self.folders.unfinished, what, told)

    def _finish(self, name: str) -> Finished:
        return self.calls.everywhere("finish", name)

    def _placed(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the shard that holds their (first) block."""
        return [row | {"shard": self.info.shard_of(row["block"])} for row in rows]
