"""`raysweep plan`: what a launch on this machine would run, and what it would need. Runs no trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from tempfile import gettempdir
from typing import TYPE_CHECKING

from raysweep.cli.console import messages, new_table, output, print_json, quiet_libraries, say
from raysweep.cli.numbers import count, duration, large, operations
from raysweep.cli.plan_document import Seen, kinds, plan_document, trial_counts
from raysweep.cli.spaces import load_space
from raysweep.config.expansion import Sampled
from raysweep.reconstruction.placement import ANEW, DEVICE, DISK, FILES, HOST, Placement
from raysweep.results.uris import place_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raysweep.baseline.plan import RetrainPlan
    from raysweep.cluster.nodes import Node
    from raysweep.config.studies import Open
    from raysweep.launching.outlook import Probing
    from raysweep.launching.prepared import Launch
    from raysweep.shards.memory import ShardMemory
    from raysweep.shards.plan import ShardPlan
    from raysweep.sweep.prepare import PreparedModel

IN_HAND_PARTS = {
    "weights": "weights",
    "statistics": "statistics",
    "trials": "weights of trials in flight",
    "masks": "masks",
    "at_work": "one unit or batch at work",
    "heap": "what earlier ones left in the heap",
}
STORED_PARTS = {
    "activations": "activations at block boundaries",
    "kept": "inputs of linears that are kept",
    "streams": "activations of trials in flight",
}
WAITING_PARTS = {
    "waiting_on_host": "what waits to come into hand",
    "factors": "factors of Gram matrices",
    "left": "a recovered unit while it is written",
}
ON_DISK_PARTS = {"waiting_on_disk": "what waits to come into hand"}


def run_plan(
    space: str,
    settings: Sequence[str],
    name: str | None,
    storage: str | None,
    as_json: bool,
    no_probe: bool = False,
    probe_again: bool = False,
) -> None:
    """no_probe, probe_again: whether the device is not measured at all, or anew"""
    loaded = load_space(space, settings, name)
    quiet_libraries()
    with _busy("Reading model and data"):
        from raysweep.cluster.nodes import this_node
        from raysweep.launching.launch import checked_folder, device_here, prepare_launch
        from raysweep.launching.outlook import look_ahead, memory_by_kind
        from raysweep.sweep.planning import make_plans

        prepared = prepare_launch(loaded, checked_folder(loaded, storage), device_here())
        node = this_node()
        plans = make_plans(prepared.models, loaded, [node])
        retraining = [
            prepared.retrain_plan(model, [node]) for model in prepared.models
        ]  # refuses as launch would
    with _busy("Adding up work and memory" if no_probe else "Measuring this machine"):
        probing: Probing = "none" if no_probe else "again" if probe_again else "missing"
        looks = [
            Seen(
                model,
                plan,
                retrained,
                look_ahead(prepared, model, plan, [node], probing),
                memory_by_kind(loaded, model, plan, [node]),
            )
            for model, plan, retrained in zip(prepared.models, plans, retraining, strict=True)
        ]
    if as_json:
        print_json(plan_document(prepared, looks, node))
    else:
        _print_plan(output(), prepared, looks, node)


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A spinner on terminals, a line elsewhere: it may take a while."""
    console = messages()
    if not console.is_terminal:
        say(text, "dim")
        yield
        return
    with console.status(text):
        yield


def _print_plan(console: Console, prepared: Launch, looks: Sequence[Seen], node: Node) -> None:
    from rich.text import Text

    counts = trial_counts(prepared)
    parts = [f"{counts[name]} {name}" for name in ("new", "finished") if counts[name] or name == "new"]
    parts += [f"{counts['again']} failed before, to run again"] if counts["again"] else []
    parts += [f"{counts['failed']} failed, to stay so"] if counts["failed"] else []
    console.print(
        Text.assemble(
            (prepared.space.name, "bold"), f": {count(counts['planned'], 'trial')} ({', '.join(parts)})"
        )
    )
    console.print(Text(f"results in {place_of(prepared.folder)}", style="dim"), soft_wrap=True)
    for seen in looks:
        console.print()
        _print_model(console, prepared, seen, node)


def _print_model(console: Console, prepared: Launch, seen: Seen, node: Node) -> None:
    from rich.text import Text

    model, plan = seen.model, seen.plan
    shape = model.shape
    size = f"{large(shape.parameters)} parameters, {count(len(shape.blocks), 'block')}, {plan.dtype}"
    console.print(Text.assemble((model.config.path, "bold"), f": {size}"))
    console.print()
    console.print(_trials_table(prepared, seen))
    console.print()
    for words in study_words(model):
        console.print(Text(words), soft_wrap=True)
    if any(phase.studies for phase in model.phases):
        console.print()
    console.print(_memory_table(plan))
    console.print()
    on_storage = (
        prepared.storage_bytes(model, plan.all_concurrent_trials),
        prepared.kept_bytes(model, prepared.space.execution.keep),
    )
    _print_facts(console, plan, node, seen.retraining, *on_storage)
    console.print()
    _print_outlook(console, seen)


