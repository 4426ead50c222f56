"""The commands of raysweep. Each imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from raysweep import __version__
from raysweep.cli.ending import DEBUG_VARIABLE, guarded
from raysweep.cli.options import SPACE_HELP, Json, Name, Settings, Space, Storage

app = typer.Typer(
    name="raysweep",
    help="Sweeps of pruning and recovery for language models, on Ray.",
    epilog="`raysweep launch` alone runs the quickstart: a small model and its text, in minutes, without downloads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the `raysweep` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raysweep {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show tracebacks of errors, as {DEBUG_VARIABLE}=1 does.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


@app.command()
@guarded
def launch(
    space: Annotated[
        str, typer.Argument(metavar="[SPACE]", help=SPACE_HELP, show_default=True)
    ] = "quickstart",
    settings: Settings = None,
    name: Name = None,
    storage: Storage = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Ray cluster: HOST:PORT, auto, or local for a new one. Default: the one that this machine is on "
            "(RAY_ADDRESS, or a running one), else a new one.",
        ),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", help="Without Ray: one trial after another in this process. Equal numbers."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Run a sweep, or continue the sweep of that name: finished trials are kept, new ones are added.

    Exit status: 0 all trials finished, 1 some failed, 2 wrong usage or file, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from raysweep.cli.launch import run_launch

    return run_launch(space, settings or [], name, storage, address, in_process, as_json)


@app.command()
@guarded
def plan(
    space: Space,
    settings: Settings = None,
    name: Name = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show what would run on this machine, without running it: trials, shards, memory. Refuses what cannot fit."""
    from raysweep.cli.plan import run_plan

    run_plan(space, settings or [], name, storage, as_json)


@app.command()
@guarded
def status(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A sweep: its name in the storage, or its folder. Default: all."
        ),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show running and finished sweeps: state, trials, time left."""
    from raysweep.cli.status import run_status

    run_status(name, storage, as_json)


@app.command()
@guarded
def results(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A sweep: its name in the storage, or its folder. May be left out when the storage has one sweep.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="COLUMN",
            help="Order by a column of the results, lowest first; highest first with -COLUMN. "
            "Default: mask by mask.",
        ),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print the table of a sweep's trials."""
    from raysweep.cli.results import run_results

    run_results(name, sort, storage, as_json)
