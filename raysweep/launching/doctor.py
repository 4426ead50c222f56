"""Looks over what a sweep needs before it runs, here and on every node; says what is wrong and what mends it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.cluster.nodes import Node, this_node
from raysweep.config.space import SearchSpace
from raysweep.errors import RaysweepError, StorageError, UsageError, first_line
from raysweep.launching.examination import (
    PORTS,
    SHARED_MEMORY,
    TEMPORARY,
    clock,
    examine,
    marked,
    taken_ports,
)
from raysweep.launching.launch import checked_folder, refuse_mirror_of_one_node
from raysweep.launching.prepared import Launch
from raysweep.launching.runners import ANSWER_S
from raysweep.results.folders import there_for_now
from raysweep.results.uris import is_shared, mirrored_uri
from raysweep.shards.plan import ShardPlan, format_bytes, host_bytes
from raysweep.sweep.planning import make_plans
from raysweep.sweep.prepare import PreparedModel, prepare

CLOCKS_APART_S = 2.0  # by which locks in remote storages, and moments in rows, may be wrong
LEAST_ROOM = 1 << 30  # bytes that results, and what Ray leaves in /tmp, should find free; assumption
LEAST_SHARED = 512 << 20  # of shared memory, through which batches go from shard to shard; assumption
HERE = "this machine"


@dataclass(frozen=True)
class Finding:
    """One line of the report. about: this machine, or a node by name and address;  mend: what to do, of faults alone"""

    about: str
    check: str
    said: str
    mend: str | None = None

    @property
    def is_fault(self) -> bool:
        return self.mend is not None


def look_over(
    space: SearchSpace, storage: str | None, address: str | None, tell: Callable[[Finding], None]
) -> None:
    """Tells what is found about this machine, the cluster that a launch would join, and its nodes. Starts no cluster,
    and leaves nothing on storage."""
    _Doctor(space, storage, address, tell).look()


class _Doctor:
    def __init__(
        self, space: SearchSpace, storage: str | None, address: str | None, tell: Callable[[Finding], None]
    ) -> None:
        self.space, self.storage, self.address, self.tell = space, storage, address, tell

    def look(self) -> None:
        from raysweep.cluster.connect import LOCAL, TokenRefusedError, connected, running_address

        try:
            joined = running_address(self.address)
            if joined is None:
                self._fine(HERE, "cluster", "none is joined; a launch starts one of its own here")
                if self.address != LOCAL:
                    self._ports()
                self._machines([this_node()], on_cluster=False)
                return
            with connected(joined) as cluster:
                nodes = f"{len(cluster.nodes)} node{'s' * (len(cluster.nodes) != 1)} at {joined}"
                self._fine(HERE, "cluster", f"{nodes}, {cluster.dashboard or 'without dashboard'}")
                self._machines(cluster.nodes, on_cluster=True)
        except RaysweepError as error:
            self._error("token" if isinstance(error, TokenRefusedError) else "cluster", error)

    def _machines(self, nodes: Sequence[Node], on_cluster: bool) -> None:
        folder, models = self._folder(), self._models(nodes)
        launch = None if folder is None or models is None else Launch(self.space, folder, models, {})
        self._examine(folder, models or [], self._plans(launch, nodes), on_cluster)

    # What is seen from here

    def _folder(self) -> Path | None:
        try:
            return checked_folder(self.space, self.storage)
        except RaysweepError as error:
            self._error("storage", error)
            return None

    def _models(self, nodes: Sequence[Node]) -> list[PreparedModel] | None:
        """For the device that a launch on these nodes would take."""
        try:
            models = prepare(self.space, "cuda" if any(node.gpus for node in nodes) else "cpu")
        except RaysweepError as error:
            self._error("search space", error)
            return None
        self._fine(HERE, "search space", self.space.name)
        self._trackers()
        return models

    def _trackers(self) -> None:
        if self.space.execution.trackers:
            from raysweep.sweep.trackers import check_trackers

            try:
                check_trackers(self.space.execution.trackers)
                self._fine(HERE, "trackers", ", ".join(self.space.execution.trackers))
            except UsageError as error:
                self._error("trackers", error)

    def _plans(self, launch: Launch | None, nodes: Sequence[Node]) -> list[ShardPlan]:
        if launch is None:
            return []
        try:
            plans = make_plans(launch.models, self.space, nodes)
            retraining = [launch.retrain_plan(model, nodes) for model in launch.models]
            reader = launch.reader_of_weights(any(retraining)) if launch.to_run else None
            if reader is not None and len(nodes) > 1:
                refuse_mirror_of_one_node(launch.folder, reader)
        except RaysweepError as error:
            self._error("plan", error)
            return []
        for plan in plans:
            shards = f"{plan.all_shards} shard{'s' * (plan.all_shards != 1)} on {plan.device}"
            self._fine(HERE, "plan", f"{shards}, {format_bytes(host_bytes(plan))} of host memory in all")
        return plans

    def _ports(self) -> None:
        taken = taken_ports()
        if not taken:
            self._fine(HERE, "ports", f"{' and '.join(map(str, PORTS))} are free for the head of a cluster")
        for port in taken:
            option = "--port" if port == PORTS[0] else "--dashboard-port"
            self._fault(
                HERE,
                "ports",
                f"another program listens on {port}, where the head of a cluster would",
                f"End it, or give the head another one: {option} of `ray start --head`, in cluster.yaml.",
            )

    # What every node says

    def _examine(
        self,
        folder: Path | None,
        models: Sequence[PreparedModel],
        plans: Sequence[ShardPlan],
        on_cluster: bool,
    ) -> None:
        """Asks the nodes, or where there is no cluster this machine, and compares what they say with what is here."""
        sources = [model.source for model in models]
        asked = [(source.portable_path, source.revision, source.trust_remote_code) for source in sources]
        try:
            here, answers = self._heard(asked, folder, on_cluster)
        except StorageError as error:  # the rest can be told without it
            self._error("storage", error)
            folder = None
            here, answers = self._heard(asked, None, on_cluster)
        holders = [about for about, _, there in answers if there["gpus"] or not _on_gpus(plans)]
        for about, object_store, there in answers:
            self._versions(about, there["versions"], here["versions"])
            for source, model, own in zip(sources, there["models"], here["models"], strict=True):
                self._model(about, source.path, model, own)
            if folder is not None and there["storage"] is not None:
                self._storage(about, folder.parent, there["storage"])
            held = plans if about in holders else []
            self._room(about, "temporary files", TEMPORARY, there["temporary"]["free"])
            self._scratch(about, there["scratch"], held, len(holders))
            self._shared_memory(about, there["shared_memory"], object_store)
            self._memory(about, there["memory"], held, len(holders))
            self._fine(about, "devices", ", ".join(there["gpus"]) or "CPU only")
        if on_cluster:
            self._clocks()

    def _heard(
        self, asked: Sequence[Any], folder: Path | None, on_cluster: bool
    ) -> tuple[dict[str, Any], list[tuple[str, int, dict[str, Any]]]]:
        """What is here; and what is there, by what it is about and with the size of the object store."""
        scratch = self.space.execution.scratch
        if folder is None:
            here = examine(asked, None, "", scratch)
            return here, self._answers(asked, None, "") if on_cluster else [(HERE, 0, here)]
        storage = folder.parent
        with there_for_now(storage), marked(storage) as marker:
            here = examine(asked, str(storage), marker, scratch)
            if not on_cluster:
                return here, [(HERE, 0, here)]
            # of a mirror other nodes know nothing, unless it is one for all
            return here, self._answers(asked, str(storage) if is_shared(folder) else None, marker)

    def _answers(
        self, models: Sequence[Any], storage: str | None, marker: str
    ) -> list[tuple[str, int, dict[str, Any]]]:
        from raysweep.cluster.everywhere import ask_every_node

        heard = []
        for answer in ask_every_node(
            examine, models, storage, marker, self.space.execution.scratch, timeout_s=ANSWER_S
        ):
            if answer.silence is None:
                heard.append((answer.about, answer.object_store, answer.value))
            else:
                mend = (
                    "Look at the node with `ray status`; it needs the same Python and raysweep as the head."
                )
                self._fault(answer.about, "answer", answer.silence, mend)
        return heard

    def _clocks(self) -> None:
        """In a round of its own: what a node says must lie between the moments of question and answer."""
        from raysweep.cluster.everywhere import ask_every_node

        begin = time.time()
        answers = ask_every_node(clock, timeout_s=ANSWER_S)
        end = time.time()
        for answer in answers:
            if answer.silence is None:
                self._clock(answer.about, min(answer.value - begin, 0.0) + max(answer.value - end, 0.0))

    def _versions(self, about: str, there: Mapping[str, str | None], here: Mapping[str, str | None]) -> None:
        wrong = [name for name in here if there.get(name) != here[name]]
        if not wrong:
            known = ("Python", "raysweep", "torch", "transformers", "ray")
            self._fine(about, "versions", ", ".join(f"{name} {there[name]}" for name in known))
            return
        skew = ", ".join(f"{name} {there.get(name) or 'missing'}, here {here[name]}" for name in wrong)
        mend = (
            "Install the same there: `make` in the checkout takes all from constraints.txt; `ray up` does it."
        )
        self._fault(about, "versions", skew, mend)

    def _model(self, about: str, path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if there["problem"]:
            mend = "Put the model under this path on every node, or use a folder that all share."
            self._fault(about, "model", there["problem"], mend)
        elif there["content"] != here["content"]:
            mend = "Copy one of them over the other, or use a folder that all share."
            self._fault(about, "model", f"{path} is another one than on this machine", mend)
        else:
            self._fine(about, "model", f"{path} can be read")

    def _storage(self, about: str, place: Path, there: Mapping[str, Any]) -> None:
        if not there["seen"] and about != HERE:
            mend = f"Mount the same folder as {place} on every node, or name a shared one by --storage."
            self._fault(about, "storage", f"{place} is not the folder that it is on this machine", mend)
        elif there["problem"]:
            mend = f"Make {place} writable there, free some of it, or name another folder by --storage."
            self._fault(about, "storage", f"{place} cannot be written: {there['problem']}", mend)
        else:
            self._room(about, "storage", mirrored_uri(place) or str(place), there["free"])

    def _room(self, about: str, check: str, place: str, free: int) -> None:
        if free < LEAST_ROOM:
            mend = f"Free some of it; less than {format_bytes(LEAST_ROOM)} is soon full."
            self._fault(about, check, f"{format_bytes(free)} are free in {place}", mend)
        else:
            self._fine(about, check, f"{place}, {format_bytes(free)} free")

    def _scratch(self, about: str, there: Mapping[str, Any], plans: Sequence[ShardPlan], nodes: int) -> None:
        """Told where the sweep leaves something there, or says where it would."""
        needed = max((_disk_bytes_per_node(plan, nodes) for plan in plans), default=0)
        free, place = int(there["free"]), there["folder"]
        if needed > free:
            mend = "Free some of it, or name a folder on a larger disk by execution.scratch."
            said = f"{format_bytes(free)} are free in {place}, and the sweep needs {format_bytes(needed)}"
            self._fault(about, "scratch", said, mend)
        elif needed or self.space.execution.scratch is not None:
            self._fine(about, "scratch", f"{place}, {format_bytes(free)} free")

    def _shared_memory(self, about: str, there: Mapping[str, int], object_store: int) -> None:
        least = max(LEAST_SHARED, object_store)
        said = f"{SHARED_MEMORY} has {format_bytes(there['total'])}"
        if there["total"] < least:
            mend = (
                f"Make it {format_bytes(least)} or more (mount -o remount,size=..., docker run --shm-size=...), else "
                "Ray keeps in files what goes from shard to shard."
            )
            self._fault(about, "shared memory", said, mend)
        else:
            self._fine(about, "shared memory", said)

    def _memory(self, about: str, there: Mapping[str, int], plans: Sequence[ShardPlan], nodes: int) -> None:
        """Against an even share of the shards."""
        needed = max((_host_bytes_per_node(plan, nodes) for plan in plans), default=0)
        said = f"{format_bytes(there['free'])} of {format_bytes(there['total'])} are free"
        if there["free"] < needed:
            mend = (
                "End what else runs there, or lower execution.concurrent_trials or calibration.num_samples."
            )
            self._fault(about, "memory", f"{said}, and the sweep needs {format_bytes(needed)}", mend)
        else:
            self._fine(about, "memory", said)

    def _clock(self, about: str, ahead_s: float) -> None:
        if abs(ahead_s) > CLOCKS_APART_S:
            mend = "Switch time synchronisation on: timedatectl set-ntp true."
            self._fault(about, "clock", f"{abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}", mend)
        else:
            self._fine(about, "clock", "as on this machine")

    # The report

    def _fine(self, about: str, check: str, said: str) -> None:
        self.tell(Finding(about, check, said))

    def _fault(self, about: str, check: str, said: str, mend: str) -> None:
        self.tell(Finding(about, check, said, mend))

    def _error(self, check: str, error: RaysweepError) -> None:
        """What raised it says what to do as well."""
        if isinstance(error, UsageError):
            where = f"{error.where}: " if error.where else ""
            advice = [f"Allowed: {error.allowed}." if error.allowed else "", error.remedy or ""]
            mend = " ".join(filter(None, advice)) or "See docs/search-space.md."
            self._fault(HERE, check, where + error.what, mend)
        elif isinstance(error, StorageError):
            mend = "Make it writable, or name another folder by --storage or RAYSWEEP_STORAGE."
            self._fault(HERE, check, first_line(error), mend)
        else:
            self._fault(HERE, check, error.message, "See the log of Ray in /tmp/ray/session_latest/logs.")


def _on_gpus(plans: Sequence[ShardPlan]) -> bool:
    return any(plan.device == "cuda" for plan in plans)


def _host_bytes_per_node(plan: ShardPlan, nodes: int) -> int:
    largest = max(memory.host if plan.device == "cuda" else memory.total for memory in plan.memory)
    return largest * _shards_per_node(plan, nodes)


def _disk_bytes_per_node(plan: ShardPlan, nodes: int) -> int:
    return max(memory.disk for memory in plan.memory) * _shards_per_node(plan, nodes)


def _shards_per_node(plan: ShardPlan, nodes: int) -> int:
    """Of an even share."""
    return math.ceil(plan.all_shards / nodes)
