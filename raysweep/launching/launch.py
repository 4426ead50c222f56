"""A sweep from beginning to end: prepare, drop what is finished, plan, start shards, run, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.cluster.nodes import this_node
from raysweep.config.paths import typed_path
from raysweep.config.space import SearchSpace
from raysweep.config.spaces import resolve_space
from raysweep.errors import CapacityError, RaysweepError, StorageError, UsageError, first_line
from raysweep.importing import without_collecting
from raysweep.launching.model_run import ModelRun
from raysweep.launching.prepared import Launch
from raysweep.launching.progress import Progress, Silent
from raysweep.launching.reality import Keeper
from raysweep.launching.recorder import Recorder, recorded
from raysweep.launching.runners import InProcess, OnRay, Runner, importing_tune
from raysweep.launching.stopping import stoppable
from raysweep.launching.tasks import kept_weights, measure_tasks, places, task_jobs
from raysweep.launching.tracing import Tracing
from raysweep.results.artifacts import (
    NONE,
    Keeping,
    artifact_folder,
    kept_trials,
    remove_artifact,
    remove_unfinished,
)
from raysweep.results.atomic import remove_stale_temporaries, write_atomically
from raysweep.results.cleaning import put_many_together
from raysweep.results.folders import (
    SPACE_FILE,
    UNFINISHED,
    bring_up_to_date,
    new_sweep_folder,
    storage_folder,
    there_for_now,
)
from raysweep.results.lock import launch_lock, refuse_where_held
from raysweep.results.mirror import lags, pull_in_hand, push, pushing
from raysweep.results.reader import load_results, trial_rows
from raysweep.results.remote import remote_of
from raysweep.results.uris import CACHE_VARIABLE, is_shared, place_of
from raysweep.shards.plan import ShardPlan
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import prepare

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def launch(
    space: SearchSpace | str | Path,
    *,
    storage: str | Path | None = None,
    name: str | None = None,
    address: str | None = None,
    in_process: bool = False,
    trace: bool = False,
    retry_failed: bool = False,
    fail_fast: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Runs a sweep, or continues the one of that name; returns all its rows.

    space:      a search space, its YAML file, or the name of one that ships with raysweep
    storage:    folder or URI of the results, as `--storage`;  name: instead of the space's own
    address:    of a Ray cluster, as `--address`
    in_process: without Ray, one trial after another; the numbers are the same
    retry_failed: run trials again that failed numerically; others that failed run again in any case
    fail_fast:  begin nothing new once a trial has failed
    trace:      leave `trace.json` in the sweep's folder: what launch and shards did when, for Perfetto or Chrome

    Raises UsageError before anything starts or is written when the sweep cannot work. Trials that fail are rows with
    status `failed`.
    """
    progress = Tracing(progress or Silent()) if trace else progress or Silent()
    loaded = _loaded(space, name)
    folder = checked_folder(loaded, storage)
    refuse_where_held(folder)
    if in_process:
        _check_in_process(loaded, address)
    keeper = Keeper(in_process)
    prepare_here = partial(_without_rows, loaded, folder, retry_failed=retry_failed)
    progress.stage("Checking model and data")
    if in_process:
        prepared = prepare_here(device_here())
        _check_fit(prepared, one_at_a_time=True)
        with _in_hand(folder) as held:
            _run(_with_rows(prepared), InProcess(), held, progress, fail_fast, keeper)
    else:
        _launch_on_ray(prepare_here, folder, address, progress, fail_fast, keeper)
    return load_results(folder)


def prepare_launch(space: SearchSpace, folder: Path, device: str) -> Launch:
    """Reads and checks everything that can be before anything starts. Raises UsageError."""
    return _with_rows(_without_rows(space, folder, device))


def _without_rows(space: SearchSpace, folder: Path, device: str, retry_failed: bool = False) -> Launch:
    if space.execution.trackers:
        _check_trackers(space)
    with without_collecting():
        models = prepare(space, device)
    return Launch(space, folder, models, {}, retry_failed)


def _with_rows(prepared: Launch) -> Launch:
    """With those that are there. A launch reads them once the sweep is in its hands: until then another one may bring
    some."""
    return replace(prepared, rows=trial_rows(prepared.folder) if prepared.folder.exists() else {})


def _check_fit(prepared: Launch, one_at_a_time: bool = False) -> None:
    """Raises CapacityError where this machine cannot hold what a sweep, yet without its rows, has to run."""
    try:
        _check_fit_of(prepared, one_at_a_time)
    except CapacityError:
        there = _with_rows(prepared)
        if there.to_run:
            _check_fit_of(there, one_at_a_time)


def _check_fit_of(prepared: Launch, one_at_a_time: bool) -> None:
    make_plans(prepared.models, prepared.space, [this_node()], one_at_a_time)
    for model in prepared.models:
        prepared.retrain_plan(model, [this_node()])


