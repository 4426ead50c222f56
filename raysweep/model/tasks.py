"""Tasks of the lm-eval library: found and read before anything starts, and measured on a model in memory.

lm-eval is optional (`raysweep[tasks]`) and imported only where tasks are named.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.config.paths import typed_path
from raysweep.errors import RaysweepError, UsageError, first_line, nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "lm-eval"
NOT_CONTENT = (
    "metadata",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
)  # of a task: where its documents lie
HASH_LENGTH = 16  # hexadecimal digits, as of identities
STDERR = "_stderr"  # in lm-eval's names of metrics


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are known to be there.

    names: of tasks or groups;  include: a folder with task files of the user's own
    hashes: by name, of what the task asks and of its documents, wherever they lie
    here: the folder that paths in task files count from
    """

    names: tuple[str, ...]
    include: str | None
    hashes: Mapping[str, str]
    here: str

    def only(self, names: Sequence[str]) -> TaskSet:
        """Some of them."""
        return replace(self, names=tuple(name for name in self.names if name in names))


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches on a task.

    metric, value: the first one that the task lists, which fills the column;  values, errors: all metrics of the task,
    named as lm-eval does (`acc,none`), with their standard errors as far as there are any
    documents: that it was measured on;  version: of lm-eval
    """

    metric: str
    value: float
    values: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    documents: int = 0
    version: str = ""

    def told(self) -> dict[str, Any]:
        """What a row says of it beside the value."""
        found = {"metric": self.metric, "stderr": self.errors.get(self.metric)}
        return found | {"documents": self.documents, "lm_eval": self.version}


def find_tasks(names: Sequence[str], include: str | None = None) -> TaskSet:
    """Finds tasks by name, reads their documents, and so knows that they can be measured.

    Raises UsageError for what is not there: lm-eval, a task, its documents, the folder of own tasks; and for tasks that
    cannot be measured here: tags, groups without a score, those that run code or need images.
    """
    own = None if include is None else str(_own_folder(include).absolute())
    with _quiet():
        manager = _manager(names, own)
        hashes = {name: _read_hash(manager, name) for name in names}
    return TaskSet(tuple(names), own, hashes, os.getcwd())


def score_tasks(
    model: PreTrainedModel, tokenizer: Any, tasks: TaskSet, batch_size: int
) -> dict[str, TaskScore]:
    """Measures a model on tasks through lm-eval's own Hugging Face model, on the devices that it lies on.

    Raises RaysweepError where lm-eval fails.
    """
    with _quiet(), chdir(tasks.here) if Path(tasks.here).is_dir() else nullcontext():
        try:
            manager = _manager(tasks.names, tasks.include)
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            wrapped = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped,
                tasks=list(tasks.names),
                task_manager=manager,
                log_samples=False,
                batch_size=batch_size,
            )
        except RaysweepError:
            raise
        except Exception as error:  # of its metrics and data sets, all kinds
            raise RaysweepError(
                f"{PACKAGE} cannot measure {', '.join(tasks.names)}: {first_line(error)}"
            ) from error
    return {name: score_of(name, found) for name in tasks.names}


def score_of(name: str, found: Mapping[str, Any]) -> TaskScore:
    """Of what lm-eval returns, that of one task or group."""
    measured = found["results"][name]
    values = {key: float(value) for key, value in measured.items() if _is_metric(key, value)}
    errors = {
        key.replace(STDERR, "", 1): float(value)
        for key, value in measured.items()
        if STDERR in key and isinstance(value, int | float)
    }
    listed = (found["configs"].get(name) or {}).get("metric_list") or [{}]
    first = next(
        (key for key in values if key.split(",")[0] == listed[0].get("metric")), next(iter(values), None)
    )
    if first is None or not math.isfinite(values[first]):
        raise RaysweepError(f"{PACKAGE} gives {values.get(first or '', 'no number')} for task {name!r}")
    values = {key: value for key, value in values.items() if math.isfinite(value)}
    errors = {key: error for key, error in errors.items() if key in values and math.isfinite(error)}
    documents = int(measured.get("sample_len") or measured.get("sample_count") or 0)
    return TaskScore(first, values[first], values, errors, documents, metadata.version("lm-eval"))


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and STDERR not in key and isinstance(value, int | float)


# Finding them


def _own_folder(include: str) -> Path:
    folder = typed_path(include, "folder of tasks")
    if not folder.is_dir():
        raise UsageError(
            f"no such folder of tasks: {include}", remedy="Name the folder that holds the task's YAML file."
        )
    return folder


def _manager(names: Sequence[str], include: str | None) -> Any:
    """lm-eval's index of tasks: of the user's folder alone where all are in it, since reading all takes long."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"tasks need {PACKAGE}, which cannot be imported: {first_line(error)}",
            remedy=f"pip install 'raysweep[tasks]' (or '{PACKAGE}[hf]'), on every node of a cluster.",
        ) from error
    if include is not None:
        manager = TaskManager(include_path=include, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"unknown task {name!r}",
                allowed=f"the {len(manager.all_tasks):,} tasks and groups of {PACKAGE} (`lm-eval ls tasks`), and those "
                f"in a folder of your own ({include or 'none is named'})",
                nearest=nearest_name(name, manager.all_tasks),
            )
    return manager


