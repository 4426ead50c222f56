"""Arguments and options that several commands have, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

SPACE_HELP = "A search space: the path of a YAML file, or the name of one that ships with raysweep."

Space = Annotated[str, typer.Argument(metavar="SPACE", help=SPACE_HELP)]
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
        metavar="DIR",
        help="Folder of all results. Default: RAYSWEEP_STORAGE, else execution.storage, else ./raysweep-results.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
