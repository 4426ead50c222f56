"""The commands of raysweep. Each imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import gc
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raysweep import __version__
from raysweep.cli.console import forget_odd_sizes
from raysweep.cli.ending import DEBUG_VARIABLE, guarded
from raysweep.cli.evaluate_options import (
    BatchSize,
    BosEachWindow,
    DataFiles,
    Dataset,
    DatasetConfig,
    Device,
    EvaluationSpace,
    Include,
    Kernels,
    MaxWindows,
    ModelDtype,
    ModelPath,
    Revision,
    SequenceLength,
    Split,
    Tasks,
    Threads,
    TrustRemoteCode,
)
from raysweep.cli.options import (
    DEFAULT_SPACE,
    Address,
    Artifacts,
    Cluster,
    Csv,
    Dashboard,
    Dtype,
    FailFast,
    InProcess,
    Json,
    Margin,
    MarginPercent,
    MaybeSweep,
    ModelFolder,
    Name,
    NoProbe,
    OnlySweep,
    Output,
    ParetoFront,
    ProbeAgain,
    RetryFailed,
    Settings,
    Sort,
    Space,
    Storage,
    Sweep,
    Trace,
    Trial,
    Where,
)
from raysweep.errors import UsageError
from raysweep.importing import without_collecting


class _Commands(TyperGroup):
    """All commands, and what comes before any of them, the refusal of an unknown one too."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        forget_odd_sizes()
        return super().main(*arguments, **options)


