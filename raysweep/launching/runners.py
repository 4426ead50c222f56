"""The two ways to run a sweep's trials: over Ray and Ray Tune, or one after another in this process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raysweep.baseline.job import RetrainJob
from raysweep.baseline.plan import RetrainPlan
from raysweep.cluster.nodes import Node, this_node
from raysweep.config.sections import SearchConfig
from raysweep.importing import without_collecting
from raysweep.launching.examination import marked, see_storage
from raysweep.launching.metering import Metered
from raysweep.launching.prepared import Launch
from raysweep.launching.progress import Progress
from raysweep.launching.task_job import Places, Scores, TaskJob, run_here, run_job
from raysweep.results.folders import TUNE
from raysweep.shards.group_info import ShardSpec
from raysweep.shards.plan import ShardPlan
from raysweep.shards.setup import OwnedGroup
from raysweep.sweep.identified import SweepTrial
from raysweep.sweep.proposals import Proposals
from raysweep.sweep.rows import RowContext, run_and_write

if TYPE_CHECKING:
    from raysweep.cluster.connect import Cluster

ANSWER_S = 120.0  # that a node has to say what it is: Python may come over a network file system
START_TIMEOUT_S = (
    900.0  # for all shards to read their blocks; assumption: a 70B model over a network file system
)

OnRow = Callable[[dict[str, Any]], None]


class Runner(Protocol):
    """Starts shard groups and runs trials through them.

    one_at_a_time: whether trials run one after another
    """

    one_at_a_time: bool
    ray_version: str | None
    dashboard: str | None

    def nodes(self) -> Sequence[Node]:
        """Those that there are now."""
        ...

    def watched(self, progress: Progress, prepared: Launch) -> Progress:
        """The display, with what it hears told to whatever watches the runner."""
        ...

    def tracked(self, progress: Progress, prepared: Launch) -> AbstractContextManager[None]:
        """A context within which the sweep's experiment trackers are told of its trials."""
        ...

    def strangers(self, folder: Path) -> list[str]:
        """Nodes on which the folder is not the one that it is here, or cannot be written, and why."""
        ...

    def group(self, name: str, specs: Sequence[ShardSpec], plan: ShardPlan) -> Any:
        """A context in which a group is up; its shards end with it."""
        ...

    def run(
        self,
        group: OwnedGroup,
        proposals: Proposals,
        rows: RowContext,
        plan: ShardPlan,
        search: SearchConfig,
        on_row: OnRow,
    ) -> Sequence[SweepTrial]:
        """Runs what is proposed to the end, the first ones first; returns the trials that lost their processes, or
        shards. After one has, nothing new begins."""
        ...

    def retrain(self, jobs: Sequence[RetrainJob], plan: RetrainPlan, folder: Path) -> None:
        """Runs retrainings to their ends. folder: where Ray Train may keep a state of its own"""
        ...

    def measure(
        self, jobs: Sequence[TaskJob], places: Places
    ) -> Iterator[tuple[TaskJob, Scores | Exception]]:
        """Measures models on tasks; what comes of each, or the error that it ended in, as they are done."""
        ...


class InProcess:
    """Without Ray: the twin of the shard group, one trial at a time. The numbers are those of the Ray one."""

    one_at_a_time = True
    ray_version: str | None = None
    dashboard: str | None = None

    def nodes(self) -> Sequence[Node]:
        return (this_node(),)

    def watched(self, progress: Progress, prepared: Launch) -> Progress:
        return progress

    def tracked(self, progress: Progress, prepared: Launch) -> AbstractContextManager[None]:
        return nullcontext()

    def strangers(self, folder: Path) -> list[str]:
        return []

    @contextmanager
    def group(self, name: str, specs: Sequence[ShardSpec], plan: ShardPlan) -> Iterator[OwnedGroup]:
        from raysweep.reconstruction.heap import give_back
        from raysweep.shards.local import LocalGroup

        give_back()  # what models and data were looked at with: shards are in this process
        with LocalGroup(specs) as group:
            yield group

    def run(
        self,
        group: OwnedGroup,
        proposals: Proposals,
        rows: RowContext,
        plan: ShardPlan,
        search: SearchConfig,
        on_row: OnRow,
    ) -> Sequence[SweepTrial]:
        while (trial := proposals.next()) is not None:
            row = run_and_write(group, trial, rows)
            proposals.done(trial, row)
            on_row(row)
        return ()

    def retrain(self, jobs: Sequence[RetrainJob], plan: RetrainPlan, folder: Path) -> None:
        from raysweep.baseline.workers import retrain_here

        retrain_here(jobs, plan.threads)

    def measure(
        self, jobs: Sequence[TaskJob], places: Places
    ) -> Iterator[tuple[TaskJob, Scores | Exception]]:
        yield from run_here(jobs)


