"""Arguments and options of the commands, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

from raysweep.config.spaces import DEFAULT_SPACE

__all__ = [
    "DEFAULT_SPACE",
    "Address",
    "Artifacts",
    "Cluster",
    "Csv",
    "Dashboard",
    "Dtype",
    "FailFast",
    "InProcess",
    "Json",
    "Margin",
    "MarginPercent",
    "MaybeSweep",
    "ModelFolder",
    "Name",
    "OnlySweep",
    "Output",
    "ParetoFront",
    "RetryFailed",
    "Settings",
    "Sort",
    "Space",
    "Storage",
    "Sweep",
    "Trace",
    "Trial",
    "Where",
]

Space = Annotated[
    str,
    typer.Argument(
        metavar="SPACE",
        help="A search space: the path of a YAML file, or the name of one that ships with raysweep.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the search space; may be repeated. Keys are dotted: calibration.seed=1, "
        "'sweep.1.learning_rate=[1e-3, 1e-2]'.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="Name of the sweep and of its folder, instead of the space's own."
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="DIR|URI",
        help="Folder of all results, or a URI such as s3://BUCKET/PREFIX. Default: RAYSWEEP_STORAGE, "
        "else execution.storage, else ./raysweep-results.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster: HOST:PORT, auto, or local for a new one; or the address of its dashboard, http://HOST:PORT, "
        "from outside of it. Default: the one that this machine is on (RAY_ADDRESS, or a running one), else a "
        "new one.",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster: HOST:PORT, auto, or local for this machine alone. Default: the one that this machine is on "
        "(RAY_ADDRESS, or a running one), else this machine as the head of one.",
    ),
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HOST:PORT",
        help="The dashboard of a cluster that this machine is no part of: the command runs there.",
    ),
]
InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process",
        metavar="",
        help="Without Ray: one trial after another in this process. The numbers are the same.",
    ),
]
Trace = Annotated[
    bool,
    typer.Option(
        "--trace",
        metavar="",
        help="Leave trace.json in the sweep's folder: what launch and shards did when, for ui.perfetto.dev or "
        "chrome://tracing.",
    ),
]
NoProbe = Annotated[
    bool,
    typer.Option(
        "--no-probe",
        metavar="",
        help="Do not measure this machine's device, which takes seconds once for a shape: no times are shown.",
    ),
]
ProbeAgain = Annotated[
    bool,
    typer.Option(
        "--probe-again", metavar="", help="Measure the device anew, whatever earlier plans have kept."
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        metavar="",
        help="Run trials again that failed numerically. Others that failed run again in any case.",
    ),
]
FailFast = Annotated[
    bool,
    typer.Option(
        "--fail-fast",
        metavar="",
        help="Begin nothing new once a trial has failed. Without it the sweep goes on with the others.",
    ),
]
Artifacts = Annotated[
    bool,
    typer.Option(
        "--artifacts",
        metavar="",
        help="Remove the weights of kept trials as well; `raysweep export` then computes them again.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON document on stdout instead of tables.")
]
MaybeSweep = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="A sweep: its name in the storage, or its folder. Left out, all are shown."
    ),
]
Sweep = Annotated[
    str, typer.Argument(metavar="NAME", help="A sweep: its name in the storage, or its folder.")
]
OnlySweep = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="A sweep: its name in the storage, or its folder. May be left out when there is only one.",
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="COLUMN",
        help="Order by a column of the results, lowest first; with -COLUMN highest first. "
        "Default: mask by mask.",
    ),
]
ParetoFront = Annotated[
    bool,
    typer.Option(
        "--pareto",
        metavar="",
        help="Only trials of settings on the Pareto front: at each model and sparsity no other one has less perplexity "
        "and takes no more standalone seconds. Each at its best learning rate; with --where, of what that "
        "leaves.",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="EXPR",
        help="Only trials for which this is true: columns, numbers and 'texts' with == != < <= > >= in, and or not, "
        "+ - * /. \"sparsity == 0.6 and criterion == 'wanda'\"; null is what does not apply.",
    ),
]
Csv = Annotated[bool, typer.Option("--csv", metavar="", help="Print all columns as CSV on stdout.")]
Output = Annotated[
    str | None,
    typer.Option("--output", metavar="DIR", help="Folder of the report. Default: ./NAME-report."),
]
Margin = Annotated[
    float,
    typer.Option("--margin", metavar="NUMBER", help="Differences in perplexity up to this count as nothing."),
]
MarginPercent = Annotated[
    float,
    typer.Option(
        "--margin-percent",
        metavar="NUMBER",
        help="The same in percent of the perplexity that is compared with; the larger of both counts.",
    ),
]
Trial = Annotated[
    str,
    typer.Argument(
        metavar="TRIAL",
        help="A trial: its trial_id or the first digits of it, as `raysweep results --json` and reports show it; or "
        "SWEEP:TRIAL.",
    ),
]
ModelFolder = Annotated[
    str,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Folder of the model: a new one, or an earlier export of the same trial.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Number format of the weights: checkpoint (as in the dense model; default), float32, bfloat16, float16.",
    ),
]
