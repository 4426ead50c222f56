"""Commands on a cluster that this machine is no part of: they run there as jobs, and their words come back."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.cli.console import say
from raysweep.cli.ending import INTERRUPTED
from raysweep.cli.spaces import load_space
from raysweep.config.criterion import function_parts
from raysweep.config.space import SearchSpace
from raysweep.errors import UsageError

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
    sort: str | None = None,
) -> int:
    """Runs a command on the cluster's head, and returns its exit status."""
    if not is_elsewhere(address):
        raise UsageError(
            f"--address {address} is no dashboard's", allowed="http://HOST:PORT", where=f"raysweep {command}"
        )
    from raysweep.cluster.jobs import JobServer

    options = {"--storage": storage, "--sort": sort}
    line = ["raysweep", command, *filter(None, [name])]
    line += [word for option, value in options.items() if value for word in (option, value)]
    server = JobServer(address)
    return server.follow(server.submit([*line, *["--json"] * as_json]), _show)


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
    server = JobServer(address)
    command = ["raysweep", "launch", SPACE, *(flag for option, flag in FLAGS.items() if options[option])]
    storage = ["--storage", str(options["storage"])] if options["storage"] else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / SPACE).write_text(loaded.resolved_yaml(), encoding="utf-8")
        _add_modules(loaded, folder)
        job = server.submit([*command, *storage], folder)
    say(f"{loaded.name} runs on the cluster at {address} as {job}, with or without this process")
    try:
        return server.follow(job, _show)
    except KeyboardInterrupt:
        stop = f"raysweep stop {loaded.name} --address {address}"
        if not _shall_end():
            say(f"{loaded.name} goes on; `{stop}` ends it, `raysweep status --address {address}` shows it")
            return INTERRUPTED
        run_there(address, "stop", loaded.name, options["storage"])
        return INTERRUPTED


def _add_modules(space: SearchSpace, folder: Path) -> None:
    """Copies modules of `module:function` that lie in the current folder; others have to be installed there."""
    criteria = {planned.trial.criterion for planned in space.typical()}
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