class OnRay:
    """Over the Ray cluster that this process is connected to."""

    one_at_a_time = False

    def __init__(self, cluster: Cluster, importing: threading.Thread) -> None:
        """importing: what `importing_tune` gave"""
        self.ray_version: str | None = cluster.ray_version
        self.dashboard = cluster.dashboard
        self._here = cluster.here
        self._phases, self._importing = 0, importing
        self._trackers: Sequence[Any] = ()

    def nodes(self) -> Sequence[Node]:
        from raysweep.cluster.connect import nodes

        return nodes()

    def watched(self, progress: Progress, prepared: Launch) -> Progress:
        from raysweep.cluster.meter import SweepMeter

        search = prepared.space.search
        return Metered(progress, SweepMeter(prepared.tag, search.metric), search, prepared.done_rows.values())

    @contextmanager
    def tracked(self, progress: Progress, prepared: Launch) -> Iterator[None]:
        names = prepared.space.execution.trackers
        if not names:
            yield
            return
        self._importing.join()
        from raysweep.sweep.trackers import tracking

        with tracking(names, prepared.folder, prepared.space.name, progress.stage) as self._trackers:
            yield

    def strangers(self, folder: Path) -> list[str]:
        from raysweep.cluster.everywhere import ask_every_node

        with marked(folder) as marker:
            answers = ask_every_node(see_storage, str(folder), marker, timeout_s=ANSWER_S)
        wrong = {}
        for answer in answers:
            if answer.silence is not None:  # whoever hangs there would hang in the sweep as well
                wrong[answer.about] = answer.silence
            elif not answer.value["seen"]:
                wrong[answer.about] = "another folder than here, or none"
            elif answer.value["problem"]:
                wrong[answer.about] = answer.value["problem"]
        return [f"{about}: {why}" for about, why in wrong.items()]

    @contextmanager
    def group(self, name: str, specs: Sequence[ShardSpec], plan: ShardPlan) -> Iterator[OwnedGroup]:
        from raysweep.shards.group import RayGroup, Resources

        resources = Resources(plan.cpus, plan.gpus)
        with RayGroup.start(name, specs, resources, START_TIMEOUT_S, plan.replicas) as group:
            yield group

    def run(
        self,
        group: OwnedGroup,
        proposals: Proposals,
        rows: RowContext,
        plan: ShardPlan,
        search: SearchConfig,
        on_row: OnRow,
    ) -> Sequence[SweepTrial]:
        from raysweep.sweep.tuning import PhaseContext, run_phase

        self._phases += 1
        processes = min(plan.all_concurrent_trials, proposals.total)
        context = PhaseContext(group.name, self._here, group.info, rows, search, processes, plan.replicas)
        folder, name, at_once = rows.folder / TUNE, f"phase-{self._phases}", plan.all_concurrent_trials
        return run_phase(
            context, proposals, at_once, folder, name, on_row, group.forget_trial, self._trackers
        )

    def retrain(self, jobs: Sequence[RetrainJob], plan: RetrainPlan, folder: Path) -> None:
        from raysweep.baseline.workers import retrain_on_ray

        self._importing.join()  # Tune and Train cannot be imported side by side
        name = f"retraining-{secrets.token_hex(4)}"  # Train would go on with an old one
        retrain_on_ray(jobs, plan, folder, name)

    def measure(
        self, jobs: Sequence[TaskJob], places: Places
    ) -> Iterator[tuple[TaskJob, Scores | Exception]]:
        from raysweep.cluster.connect import reservable_share
        from raysweep.cluster.farm import Reserved, run_each

        fewest = min(node.cpus for node in self.nodes())
        cpus = 1.0 if places.gpus else float(jobs[0].threads)
        memory = 0 if places.gpus else int(places.memory * reservable_share())
        needs = Reserved(min(cpus, fewest), places.gpus, memory)
        yield from run_each(run_job, jobs, needs, places.at_once, "tasks")


def importing_tune() -> threading.Thread:
    """Imports Ray Tune in a thread, which takes one to two seconds: while Ray starts, which is mostly waiting."""
    thread = threading.Thread(target=_import_tune, daemon=True)
    thread.start()
    return thread


def _import_tune() -> None:
    with without_collecting():
        import raysweep.sweep.tuning  # noqa: F401
