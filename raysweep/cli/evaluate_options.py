"""Arguments and options of `raysweep evaluate` alone, with their help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from raysweep.config.limits import MAX_COUNT

MOST_THREADS = 4096


def _whole(least: int, most: int = MAX_COUNT) -> Callable[[str], int]:
    """Reads a whole number. Typer's own ranges would stand in the help, up to 2147483647."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no whole number") from None
        if number < least:
            raise typer.BadParameter(f"{number} is less than {least}")
        if number > most:
            raise typer.BadParameter(f"{number} is more than {most}")
        return number

    return read


ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A model: builtin:NAME, a folder with config.json and safetensors, or a Hugging Face id.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="DATA",
        help="Text for perplexity: builtin:NAME, a file (.parquet, .jsonl, .txt), a folder of such, or a Hugging Face "
        "id.",
    ),
]
DatasetConfig = Annotated[
    str | None, typer.Option("--config", metavar="NAME", help="Configuration of a Hugging Face data set.")
]
DataFiles = Annotated[
    str | None, typer.Option("--data-files", metavar="FILES", help="Files of a Hugging Face data set.")
]
Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Split of the data set. Default: test.")
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        metavar="TOKENS",
        help="Tokens of a window. Default: 2048, or as many as the model takes.",
        parser=_whole(2),
    ),
]
MaxWindows = Annotated[
    int | None,
    typer.Option(
        "--max-windows",
        metavar="NUMBER",
        help="No more windows than this. Default: the whole text.",
        parser=_whole(1),
    ),
]
BosEachWindow = Annotated[
    bool,
    typer.Option(
        "--bos-each-window",
        metavar="",
        help="Begin every window with the tokenizer's BOS token: another protocol, not comparable.",
    ),
]
EvaluationSpace = Annotated[
    str | None,
    typer.Option(
        "--space",
        metavar="SPACE",
        help="Measure as this search space does: its texts and tasks. That of a sweep lies in STORAGE/NAME/space.yaml.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Tasks of lm-eval, separated by commas; may be repeated. Needs raysweep[tasks].",
    ),
]
Include = Annotated[
    str | None,
    typer.Option(
        "--include", metavar="DIR", help="Folder with task files of your own, in the form of lm-eval."
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="NUMBER", help="Requests of a task that pass at once.", parser=_whole(1)
    ),
]
ModelDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto (float32 on CPU, the checkpoint's own on a device), float32, bfloat16, float16.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, or cuda:N.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="NUMBER",
        help="CPU threads. Default: as torch has it; with execution.threads_per_worker of a sweep float32 rows on CPUs "
        "are met to the bit.",
        parser=_whole(1, MOST_THREADS),
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a model on Hugging Face."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", metavar="", help="Code that comes with the model may run; read it first."
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        metavar="KIND",
        help="dense, or sparse: a 2:4 model on a GPU with torch's semi-structured sparse tensors, beside the dense "
        "one: perplexity and tokens a second of both.",
    ),
]