def study_words(model: PreparedModel) -> list[str]:
    """Optuna chooses learning_rate (loguniform 0.001 to 0.1) in 2 cells of 6 trials each."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for phase in model.phases:
        for study in phase.studies:
            fields = (f"{name} ({_open_words(values)})" for name, values in study.open.items())
            sizes[", ".join(fields)].append(study.samples)
    return [
        f"Optuna chooses {fields} in {count(len(samples), 'cell')}: {' + '.join(map(str, samples))} trials"
        if len(set(samples)) > 1
        else f"Optuna chooses {fields} in {count(len(samples), 'cell')} of {count(samples[0], 'trial')} each"
        for fields, samples in sizes.items()
    ]


def _open_words(values: Open) -> str:
    if isinstance(values, Sampled) and values.kind != "choice":
        return f"{values.kind} {values.values[0]:g} to {values.values[1]:g}"
    listed = values.values if isinstance(values, Sampled) else values
    return ", ".join("null" if value is None else str(value) for value in listed)


def _print_facts(
    console: Console,
    plan: ShardPlan,
    node: Node,
    retraining: RetrainPlan | None,
    storage_bytes: int,
    kept_bytes: int = 0,
) -> None:
    """storage_bytes: at most while it runs;  kept_bytes: of them those of kept trials, which stay"""
    from rich.table import Table

    from raysweep.shards.plan import format_bytes, host_bytes

    def at_most(needed: int, there: int) -> str:
        return f"{format_bytes(needed)}" + (f" of {format_bytes(there)}" if there else "")

    blocks = (f"{shard}: {_ranges(range(start, stop))}" for shard, (start, stop) in enumerate(plan.ranges))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("blocks by shard", "; ".join(blocks))
    grid.add_row("host memory", at_most(host_bytes(plan), node.memory_bytes))
    if plan.device == "cuda":
        grid.add_row("memory of one GPU", at_most(max(m.device for m in plan.memory), node.gpu_bytes))
    if plan.placement.by_block or plan.placement.activations == DISK:
        grid.add_row("waiting", _waiting_words(plan.placement))
    if disk := max(memory.disk for memory in plan.memory):
        each = " of each shard" if plan.all_shards > 1 else ""
        grid.add_row("disk", f"up to {format_bytes(disk)}{each} in {plan.placement.scratch or gettempdir()}")
    grid.add_row("cores", _core_words(plan, node))
    grid.add_row("in flight", count(plan.all_concurrent_trials, "trial"))
    if storage_bytes:
        stays = f"; up to {format_bytes(kept_bytes)} stays, of kept trials" if kept_bytes else ""
        grid.add_row("storage", f"up to {format_bytes(storage_bytes)} beside the rows while it runs{stays}")
    if retraining is not None:
        each = f"up to {format_bytes(retraining.bytes)} {'on each GPU' if retraining.use_gpu else 'in each'}"
        grid.add_row("retraining", f"{count(retraining.workers, 'worker')} after the shards, {each}")
    console.print(grid)


def _waiting_words(placement: Placement) -> str:
    """Where things wait that are not at work."""
    where = {HOST: "on the host", DISK: "on disk", FILES: "in the model's files", ANEW: "computed anew"}
    kept = [("activations", placement.activations), ("Gram matrices", placement.statistics)]
    if placement.waits:
        kept = [("weights", placement.weights), ("those of trials", placement.trials), *kept]
    words = [f"{what} {where[place]}" for what, place in kept if place in where]
    if placement.every > 1:
        words.append(f"one in {placement.every} boundaries kept")
    elif not placement.halves:
        words.append("boundaries within blocks computed anew")
    return "; ".join(words)


def _core_words(plan: ShardPlan, node: Node) -> str:
    shared = "; the shards share cores" if plan.shares_cores else ""
    gpus = f", {plan.all_shards} of {count(node.gpus, 'GPU')}" if plan.device == "cuda" else ""
    replicas = f"{plan.replicas} replicas of " if plan.replicas > 1 else ""
    each = f"{replicas}{count(plan.shards, 'shard')} with {count(plan.threads, 'thread')} each"
    return f"{each} on {count(int(node.cpus), 'core')}{gpus}{shared}"


def _print_outlook(console: Console, seen: Seen) -> None:
    """What it takes, and what retraining would."""
    from rich.table import Table

    from raysweep.shards.plan import format_bytes

    work, took, instead = seen.outlook.work, seen.outlook.durations, seen.outlook.instead
    grid = Table.grid(padding=(0, 2, 0, 0))
    if work.trials:
        moved = f", {format_bytes(work.network)} between shards" if work.network else ""
        grid.add_row("work", operations(work.flops) + moved)
    if work.trials and took is not None:
        parts = {"start": took.start, "dense pass": took.dense_pass, "trials": took.trials}
        parts |= {"retraining": took.retraining} if took.retraining else {}
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        waits = seen.plan.placement.by_block or seen.plan.placement.activations == DISK
        more = "; what is read or computed again comes on top" if waits else ""
        grid.add_row("time", f"about {duration(took.total)} ({listed}){more}")
    each = f"{format_bytes(instead.bytes)} {'on each GPU' if seen.plan.device == 'cuda' else 'in each'}"
    needs = f"{each} of {count(instead.workers, 'worker')} (ZeRO {instead.zero_stage})"
    grid.add_row("retraining instead", ", ".join([needs, *_work_words(instead.flops, instead.seconds)]))
    if instead.recovery_flops is not None and instead.recovery_bytes is not None:
        recovery = f"{format_bytes(instead.recovery_bytes)} for a unit"
        grid.add_row("  one recovery", ", ".join([recovery, operations(instead.recovery_flops)]))
    console.print(grid)


def _work_words(flops: float, seconds: float | None) -> list[str]:
    return [operations(flops), *([] if seconds is None else [duration(seconds)])]


def _trials_table(prepared: Launch, seen: Seen) -> Table:
    """By kind; with the dense pass, which no trial has to itself."""
    from raysweep.shards.costs import DENSE_PASS

    outlook = seen.outlook
    timed = outlook.durations is not None
    table = new_table()
    table.add_column("recovery")
    table.add_column("granularity")
    for title in ("trials", "to run", "work", *(["time"] if timed else []), "peak MiB alone"):
        table.add_column(title, justify="right")

    def costs(kind: tuple[str, str | None]) -> list[str]:
        return [
            operations(outlook.flops_of(kind)),
            *([duration(outlook.seconds_of(kind) or 0.0)] if timed else []),
        ]

    for (recovery, granularity), (planned, to_run) in kinds(prepared, seen.model).items():
        kind = (recovery, granularity)
        peak = seen.peaks.get(kind)
        cells = [*(costs(kind) if to_run else ["", *[""] * timed]), "" if peak is None else _mib(peak)]
        table.add_row(
            recovery, granularity or "", str(planned), str(to_run), *cells, style="" if to_run else "dim"
        )
    if outlook.work.trials:
        table.add_row("dense pass", "", "", "", *costs(DENSE_PASS), "")
    return table


def _memory_table(plan: ShardPlan) -> Table:
    """Parts in rows, shards in columns; shards that need the same share one, so that all fit."""
    alike: dict[ShardMemory, list[int]] = defaultdict(list)
    for shard, memory in enumerate(plan.memory):
        alike[memory].append(shard)
    table = new_table()
    table.add_column("peak memory in MiB")
    for shards in alike.values():
        table.add_column(f"{'shard' if len(shards) == 1 else 'each of'} {_ranges(shards)}", justify="right")

    def add(title: str, bytes_of: Callable[[ShardMemory], int], sums: bool = False) -> None:
        style = "bold" if sums else ""
        table.add_row(title, *(_mib(bytes_of(memory)) for memory in alike), style=style, end_section=sums)

    def add_some(parts: Mapping[str, str]) -> None:
        for part, title in parts.items():
            if any(getattr(memory, part) for memory in alike):
                add(title, attrgetter(part))

    on_gpus, store = plan.device == "cuda", plan.placement.activations
    add_some(IN_HAND_PARTS)
    if on_gpus and store != DEVICE:
        add("on the GPU", attrgetter("device"), sums=True)
    if store != DISK:
        add_some(STORED_PARTS)
    if store == DEVICE:
        add("on the GPU", attrgetter("device"), sums=True)
    add_some(WAITING_PARTS)
    add("process with its libraries", attrgetter("process"))
    add(*(("on the host", attrgetter("host")) if on_gpus else ("total", attrgetter("total"))), sums=True)
    if any(memory.disk for memory in alike):
        if store == DISK:
            add_some(STORED_PARTS)
        add_some(ON_DISK_PARTS)
        add("on disk", attrgetter("disk"), sums=True)
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """0, 2-5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f}"
