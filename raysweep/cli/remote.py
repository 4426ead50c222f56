"""Commands on a cluster that this machine is no part of: they run there as jobs, and their words come back."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.cli.console import say
from raysweep.cli.ending import INTERRUPTED
from raysweep.cli.results import CSV_BEGINS
from raysweep.cli.spaces import load_space
from raysweep.config.criterion import function_parts
from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError
from raysweep.results.folders import STORAGE_VARIABLE
from raysweep.results.uris import is_uri

DASHBOARDS = ("http://", "https://")
SPACE = "space.yaml"
FLAGS = {"trace": "--trace", "retry_failed": "--retry-failed", "fail_fast": "--fail-fast"}


def is_elsewhere(address: str | None) -> bool:
    """Whether an address is that of a dashboard, and not of a cluster to be joined."""
    return address is not None and address.startswith(DASHBOARDS)


def run_there(
    address: str,
    command: str,
    name: str | None,
    storage: str | None = None,
    as_json: bool = False,
    as_csv: bool = False,
    more: Sequence[str] = (),
) -> int:
    """Runs a command on the cluster's head, and returns its exit status. more: of its options, as they are written"""
    if not is_elsewhere(address):
        raise UsageError(
            f"--address {address} is no dashboard's", allowed="http://HOST:PORT", where=f"raysweep {command}"
        )
    from raysweep.cluster.jobs import JobServer

    _check_storage(storage)
    line = ["raysweep", command, *filter(None, [name]), *more]
    line += ["--storage", storage] if storage else []
    server = JobServer(address)
    if not (as_json or as_csv):
        return server.follow(server.submit(line), _show)
    said: list[str] = []
    status = server.follow(server.submit([*line, "--json" if as_json else "--csv"]), said.append)
    lines = "".join(said).splitlines(keepends=True)
    begins = ("{", "[") if as_json else (CSV_BEGINS,)
    begin = next((place for place, text in enumerate(lines) if text.startswith(begins)), len(lines))
    sys.stderr.write("".join(lines[:begin]))  # a job's two streams come as one
    _show("".join(lines[begin:]))
    return status


def launch_there(
    address: str,
    space: str,
    settings: Sequence[str],
    name: str | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> int:
    """Submits a launch, with its search space and the modules of its own criteria, and follows it. It goes on without
    this process; Ctrl-C asks whether it shall."""
    from raysweep.cluster.jobs import JobServer

    loaded = load_space(space, settings, name)
    if options["in_process"]:
        raise UsageError(
            "--in-process runs on this machine, and --address names another", remedy="Leave one out."
        )
    if as_json:
        raise UsageError(
            "a job says more than one JSON document",
            remedy=f"Ask for it afterwards: raysweep results {loaded.name} --json --address {address}",
        )
    storage = options["storage"] or loaded.execution.storage
    _check_storage(storage)
    server = JobServer(address)
    command = ["raysweep", "launch", SPACE, *(flag for option, flag in FLAGS.items() if options[option])]
    more = ["--storage", str(storage)] if storage else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / SPACE).write_text(loaded.resolved_yaml(), encoding="utf-8")
        _add_modules(loaded, folder)
        job = server.submit([*command, *more], folder, needs=None if storage else STORAGE_VARIABLE)
    say(f"{loaded.name} runs on the cluster at {address} as {job}, with or without this process")
    try:
        return server.follow(job, _show)
    except KeyboardInterrupt:
        there = shlex.join(["--address", address, *more])
        if not _shall_end():
            stop = f"raysweep stop {loaded.name} {there}"
            say(f"{loaded.name} goes on; `{stop}` ends it, `raysweep status {there}` shows it")
        elif run_there(address, "stop", loaded.name, storage) != 0:
            server.end(job)  # which has not yet taken the sweep in hand
        return INTERRUPTED


def _check_storage(storage: str | None) -> None:
    """Raises UsageError for one that every job would look for in a folder of its own."""
    if storage and not is_uri(storage) and not storage.startswith(("/", "~")):
        raise UsageError(
            f"storage {storage!r} depends on where a job runs",
            allowed="the full path of a folder that the cluster's nodes see, or a URI",
        )


def _add_modules(space: SearchSpace, folder: Path) -> None:
    """Copies modules of `module:function` that lie in the current folder; others have to be installed there."""
    corners = (corner for study in space.studies() for corner in study.corners())
    criteria = {planned.trial.criterion for planned in (*space.expand(), *corners)}
    for module, _ in filter(None, map(function_parts, filter(None, criteria))):
        top = module.partition(".")[0]
        if (file := Path(f"{top}.py")).is_file():
            shutil.copy(file, folder)
        elif (package := Path(top)).is_dir():
            shutil.copytree(package, folder / top, dirs_exist_ok=True)


def _shall_end() -> bool:
    """Asks on terminals; elsewhere nobody is there to answer, and it goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    import typer

    return not typer.confirm("Leave it running?", default=True, err=True)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
