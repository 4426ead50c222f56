"""`raysweep plan`: what a launch on this machine would run, and what it would need. Runs and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raysweep.cli.console import messages, output, print_json
from raysweep.cli.numbers import count, large
from raysweep.cli.spaces import load_space

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raysweep.cluster.nodes import Node
    from raysweep.shards.plan import ShardPlan
    from raysweep.sweep.launch import Launch
    from raysweep.sweep.prepare import PreparedModel

MEMORY_PARTS = ("weights", "activations", "statistics", "trials", "recovery", "evaluation", "knowledge")


def run_plan(
    space: str, settings: Sequence[str], name: str | None, storage: str | None, as_json: bool
) -> None:
    loaded = load_space(space, settings, name)
    with _busy("Reading model and data"):
        from raysweep.cluster.nodes import this_node
        from raysweep.sweep.launch import checked_folder, device_here, prepare_launch
        from raysweep.sweep.planning import make_plans

        prepared = prepare_launch(loaded, checked_folder(loaded, storage), device_here())
        node = this_node()
        plans = make_plans(prepared.models, loaded, [node])
    if as_json:
        print_json(plan_document(prepared, plans, node))
    else:
        _print_plan(output(), prepared, plans, node)


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A spinner on terminals, nothing elsewhere."""
    console = messages()
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def plan_document(prepared: Launch, plans: Sequence[ShardPlan], node: Node) -> dict[str, Any]:
    """The plan as JSON has it; bytes and numbers are plain."""
    return {
        "sweep": prepared.space.name,
        "folder": str(prepared.folder),
        "trials": trial_counts(prepared),
        "machine": asdict(node),
        "models": [
            _model_document(prepared, model, plan) for model, plan in zip(prepared.models, plans, strict=True)
        ],
    }


def trial_counts(prepared: Launch) -> dict[str, int]:
    """planned = finished + to_run;  to_run = new + failed, which run again"""
    planned, finished = len(prepared.trials), prepared.finished
    failed = sum(prepared.states.get(trial.trial_id) == "failed" for trial in prepared.trials)
    to_run = planned - finished
    return {
        "planned": planned,
        "finished": finished,
        "failed": failed,
        "new": to_run - failed,
        "to_run": to_run,
    }


def _model_document(prepared: Launch, model: PreparedModel, plan: ShardPlan) -> dict[str, Any]:
    shards = [
        {
            "blocks": [start, stop],
            "memory": {**asdict(memory), "device": memory.device, "host": memory.host, "total": memory.total},
        }
        for (start, stop), memory in zip(plan.ranges, plan.memory, strict=True)
    ]
    return {
        "path": model.config.path,
        "parameters": model.shape.parameters,
        "blocks": len(model.shape.blocks),
        "dtype": model.dtype,
        "device": plan.device,
        "trials": [
            {"recovery": recovery, "granularity": granularity, "planned": planned, "to_run": to_run}
            for (recovery, granularity), (planned, to_run) in kinds(prepared, model).items()
        ],
        "calibration_sets": len(model.phases),
        "concurrent_trials": plan.concurrent_trials,
        "cpus_per_shard": plan.cpus,
        "gpus_per_shard": plan.gpus,
        "threads_per_shard": plan.threads,
        "shares_cores": plan.shares_cores,
        "shards": shards,
        "host_bytes": host_bytes(plan),
    }


def host_bytes(plan: ShardPlan) -> int:
    """Host memory of all shards: on a CPU also what a device would hold."""
    return sum(memory.host if plan.device == "cuda" else memory.total for memory in plan.memory)


def kinds(prepared: Launch, model: PreparedModel) -> dict[tuple[str, str | None], tuple[int, int]]:
    """For each recovery and granularity: trials planned, and trials to run."""
    planned: Counter[tuple[str, str | None]] = Counter()
    to_run: Counter[tuple[str, str | None]] = Counter()
    for trial in model.trials:
        kind = (trial.trial.recovery, trial.trial.granularity)
        planned[kind] += 1
        to_run[kind] += not prepared.is_done(trial)
    return {kind: (number, to_run[kind]) for kind, number in planned.items()}