def _read_hash(manager: Any, name: str) -> str:
    """Reads a task, or the tasks of a group, with all documents. Raises UsageError."""
    if name in manager.all_tags:
        members = sorted(manager.task_index[name].tags)
        raise UsageError(
            f"{name!r} is a tag of several tasks, without a score of its own",
            allowed=", ".join(members[:20]) + (", ..." if len(members) > 20 else ""),
            remedy="Name the tasks.",
        )
    try:
        loaded = manager.load([name])
        group = loaded.get("groups", {}).get(name)
        digest = sha256()
        for task_name, task in sorted(loaded["tasks"].items()):
            _check_harmless(name, task)
            digest.update(f"{task_name}\n".encode())
            for part in _contents(task):
                digest.update(part.encode())
    except UsageError:
        raise
    except Exception as error:  # of YAML, templates, data sets and their network, all kinds
        raise UsageError(
            f"task {name!r} cannot be read: {first_line(error)}",
            remedy="Check its file and data set; paths in it count from the current folder, and a data set on Hugging "
            "Face needs the network once (HF_HUB_OFFLINE, HF_TOKEN).",
        ) from error
    if group is not None and not group.has_aggregation:
        raise UsageError(
            f"{name!r} is a group of tasks without a score of its own",
            allowed=", ".join(group.child_names[:20]),
            remedy="Name the tasks.",
        )
    return digest.hexdigest()[:HASH_LENGTH]


def _check_harmless(name: str, task: Any) -> None:
    for mark, what in (
        ("UNSAFE_CODE", "runs code that the model writes"),
        ("MULTIMODAL", "needs images or sound"),
    ):
        if getattr(task, mark, False):
            raise UsageError(f"task {name!r} {what}, which is not done here", remedy="Leave it out.")


def _contents(task: Any) -> Iterator[str]:
    """What a task asks, as text: its settings without places, its documents, and those that its examples are from."""
    settings = {key: value for key, value in task.dump_config().items() if key not in NOT_CONTENT}
    yield json.dumps(settings, sort_keys=True, default=_named)
    yield from (json.dumps(doc, sort_keys=True, default=_named) for doc in task.eval_docs)
    if task.get_config("num_fewshot"):
        yield from (json.dumps(doc, sort_keys=True, default=_named) for doc in task.fewshot_docs() or ())


def _named(value: Any) -> str:
    """Of what JSON cannot hold, a text without addresses in memory."""
    return getattr(value, "__qualname__", None) or f"{type(value).__name__}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context lm-eval reports errors alone, and prints nothing on stdout."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