def _check_in_process(space: SearchSpace, address: str | None) -> None:
    if address is not None:
        raise UsageError(
            f"--in-process runs without Ray, and --address names a cluster: {address}",
            remedy="Leave one of them out.",
        )
    if space.execution.replicas > 1:
        raise UsageError(
            f"execution.replicas is {space.execution.replicas}, and --in-process runs one trial at a time",
            remedy="Leave one of them out.",
        )
    if space.execution.trackers:
        raise UsageError(
            f"execution.trackers names {', '.join(space.execution.trackers)}, which Ray Tune would tell of trials, and "
            "--in-process runs without Ray",
            remedy="Leave one of them out.",
        )
    if space.search.scheduler != "none":
        raise UsageError(
            f"search.scheduler {space.search.scheduler!r} is one of Ray Tune's, and --in-process runs without Ray",
            remedy="Leave one of them out.",
        )


def _check_trackers(space: SearchSpace) -> None:
    from raysweep.sweep.trackers import check_trackers

    try:
        check_trackers(space.execution.trackers)
    except UsageError as error:
        raise space.placed(error, ("execution", "trackers")) from None


def checked_folder(space: SearchSpace, storage: str | Path | None = None) -> Path:
    """The folder of the sweep, once it is sure that it can be written. Makes nothing but mirrors of remote ones."""
    folder = new_sweep_folder(space.name, storage_folder(storage, space.execution.storage)).absolute()
    typed_path(folder, "storage")
    if (remote := remote_of(folder)) is not None:
        remote.now()
        bring_up_to_date(folder)
    if (reason := _not_writable(folder)) is not None:
        raise UsageError(
            f"storage {folder} cannot be written: {reason}",
            allowed="a folder that can be made and written",
            remedy="Choose another one with --storage or RAYSWEEP_STORAGE.",
        )
    _check_scratch(space)
    return folder


def _check_scratch(space: SearchSpace) -> None:
    """Raises UsageError where this machine could not write there."""
    if space.execution.scratch is None:
        return
    folder = typed_path(space.execution.scratch, "scratch").absolute()
    if (reason := _not_writable(folder)) is not None:
        error = UsageError(
            f"scratch {folder} cannot be written: {reason}",
            allowed="a folder on a disk that can be made and written, or null for the node's temporary one",
        )
        raise space.placed(error, ("execution", "scratch"))


def _not_writable(folder: Path) -> str | None:
    """Why it can be neither written nor made; None where it can."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"{existing} is {'read-only' if existing.is_dir() else 'no folder'}"


def device_here() -> str:
    return "cuda" if this_node().gpus else "cpu"


def _loaded(space: SearchSpace | str | Path, name: str | None) -> SearchSpace:
    if not isinstance(space, SearchSpace):
        space = SearchSpace.from_yaml(resolve_space(str(space)))
    return space.with_name(name) if name else space


def _launch_on_ray(
    prepare_for: Callable[[str], Launch],
    folder: Path,
    address: str | None,
    progress: Progress,
    fail_fast: bool,
    keeper: Keeper,
) -> None:
    """On a cluster that is joined the nodes decide on the device, so there it is joined before all can be checked."""
    with without_collecting():
        from raysweep.cluster.connect import connected, running_address

    joined = running_address(address)
    prepared = prepare_for(device_here())
    if joined is None:
        _check_fit(prepared)
    with _in_hand(folder) as held:
        prepared = _with_rows(prepared)
        if not _is_anything_left(prepared):
            _say_done(prepared, progress)
            return
        other = f"Joining the Ray cluster at {joined} (--address local starts one of your own)"
        progress.stage(other if joined else "Starting Ray on this machine")
        importing = importing_tune()
        with connected(joined) as cluster:
            device = "cuda" if any(node.gpus for node in cluster.nodes) else "cpu"
            if device != device_here():
                prepared = replace(prepared, models=prepare(prepared.space, device))
            _run(prepared, OnRay(cluster, importing), held, progress, fail_fast, keeper)


@contextmanager
def _in_hand(folder: Path) -> Iterator[Callable[[], None]]:
    """The sweep is this process's within the context, and can be asked to end. Yields what `launch_lock` does."""
    with there_for_now(folder), launch_lock(folder) as held, stoppable(folder):
        pull_in_hand(folder)
        yield held