app = typer.Typer(
    name="raysweep",
    cls=_Commands,
    help="Sweeps of pruning and recovery for language models, on Ray.",
    epilog="`raysweep launch` alone runs the quickstart: a small model that ships with it, in minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help and usage errors in half the time
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """The entry point of the `raysweep` command."""
    try:
        app()
    finally:
        gc.freeze()  # what is there goes with the process; Python would first look for garbage in it, for 0.1 s


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raysweep {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Show the version.", callback=_show_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", metavar="", help=f"Show tracebacks of errors, as {DEBUG_VARIABLE}=1 does."),
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


@app.command()
@guarded
def launch(
    space: Space = DEFAULT_SPACE,
    settings: Settings = None,
    name: Name = None,
    storage: Storage = None,
    address: Address = None,
    in_process: InProcess = False,
    trace: Trace = False,
    retry_failed: RetryFailed = False,
    fail_fast: FailFast = False,
    as_json: Json = False,
) -> int:
    """Run a sweep, or continue the one of that name.

    Finished trials are kept, new ones are added. Ctrl-C finishes the units in hand, so that the same command goes on
    behind them; a second one does not wait.

    Exit status: 0 all finished, 1 some failed, 2 wrong usage or file, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from raysweep.cli.launch import run_launch
    from raysweep.cli.remote import is_elsewhere, launch_there

    options = {
        "storage": storage,
        "address": address,
        "in_process": in_process,
        "trace": trace,
        "retry_failed": retry_failed,
        "fail_fast": fail_fast,
    }
    if is_elsewhere(address):
        return launch_there(str(address), space, settings or [], name, as_json, options)
    return run_launch(space, settings or [], name, as_json, options)


@app.command()
@guarded
def plan(
    space: Space = DEFAULT_SPACE,
    settings: Settings = None,
    name: Name = None,
    storage: Storage = None,
    no_probe: NoProbe = False,
    probe_again: ProbeAgain = False,
    as_json: Json = False,
) -> None:
    """Show what would run here: trials, shards, memory, work, time.

    Says also what retraining would need instead. Runs no trial; refuses what cannot fit. A device that no plan of such
    a shape has seen is measured for seconds.
    """
    from raysweep.cli.plan import run_plan

    if no_probe and probe_again:
        raise UsageError("--no-probe and --probe-again exclude each other", remedy="Leave one of them out.")
    run_plan(space, settings or [], name, storage, as_json, no_probe, probe_again)


@app.command()
@guarded
def doctor(
    space: Space = DEFAULT_SPACE,
    settings: Settings = None,
    storage: Storage = None,
    address: Cluster = None,
    as_json: Json = False,
) -> int:
    """Check what a sweep needs, here and on every node.

    Versions, model, storage, memory, ports, clocks. Starts nothing and leaves nothing. Exit status: 0 nothing is
    wrong, 1 something is, with what mends it, 2 a search space that cannot be read.
    """
    from raysweep.cli.doctor import run_doctor

    return run_doctor(space, settings or [], storage, address, as_json)


@app.command()
@guarded
def status(
    name: MaybeSweep = None, storage: Storage = None, address: Dashboard = None, as_json: Json = False
) -> int:
    """Show running and finished sweeps: state, trials, time left."""
    if address is not None:
        from raysweep.cli.remote import run_there

        return run_there(address, "status", name, storage=storage, as_json=as_json)
    from raysweep.cli.status import run_status

    run_status(name, storage, as_json)
    return 0


@app.command()
@guarded
def stop(name: Sweep, storage: Storage = None, address: Dashboard = None) -> int:
    """End a running sweep as Ctrl-C would; its rows are kept.

    From another shell, or from another host that sees the storage.
    """
    if address is not None:
        from raysweep.cli.remote import run_there

        return run_there(address, "stop", name, storage=storage)
    from raysweep.cli.stop import run_stop

    run_stop(name, storage)
    return 0


@app.command()
@guarded
def clean(name: Sweep, storage: Storage = None, artifacts: Artifacts = False) -> None:
    """Remove what a sweep keeps beside its rows.

    Recovered units, checkpoints of retraining, state of Ray Tune. Kept trials stay. Rows of finished trials go from
    thousands of small files into two, which are read faster.
    """
    from raysweep.cli.clean import run_clean

    run_clean(name, storage, artifacts)


@app.command()
@guarded
def results(
    name: OnlySweep = None,
    sort: Sort = None,
    where: Where = None,
    pareto: ParetoFront = False,
    storage: Storage = None,
    address: Dashboard = None,
    as_json: Json = False,
    as_csv: Csv = False,
) -> int:
    """Print the table of a sweep's trials, all of them or a choice."""
    with without_collecting():
        from raysweep.cli.results import Choice, run_results

    choice = Choice(sort, where, pareto, as_json, as_csv)
    if address is not None:
        from raysweep.cli.remote import run_there

        choice.check()
        return run_there(
            address, "results", name, storage=storage, as_json=as_json, as_csv=as_csv, more=choice.words()
        )
    run_results(name, choice, storage)
    return 0


@app.command()
@guarded
def evaluate(
    path: ModelPath,
    dataset: Dataset = None,
    config: DatasetConfig = None,
    data_files: DataFiles = None,
    split: Split = None,
    sequence_length: SequenceLength = None,
    max_windows: MaxWindows = None,
    bos_each_window: BosEachWindow = False,
    space: EvaluationSpace = None,
    settings: Settings = None,
    tasks: Tasks = None,
    include: Include = None,
    batch_size: BatchSize = 8,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    kernels: Kernels = "dense",
    as_json: Json = False,
) -> None:
    """Measure any model: perplexity, lm-eval tasks, sparse kernels.

    Perplexity is measured as sweeps measure it. A builtin model is measured on its own test text; of others --dataset,
    --space or --tasks says on what.
    """
    from raysweep.cli.evaluate import Options, run_evaluate

    text = {
        "dataset": dataset,
        "config": config,
        "data_files": data_files,
        "split": split,
        "sequence_length": sequence_length,
        "max_windows": max_windows,
        "bos_each_window": bos_each_window,
    }
    options = Options(
        text=text,
        space=space,
        settings=settings or (),
        tasks=tasks or (),
        include=include,
        batch_size=batch_size,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device=device,
        threads=threads,
        kernels=kernels,
        as_json=as_json,
    )
    run_evaluate(path, options)


@app.command()
@guarded
def report(
    name: OnlySweep = None,
    output: Output = None,
    margin: Margin = 0.1,
    margin_percent: MarginPercent = 1.0,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write what a sweep found as a page, also while it runs.

    Verdicts, a recipe, figures, tables.
    """
    from raysweep.cli.report import run_report

    run_report(name, output, margin, margin_percent, storage, as_json)


@app.command()
@guarded
def export(
    trial: Trial,
    output: ModelFolder,
    dtype: Dtype = "checkpoint",
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write the model of a trial as a Hugging Face folder.

    Weights with exact zeros, masks, tokenizer, model card. A trial that was not kept is computed again, and its
    perplexity compared with its row.

    Exit status: 0 written, 1 what was computed again is not what the row says, or failed, 2 wrong usage or file.
    """
    from raysweep.cli.export import run_export

    run_export(trial, output, dtype, storage, as_json)