def _print_plan(console: Console, prepared: Launch, plans: Sequence[ShardPlan], node: Node) -> None:
    from rich.text import Text

    counts = trial_counts(prepared)
    parts = [f"{counts[name]} {name}" for name in ("new", "finished") if counts[name] or name == "new"]
    parts += [f"{counts['failed']} failed before, to run again"] if counts["failed"] else []
    console.print(
        Text.assemble(
            (prepared.space.name, "bold"), f": {count(counts['planned'], 'trial')} ({', '.join(parts)})"
        )
    )
    console.print(Text(f"results in {prepared.folder}", style="dim"), soft_wrap=True)
    for model, plan in zip(prepared.models, plans, strict=True):
        console.print()
        _print_model(console, prepared, model, plan, node)


def _print_model(
    console: Console, prepared: Launch, model: PreparedModel, plan: ShardPlan, node: Node
) -> None:
    from rich.text import Text

    from raysweep.shards.plan import format_bytes

    shape = model.shape
    size = f"{large(shape.parameters)} parameters, {count(len(shape.blocks), 'block')}, {plan.dtype}"
    console.print(Text.assemble((model.config.path, "bold"), f": {size}"))
    console.print()
    console.print(_trials_table(prepared, model))
    console.print()
    console.print(_shards_table(plan))
    console.print()
    there = f" of {format_bytes(node.memory_bytes)}" if node.memory_bytes else ""
    console.print(f"host memory  {format_bytes(host_bytes(plan))}{there}, at most")
    if plan.device == "cuda":
        most = max(memory.device for memory in plan.memory)
        there = f" of {format_bytes(node.gpu_bytes)}" if node.gpu_bytes else ""
        console.print(f"GPU memory   {format_bytes(most)}{there}, at most, each")
    console.print(f"cores        {_core_words(plan, node)}")
    console.print(f"in flight    {count(plan.concurrent_trials, 'trial')}")


def _core_words(plan: ShardPlan, node: Node) -> str:
    shared = "; the shards share cores" if plan.shares_cores else ""
    gpus = f", {plan.shards} of {count(node.gpus, 'GPU')}" if plan.device == "cuda" else ""
    each = f"{count(plan.shards, 'shard')} with {count(plan.threads, 'thread')} each"
    return f"{each} on {count(int(node.cpus), 'core')}{gpus}{shared}"


def _new_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False
    )


def _trials_table(prepared: Launch, model: PreparedModel) -> Table:
    table = _new_table()
    table.add_column("recovery")
    table.add_column("granularity")
    for title in ("trials", "to run"):
        table.add_column(title, justify="right")
    for (recovery, granularity), (planned, to_run) in kinds(prepared, model).items():
        table.add_row(
            recovery, granularity or "", str(planned), str(to_run), style="dim" if not to_run else ""
        )
    return table


def _shards_table(plan: ShardPlan) -> Table:
    """MiB by what they are for. Shards in rows, parts in columns; process is what an empty worker takes."""
    from raysweep.shards.memory import PROCESS_BYTES

    table = _new_table()
    table.add_column("shard\nMiB", vertical="bottom", justify="right")
    table.add_column("blocks", vertical="bottom")
    titles = {"activations": "activa-\ntions", "statistics": "statis-\ntics", "evaluation": "evalu-\nation"}
    for part in MEMORY_PARTS:
        table.add_column(titles.get(part, part), justify="right", vertical="bottom")
    for title in ("process", "total"):
        table.add_column(title, justify="right", vertical="bottom")
    for shard, ((start, stop), memory) in enumerate(zip(plan.ranges, plan.memory, strict=True)):
        parts = [_mib(getattr(memory, part)) for part in MEMORY_PARTS]
        blocks = f"{start}-{stop - 1}" if stop - start > 1 else str(start)
        table.add_row(str(shard), blocks, *parts, _mib(PROCESS_BYTES), _mib(memory.total))
    return table


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f}"