def _run(
    prepared: Launch,
    runner: Runner,
    held: Callable[[], None],
    progress: Progress,
    fail_fast: bool,
    keeper: Keeper,
) -> None:
    if not _is_anything_left(prepared):
        _say_done(prepared, progress)
        return
    nodes, unmeasured = runner.nodes(), None
    plans = make_plans(prepared.models, prepared.space, nodes, runner.one_at_a_time)
    if prepared.tasks is not None:
        places(prepared.models, nodes)
    retrain_plans = [prepared.retrain_plan(model, nodes) for model in prepared.models]
    keeper.plan(prepared, plans, nodes)
    if len(nodes) > 1:
        refuse_unshared(prepared.folder, runner)
        if (reader := prepared.reader_of_weights(any(retrain_plans))) is not None:
            refuse_mirror_of_one_node(prepared.folder, reader)
    with pushing(prepared.folder, held) as check:
        remove_stale_temporaries(prepared.folder)
        _write_space(prepared)
        _tidy_artifacts(prepared)
        tracing = progress if isinstance(progress, Tracing) else None
        shown = runner.watched(progress, prepared)
        recording = recorded(prepared, runner, plans[0].all_shards, shown, check)
        with recording as recorder, runner.tracked(shown, prepared):
            for model, plan, retraining in zip(prepared.models, plans, retrain_plans, strict=True):
                run = ModelRun(
                    prepared, model, plan, retraining, runner, recorder, nodes, tracing, fail_fast, keeper
                )
                run.run()
                if fail_fast and run.has_failed:
                    break
            else:
                unmeasured = _measure_tasks(prepared, runner, recorder, plans[0])
                recorder.is_incomplete = unmeasured is not None
        prepared = replace(prepared, rows=trial_rows(prepared.folder))
        _remove_leftovers(prepared)
        _tidy_artifacts(prepared)  # of trials that were begun again and are not kept
        if tracing is not None:
            tracing.write(prepared.folder)
        keeper.write(prepared.folder)
    try:
        held()
        put_many_together(prepared.folder)
    except RaysweepError as error:  # the sweep is finished all the same
        log.warning("The files of finished trials stay apart: %s", first_line(error))
    if unmeasured is not None:
        raise unmeasured


def _is_anything_left(prepared: Launch) -> bool:
    return bool(prepared.to_run or task_jobs(prepared, kept_weights(prepared.folder)))


def _measure_tasks(
    prepared: Launch, runner: Runner, recorder: Recorder, plan: ShardPlan
) -> RaysweepError | None:
    """The devices are free by then: shards and retraining have ended. Returns why some could not be measured: all else
    of the sweep is finished, and is left as such."""
    if prepared.tasks is None:
        return None
    recorder.begin(plan)
    there = _with_rows(prepared)
    try:
        measure_tasks(there, kept_weights(prepared.folder), runner, runner.nodes(), recorder.progress.stage)
    except StorageError:
        raise
    except RaysweepError as error:
        return error
    if prepared.space.tasks_of_all:
        _let_go(there)
    return None


def _let_go(prepared: Launch) -> None:
    """Of the weights that have waited for tasks, removes those that are not to be kept. What is kept without that by
    `keep: none` was so by an earlier launch, and stays."""
    keep = prepared.space.execution.keep
    keeping = Keeping.of(keep, prepared.space.search)
    keeping.remove_superseded(prepared.folder, prepared.rows.keys(), waiting_too=True)
    for kept in kept_trials(prepared.folder):
        folder = artifact_folder(prepared.folder, kept.trial_id)
        if kept.waits and keep == NONE:
            remove_artifact(folder)
        elif kept.waits:
            replace(kept, waits=False).write(folder)


def _write_space(prepared: Launch) -> None:
    """As it was launched last: what an export computes again, it computes by this space."""
    file, text = prepared.folder / SPACE_FILE, prepared.space.resolved_yaml().encode()
    if not file.exists() or file.read_bytes() != text:
        write_atomically(file, text)


def _say_done(prepared: Launch, progress: Progress) -> None:
    if prepared.space.tasks_of_all:
        _let_go(prepared)  # what a launch that ended before it could do so has left
    _write_space(prepared)
    if lags(prepared.folder):
        push(prepared.folder)  # what the launch that ran them could not
    progress.begin(prepared.planned, prepared.finished, prepared.failed, None, prepared.others)
    progress.end()


def refuse_unshared(folder: Path, runner: Runner) -> None:
    """Raises UsageError where nodes would not find the units and weights that others have left in the storage."""
    if is_shared(folder) and (strangers := runner.strangers(folder)):
        raise UsageError(
            f"storage {folder.parent} is not the same folder on all nodes; {'; '.join(strangers)}",
            allowed="a folder that all nodes share under this path, or a URI such as s3://BUCKET/PREFIX",
            remedy="Mount one there, or name another by --storage; `raysweep doctor` tells more.",
        )


def refuse_mirror_of_one_node(folder: Path, reader: str = "retraining") -> None:
    """Raises UsageError where what reads weights, on several nodes, would look for them in mirrors that each has
    apart."""
    if not is_shared(folder):
        raise UsageError(
            f"{reader} on several nodes into {place_of(folder)}: weights and checkpoints lie in the mirror of the "
            "storage, and every node would have one of its own",
            remedy=f"Set {CACHE_VARIABLE} to a folder that all nodes share, use such a one as --storage, or run on one "
            "node.",
        )


def _tidy_artifacts(prepared: Launch) -> None:
    """Removes of the kept trials what was interrupted, and what better ones have replaced."""
    folder, finished = prepared.folder, prepared.finished_ids
    remove_unfinished(folder, finished)
    Keeping.of(prepared.held, prepared.space.search).remove_superseded(folder, finished)


def _remove_leftovers(prepared: Launch) -> None:
    """Units of trials that will not come again: that have their rows, or are no longer in the space."""
    waiting = [trial for trial in prepared.trials if not prepared.is_done(trial)]
    needed = {identity for trial in waiting for identity in trial.unfinished}
    place = prepared.folder / UNFINISHED
    for folder in place.glob("*"):
        if folder.name not in needed:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        place.rmdir()
