"""`raysweep evaluate`: perplexity and lm-eval tasks of any model folder, and what sparse kernels are worth on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raysweep.cli.console import new_table, output, print_json, quiet_libraries, say
from raysweep.cli.numbers import MIB, count, fixed
from raysweep.cli.spaces import load_space
from raysweep.config.sections import BUILTIN_PREFIX, EvaluationConfig, ModelConfig, PerplexityConfig
from raysweep.config.spaces import DEFAULT_SPACE
from raysweep.config.validation import check_name, validated
from raysweep.errors import UsageError, nearest_name
from raysweep.importing import without_collecting

if TYPE_CHECKING:
    from raysweep.launching.evaluation import Measured, Wanted
    from raysweep.launching.speed import SparseFound

KERNELS = ("dense", "sparse")
USUAL_LENGTH = 2048  # tokens of a window where nothing is said, as most papers on pruning have it
MODEL_OPTIONS = ("dtype", "revision", "trust_remote_code")
TEXT_OPTIONS = ("config", "data_files", "split", "sequence_length", "max_windows", "bos_each_window")


@dataclass(frozen=True)
class Options:
    """What the command line says, beside the model.

    text: of PerplexityConfig, as far as it is given;  space, settings: a search space whose evaluation is taken
    """

    text: dict[str, Any]
    space: str | None = None
    settings: Sequence[str] = ()
    tasks: Sequence[str] = ()
    include: str | None = None
    batch_size: int = 8
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    threads: int | None = None
    kernels: str = "dense"
    as_json: bool = False


def run_evaluate(path: str, options: Options) -> None:
    """Raises UsageError for all that cannot be measured, before the model is read."""
    _check_choice("--kernels", options.kernels, KERNELS)
    fields = {"dtype": options.dtype, "revision": options.revision}
    given = {name: value for name, value in fields.items() if value is not None}
    evaluation = _evaluation_of_space(options)
    with _placed(options.space):
        model = validated(
            ModelConfig, {"path": path, **given, "trust_remote_code": options.trust_remote_code}
        )
        entries = _entries(path, options, evaluation)
    tasks = _task_names(options) or (evaluation.tasks if evaluation else ())
    include = options.include or (evaluation.tasks_include if evaluation else None)
    if options.kernels == "sparse" and tasks:
        raise UsageError(
            "tasks are measured with dense kernels: sparse ones change no more than rounding",
            where="--kernels sparse",
            remedy="Leave --tasks out, or --kernels.",
        )
    quiet_libraries()
    with without_collecting():
        from raysweep.launching.evaluation import Wanted, evaluate
    wanted = Wanted(
        model=model,
        entries=entries,
        shorten=options.text.get("sequence_length") is None and evaluation is None,
        tasks=_found(tasks, include),
        device=options.device,
        threads=options.threads,
        batch_size=options.batch_size,
        sparse=options.kernels == "sparse",
    )
    with _placed(options.space):
        measured = evaluate(wanted, lambda text: say(text, "dim"))
    if options.as_json:
        print_json(document(wanted, measured))
    else:
        _show(wanted, measured)


def _found(tasks: Sequence[str], include: str | None) -> Any:
    if not tasks:
        return None
    from raysweep.model.tasks import find_tasks

    return find_tasks(tasks, include)


def _task_names(options: Options) -> tuple[str, ...]:
    """`--tasks a,b --tasks c`, each once."""
    words = (word.strip() for text in options.tasks for word in text.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def _evaluation_of_space(options: Options) -> EvaluationConfig | None:
    if options.space is None:
        if options.settings:
            raise UsageError("--set changes a search space", where="--set", remedy="Name one with --space.")
        return None
    given = [_option(name) for name in ("dataset", *TEXT_OPTIONS) if options.text.get(name)]
    if given:
        raise UsageError(
            f"--space says what text is measured on, and so does {given[0]}",
            remedy="Leave one of them out; --set changes values of the space.",
        )
    return load_space(options.space, options.settings, None).evaluation


def _entries(
    path: str, options: Options, evaluation: EvaluationConfig | None
) -> tuple[PerplexityConfig, ...]:
    """What perplexity is measured on: the space's texts, the data set that is named, or those of a builtin model; none
    where only tasks are asked for."""
    if evaluation is not None:
        return evaluation.perplexity
    if options.text.get("dataset"):
        return (_named_text(options.text),)
    if path.startswith(BUILTIN_PREFIX):
        return (_builtin_text(path, options.text),)
    stray = next((name for name in TEXT_OPTIONS if options.text.get(name)), None)
    if stray is not None:
        raise UsageError(
            f"{_option(stray)} is given without --dataset", remedy="Name the text with --dataset."
        )
    if _task_names(options):
        return ()
    from raysweep.model.checkpoint import ModelSource

    ModelSource(path, options.revision).check_folder()  # its name may be what is wrong
    raise UsageError(
        f"nothing to measure {path} on",
        allowed="--dataset DATA, --space SPACE (the texts of a search space), or --tasks NAME",
        remedy=f"for example: raysweep evaluate {path} --dataset Salesforce/wikitext --config wikitext-2-raw-v1\n"
        f"  or, as the sweep in the folder measured: raysweep evaluate {path} --space raysweep-results/NAME/space.yaml",
    )


def _named_text(text: dict[str, Any]) -> PerplexityConfig:
    return validated(PerplexityConfig, {"name": "text", "sequence_length": USUAL_LENGTH, **_given(text)})


def _given(text: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in text.items() if value not in (None, False)}


def _builtin_text(path: str, text: dict[str, Any]) -> PerplexityConfig:
    """The test text that belongs to a builtin model, as the quickstart measures it, but for what is said otherwise."""
    known = {entry.dataset: entry for entry in load_space(DEFAULT_SPACE, (), None).evaluation.perplexity}
    entry = known.get(path, next(iter(known.values())))
    own = {"name": check_name(path.removeprefix(BUILTIN_PREFIX)), "dataset": path}
    return validated(PerplexityConfig, entry.model_dump() | own | _given(text))


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{value!r} is no choice",
            where=option,
            allowed=" | ".join(allowed),
            nearest=nearest_name(value, list(allowed)),
        )


@contextmanager
def _placed(space: str | None) -> Iterator[None]:
    """What refuses a setting refuses the argument or option of its name; a setting of the text, where a space has it,
    that of the space."""
    try:
        yield
    except UsageError as error:
        name = error.where or ""
        if name == "path":
            raise error.at("PATH") from error
        if name in MODEL_OPTIONS or (name in ("dataset", *TEXT_OPTIONS) and space is None):
            raise error.at(_option(name)) from error
        if space is not None and name.endswith(TEXT_OPTIONS):
            raise error.inside(f"--space {space}: evaluation.perplexity: ") from error
        raise


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# What came of it


def document(wanted: Wanted, measured: Measured) -> dict[str, Any]:
    """As one JSON document."""
    found: dict[str, Any] = {
        "model": wanted.model.path,
        "revision": wanted.model.revision,
        "dtype": measured.dtype,
        "device": measured.device,
        "perplexity": measured.perplexity,
        "protocol": [
            entry.model_dump(mode="json")
            | {"windows": measured.windows[entry.name], "tokens": measured.tokens[entry.name]}
            for entry in measured.entries
        ],
        "tasks": {name: asdict(score) for name, score in measured.tasks.items()},
    }
    if measured.sparse is not None:
        found["sparse"] = asdict(measured.sparse)
    return found


def _show(wanted: Wanted, measured: Measured) -> None:
    console = output()
    if measured.sparse is not None:
        _show_sparse(measured.sparse)
    elif measured.perplexity:
        table = new_table()
        for name in ("text", "windows", "tokens", "perplexity"):
            table.add_column(name, justify="left" if name == "text" else "right")
        for name, value in measured.perplexity.items():
            windows, tokens = measured.windows[name], measured.tokens[name]
            table.add_row(name, f"{windows:,}", f"{tokens:,}", fixed(value, 4))
        console.print(table)
    if measured.tasks:
        _show_tasks(measured)
    where = f"{wanted.model.path}, {measured.dtype} on {measured.device}"
    texts = "; ".join(
        f"{entry.name} = {entry.dataset}, split {entry.split}, windows of {entry.sequence_length} tokens"
        for entry in measured.entries
    )
    say(where + (f"; {texts}" if texts else ""), "dim")


def _show_tasks(measured: Measured) -> None:
    table = new_table()
    for name in ("task", "metric", "value", "stderr", "documents"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for name, score in measured.tasks.items():
        for place, (metric, value) in enumerate(score.values.items()):
            error = score.errors.get(metric)
            table.add_row(
                "" if place else name,
                metric,
                fixed(value, 4),
                "" if error is None else fixed(error, 4),
                "" if place else f"{score.documents:,}",
            )
    output().print(table)


def _show_sparse(found: SparseFound) -> None:
    """Dense and sparse side by side: perplexities, then the speed of reading batches."""
    table = new_table()
    for name in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(name, justify="right" if name else "left")
    for name, dense in found.dense_perplexity.items():
        sparse = found.sparse_perplexity[name]
        table.add_row(f"perplexity {name}", fixed(dense, 4), fixed(sparse, 4), fixed(sparse / dense, 4))
    for batch, (dense, sparse) in found.tokens_per_second.items():
        what = f"tokens/s, {count(batch, 'window')} of {found.window}"
        table.add_row(what, f"{dense:,.0f}", f"{sparse:,.0f}", fixed(sparse / dense, 2))
    dense_mib, sparse_mib = found.dense_bytes / MIB, found.sparse_bytes / MIB
    ratio = fixed(sparse_mib / dense_mib, 2)
    table.add_row("MiB of their weights", f"{dense_mib:,.0f}", f"{sparse_mib:,.0f}", ratio)
    output().print(table)
    say(found.linears, "dim")
