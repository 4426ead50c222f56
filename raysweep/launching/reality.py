"""What a launch took, beside what was planned: `plan.json` in the sweep's folder, and a line at the end of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raysweep.cluster.nodes import Node
from raysweep.errors import RaysweepError, first_line
from raysweep.launching.outlook import look_ahead, total_seconds
from raysweep.launching.prepared import Launch
from raysweep.results.atomic import write_atomically
from raysweep.results.folders import PLAN_FILE
from raysweep.shards.peaks import Peaks
from raysweep.shards.plan import ShardPlan, host_bytes_in_one_process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peak:
    """Bytes at their highest, and as planned, of the shard that held most."""

    measured: int
    planned: int

    @classmethod
    def higher(cls, one: Peak | None, other: Peak | None) -> Peak | None:
        return max(filter(None, (one, other)), key=lambda peak: peak.measured, default=None)


@dataclass(frozen=True)
class Reality:
    """Of one launch, until its shards have ended.

    seconds, planned_seconds: on the clock; the latter None where no earlier probe knows this machine
    host, device: of a shard's process (in process: of all of them together) and on its GPU; None where not known
    """

    seconds: float = 0.0
    planned_seconds: float | None = None
    host: Peak | None = None
    device: Peak | None = None
    in_process: bool = False

    def write(self, folder: Path) -> None:
        """Leaves it in the sweep's folder: the sweep is finished even where that fails."""
        try:
            write_atomically(folder / PLAN_FILE, json.dumps(asdict(self), indent=1).encode())
        except (OSError, RaysweepError) as error:
            log.warning("%s cannot be written: %s", PLAN_FILE, first_line(error))

    @classmethod
    def read(cls, folder: Path) -> Reality | None:
        """None where there is none, or a damaged one."""
        try:
            stored = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
            host, device = (Peak(**stored[name]) if stored[name] else None for name in ("host", "device"))
            planned = None if stored["planned_seconds"] is None else float(stored["planned_seconds"])
            return cls(float(stored["seconds"]), planned, host, device, bool(stored["in_process"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


class Keeper:
    """Notes what a launch takes from its beginning on."""

    def __init__(self, in_process: bool) -> None:
        self._begun, self._in_process = time.monotonic(), in_process
        self._reality = Reality(in_process=in_process)

    def plan(self, prepared: Launch, plans: Sequence[ShardPlan], nodes: Sequence[Node]) -> None:
        """What the launch should take, as far as that is known without measuring anything."""
        try:
            outlooks = [
                look_ahead(prepared, model, plan, nodes, "cached")
                for model, plan in zip(prepared.models, plans, strict=True)
            ]
            seconds = total_seconds(outlooks, self._in_process)
        except Exception as error:  # whatever it is, a sweep does not fail for it
            log.info("no time is planned: %s", first_line(error))
            return
        self._reality = replace(self._reality, planned_seconds=seconds)

    def note(self, plan: ShardPlan, peaks: Sequence[Peaks]) -> None:
        """What the shards of a group have held, before it ends."""
        memories = [memory for _ in range(plan.replicas) for memory in plan.memory]
        planned = [memory.host if plan.device == "cuda" else memory.total for memory in memories]
        hosts = [Peak(peak.host, bytes_) for peak, bytes_ in zip(peaks, planned, strict=True) if peak.host]
        if self._in_process and hosts:
            hosts = [Peak(hosts[0].measured, host_bytes_in_one_process(plan))]
        devices = [
            Peak(peak.device, memory.device)
            for peak, memory in zip(peaks, memories, strict=True)
            if peak.device is not None
        ]
        most = max(hosts, key=lambda peak: peak.measured, default=None)
        on_device = max(devices, key=lambda peak: peak.measured, default=None)
        self._reality = replace(
            self._reality,
            host=Peak.higher(self._reality.host, most),
            device=Peak.higher(self._reality.device, on_device),
        )

    def write(self, folder: Path) -> None:
        replace(self._reality, seconds=time.monotonic() - self._begun).write(folder)
