"""`raysweep export`: the model of a trial as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import asdict

from raysweep.cli.console import output, print_json, quiet_libraries, say
from raysweep.cli.ending import clean_interruptions
from raysweep.config.paths import typed_path
from raysweep.errors import UsageError, nearest_name
from raysweep.results.uris import is_uri

DTYPES = ("checkpoint", "float32", "bfloat16", "float16")


def run_export(trial: str, target: str, dtype: str, storage: str | None, as_json: bool) -> None:
    if dtype not in DTYPES:
        raise UsageError(
            f"unknown dtype {dtype!r}",
            where="--dtype",
            allowed=" | ".join(DTYPES),
            nearest=nearest_name(dtype, list(DTYPES)),
        )
    if is_uri(target):
        raise UsageError(
            f"{target!r} is no folder of this machine",
            where="--output",
            allowed="a folder",
            remedy="Write the model here and copy it, or upload it: its README.md says how.",
        )
    place = typed_path(target, "--output")
    quiet_libraries()
    with clean_interruptions():
        from raysweep.launching.exporting import export

        done = export(trial, place, storage=storage, dtype=dtype, tell=say)
    if as_json:
        print_json({"folder": str(place.absolute()), **asdict(done)})
        return
    from rich.text import Text

    if done.recomputed is not None:
        say(f"Trial {done.trial_id} was {done.recomputed}")
    found = done.measured or {}
    rounded = f"; rounded to {done.dtype} {found['perplexity']:.4f}" if found else f", in {done.dtype}"
    say(f"Perplexity {done.perplexity:.4f}{rounded}. {len(done.files)} files:")
    output().print(Text(str(place)), soft_wrap=True)
