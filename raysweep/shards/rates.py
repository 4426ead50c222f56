"""How long a device takes for what shards do, as probes have found: kept in a file, so that each is asked once."""

# O outputs, I inputs of a linear

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raysweep.cluster.nodes import this_node
from raysweep.config.trial import Trial
from raysweep.errors import RaysweepError, first_line
from raysweep.fingerprint import fingerprint
from raysweep.model.checkpoint import ModelSource
from raysweep.model.shape import ModelShape
from raysweep.results.atomic import write_atomically
from raysweep.results.uris import cache_folder
from raysweep.shards.costs import ALONE, FORWARD, GRAM_ERRORS, IMPORT, LOSSES, STATISTICS
from raysweep.shards.device_name import device_name
from raysweep.shards.durations import Rates

CACHE_FILE = "probe.json"
VERSION = 2  # of what is measured: raised with every change of it
ALWAYS = (STATISTICS, FORWARD, ALONE, LOSSES, GRAM_ERRORS, IMPORT)  # are measured, whatever the trials
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probed:
    """What is asked about: a model's shape on a device.

    length: tokens of a sequence;  compiles: whether training is compiled
    together: how many shards share this machine's CPU, each with its threads
    """

    source: ModelSource
    shape: ModelShape
    dtype: str
    device: str
    threads: int
    length: int
    compiles: bool = False
    together: int = 1

    @property
    def index(self) -> int:
        """The block in the middle: the first ones of some models are unlike the others."""
        return len(self.shape.blocks) // 2

    @property
    def weights(self) -> int:
        """Of its linears, of those of experts the share that a token sees."""
        block = self.shape.blocks[self.index]
        return int(sum(o * i * block.share(name) for name, (o, i) in block.linears.items()))

    @property
    def key(self) -> str:
        """Equal for equal devices and shapes: two models of a shape share it, whatever their weights."""
        block = self.shape.blocks[self.index]
        where = device_name(self.device)
        asked = {
            "version": VERSION,
            "torch": version("torch"),
            "linears": sorted(block.linears.values()),
            "parameters": block.parameters,
            "vocabulary": [self.shape.vocabulary, self.shape.hidden],
            "length": self.length,
            "compiles": self.compiles,
            "together": self.together if self.device == "cpu" else 1,
        }
        return f"{where}, {self.threads} threads, {self.dtype}, {fingerprint(asked)[:8]}"


def probed_rates(
    probed: Probed, wanted: Mapping[str, Trial], again: bool = False, measures: bool = True
) -> Rates | None:
    """What the file knows, and measured now what it lacks; None where something cannot be measured.

    wanted: by rate, a trial that needs it, beside what all need
    again: measures all anew;  measures: else None where the file lacks something
    """
    if probed.device == "cuda" and not this_node().gpus:  # of the cluster, not of this machine
        return None
    names = {*wanted, *(f"open {rate}" for rate in wanted if rate.startswith("step")), *ALWAYS}
    kept = {} if again else _read().get(probed.key, {})
    known = {rate: seconds for rate, seconds in kept.items() if _is_time(seconds)}
    if names <= known.keys():
        return Rates(known, probed.weights)
    if not measures:
        return None
    missing = {rate: trial for rate, trial in wanted.items() if rate not in known}
    from raysweep.shards.probe import measure

    try:
        known |= measure(probed, missing)
    except (RaysweepError, RuntimeError, MemoryError, OSError) as error:
        log.warning("no times are known: the probe of this machine failed: %s", first_line(error))
        return None
    _write(probed.key, _read().get(probed.key, {}) | known)
    return Rates(known, probed.weights)


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def _file() -> Path:
    return cache_folder() / CACHE_FILE


def _read() -> dict[str, dict[str, Any]]:
    """What is in the file; nothing where it is damaged or cannot be read."""
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: rates for key, rates in content.items() if isinstance(rates, dict)}


def _write(key: str, rates: Mapping[str, float]) -> None:
    """Keeps them, where that is possible: a plan does not fail for it."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), json.dumps(_read() | {key: dict(rates)}, indent=1, sort_keys=True).encode())
    except (OSError, RaysweepError) as error:
        log.info("what the probe found is not kept: %s", first_line(error))
