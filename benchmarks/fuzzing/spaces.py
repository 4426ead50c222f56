"""Search spaces: typed ones with values of every field, right and nearly right, and YAML text that is bent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from fuzzing.changes import change_bytes, change_data, odd_value
from fuzzing.site import Case, Site, small_space

GOOD: dict[str, tuple[Any, ...]] = {
    "criterion": ("magnitude", "random", "wanda", "ria", "sparsegpt"),
    "sparsity": (0.5, 0.25, 0.75, 0, 0.9, {"q_proj": 0.5, "re:.*mlp.*": 0.25}, {"down_proj": 0.5}),
    "pattern": ("unstructured", "2:4", "1:4", "4:8", "1:2"),
    "comparison_group": ("row", "matrix"),
    "statistics_stream": ("dense", "pruned", "recovered"),
    "dampening": (0.01, 0, 1, 0.1),
    "column_block": (128, 4, 8, 16, 1),
    "ria_power": (0.5, 0, 1, 2),
    "targets": ("q_proj", ["up_proj", "down_proj"], ["re:.*self_attn.*"], "model.layers.0.mlp.up_proj", None),
    "ignore": ("k_proj", ["re:.*layers.1.*"], None),
    "granularity": ("matrix", "subblock", "block", "window:2", "window:1", "model"),
    "input_stream": ("dense", "pruned"),
    "target_stream": ("dense", "dense", "pruned"),
    "loss": ("mse", "normalized_mse", "cosine"),
    "trainable": ("all", "weights", "lora", "lora+norms"),
    "lora_rank": (1, 2, 8),
    "lora_alpha": (32, 1, 0.5),
    "optimizer": ("adamw", "adamw", "sgd", "exact"),
    "learning_rate": (0.01, 1e-3, 1e-5, 0.1, 1e6, 1e30),
    "epochs": (1, 2),
    "batch_size": (1, 2, 4),
    "shuffle": (True, False),
    "warmup_fraction": (0.1, 0, 1),
    "max_grad_norm": (1.0, 1e-6, None),
    "seed": (0, 1, 2**31, 2**63 - 1, None),
}
RETRAINED: dict[str, tuple[Any, ...]] = {
    "loss": ("next_token", "distillation"),
    "trainable": ("all", "blocks", "weights", "lora", "lora+norms"),
    "optimizer": ("adamw",),
    "start_from": (None, {"granularity": "block", "learning_rate": 0.01}, {"granularity": "matrix"}),
    "zero_stage": (0, 1, 2, 3),
    "offload": ("none", "cpu"),
    "gradient_accumulation": (1, 2, 3),
    "gradient_checkpointing": (True, False),
}
MASK = tuple(GOOD)[:10]
UNIT = tuple(GOOD)[10:]
OWN_MODULES = (
    "weight.abs()",
    "weight.abs() * float('nan')",
    "weight.abs().sum()",
    "weight.abs()[:1]",
    "statistics.nothing",
    "1 / 0",
    "weight.long()",
    "[1, 2, 3]",
    "weight.mul_(0)",
)
CALIBRATION: dict[str, tuple[Any, ...]] = {
    "sampling": ("pack", "document"),
    "num_samples": (1, 2, 4, 6),
    "sequence_length": (2, 8, 16),
    "seed": (0, 1, 2**63 - 1),
    "split": ("train",),
}
EXECUTION: dict[str, tuple[Any, ...]] = {
    "shards": ("auto", 1, 2),
    "threads_per_worker": (1, 2),
    "concurrent_trials": ("auto", 1, 3),
    "retrain_workers": ("auto", 1),
    "checkpoint_steps": (1, 200),
    "activation_store": ("auto", "host", "device"),
    "compile": ("auto", "never", "always"),
}
NEARLY: dict[str, tuple[Any, ...]] = {
    "criterion": ("wandaa", "Wanda", "file:nothing.safetensors", "a:b:c", "os.path:join", "json:dumps"),
    "sparsity": (1, 1.0, -0.1, 50, "50%", {}, {"q_proj": 1}, {"nothing": 0.5}, {"re:(": 0.5}, {"q_proj": 0}),
    "pattern": ("4:4", "4:2", "2:5", "16:32", "2:4 ", "0:4", "2:", ":", 2.4, "1:9999", "-2:4"),
    "column_block": (0, 3, 2**31, 7.5),
    "targets": ("nothing", [], [[]], ["q_proj", ["k_proj"]], "re:", "re:[", ["re:.*", 3]),
    "ignore": ("re:.*", "nothing", [], [None]),
    "granularity": ("window:3", "window:0", "window:99999", "window:-1", "blocks", "window:"),
    "learning_rate": (0, -1, "1e-3", "fast", 1e-300, 1e308),
    "lora_rank": (0, 9, 17, 10**9),
    "epochs": (0, 1.5, -1, 2**31),
    "batch_size": (0, 3, 10**9),
    "seed": (-1, 2**63, 1.0, "0"),
    "start_from": ({}, {"sparsity": 0.5}, {"granularity": "x", "learning_rate": 1}, {"granularity": None}),
    "data": ({}, {"dataset": "nothing.parquet"}, {"dataset": "x", "num_samples": 0}, {"dataset": None}),
    "compare_within": ([], ["nothing"], ["model", "model"], "model", ["seed", "calibration_seed"]),
    "name": ("", "..", "a/b", ".hidden", "x" * 101, "x" * 100, "a b", "a\n", "É", 5, None, "con", "-x"),
}


def typed_space(chance: random.Random, site: Site, folder: Path) -> tuple[dict[str, Any], Path]:
    """A search space, and the file it was written to. Four in ten have a value or two that may be wrong."""
    space = small_space(site)
    space["name"] = chance.choice(["a", "Typed.Space_1", "x" * 100, "0"])
    if chance.random() < 0.06:
        space["model"]["path"] = str(chance.choice(site.odd_models))
    _some(chance, space["model"], {"dtype": ("auto", "float32", "bfloat16", "float16")}, 0.3)
    _some(chance, space["calibration"], CALIBRATION, 0.4)
    if chance.random() < 0.15:
        space["calibration"]["dataset"] = str(site.rows)
    if chance.random() < 0.15:
        space["calibration"]["seed"] = [0, 1]
    space["validation"] = {"samples": chance.choice([0, 1, 2, 2, 2]), "seed": chance.choice([0, 3])}
    entry = space["evaluation"]["perplexity"][0]
    entry["max_windows"] = chance.choice([1, 3, 3, None])
    entry["bos_each_window"] = chance.random() < 0.1
    if chance.random() < 0.15:
        space["evaluation"]["perplexity"].append(entry | {"name": "other", "sequence_length": 8})
    search = space["search"] = _search(chance, space["validation"]["samples"])
    space["execution"] = {}
    _some(chance, space["execution"], EXECUTION, 0.15)
    space["sweep"] = [_group(chance, site, folder, search) for _ in range(chance.choice([1, 1, 1, 2]))]
    if chance.random() < 0.4:
        _spoil(chance, space)
    path = folder / "space.yaml"
    flow = chance.choice([None, True, False])
    path.write_text(yaml.safe_dump(space, default_flow_style=flow, sort_keys=False), encoding="utf-8")
    return space, path


def _search(chance: random.Random, validation: int) -> dict[str, Any]:
    search: dict[str, Any] = {}
    if chance.random() < 0.3:
        search = {"algorithm": chance.choice(["random", "optuna"]), "num_samples": chance.choice([1, 2, 3])}
        search["seed"] = chance.choice([0, 5])
    if chance.random() < 0.05:
        search["scheduler"] = "asha"
    if not validation:
        search["metric"] = "output_error_calibration"
    elif chance.random() < 0.2:
        search["metric"] = chance.choice(["validation_perplexity", "output_error_validation"])
    if chance.random() < 0.1:
        search["compare_within"] = chance.choice([["model"], ["criterion", "recovery"], ["seed"]])
    return search


def _group(chance: random.Random, site: Site, folder: Path, search: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = {"recovery": chance.choice(["none"] * 5 + ["reconstruct"] * 9 + ["retrain"])}
    group["criterion"] = chance.choice(GOOD["criterion"])
    if chance.random() < 0.05:
        group["criterion"] = f"file:{site.masks}"
    elif chance.random() < 0.1:
        group["criterion"] = f"{_own_module(chance, folder)}:score"
    if chance.random() < 0.75 or "pattern" not in group:
        group["sparsity"] = chance.choice(GOOD["sparsity"])
    if chance.random() < 0.25:
        group["pattern"] = chance.choice(GOOD["pattern"])
        if group["pattern"] != "unstructured":
            group.pop("sparsity")
    _some(
        chance, group, {name: GOOD[name] for name in MASK if name not in group and name != "sparsity"}, 0.12
    )
    if group["recovery"] != "none":
        fields = {name: GOOD[name] for name in UNIT if name != "granularity"}
        if group["recovery"] == "retrain":
            fields |= RETRAINED
        else:
            group["granularity"] = chance.choice(GOOD["granularity"])
        if group.get("optimizer") != "exact":
            group["learning_rate"] = chance.choice(GOOD["learning_rate"])
        _some(chance, group, fields, 0.18)
    for name in list(group):
        draw = chance.random()
        if draw < 0.12 and name in GOOD:
            group[name] = [group[name], chance.choice(GOOD[name])]
        elif draw < 0.25 and name == "learning_rate" and search.get("algorithm"):
            group[name] = {"loguniform": [1e-4, 0.1]}
        elif draw < 0.2 and name in GOOD and search.get("algorithm"):
            group[name] = {"choice": [group[name], chance.choice(GOOD[name])]}
    return group


def _own_module(chance: random.Random, folder: Path) -> str:
    """A criterion of the user's own, in the current folder; some are none."""
    name = f"own_{chance.randrange(10**9)}"
    body = chance.choice(OWN_MODULES)
    (folder / f"{name}.py").write_text(f"def score(weight, statistics):\n    return {body}\n", "utf-8")
    return name


def _some(chance: random.Random, holder: dict[str, Any], fields: dict[str, Any], share: float) -> None:
    for name, values in fields.items():
        if chance.random() < share:
            holder[name] = chance.choice(values)


def _spoil(chance: random.Random, space: dict[str, Any]) -> None:
    """One value or two that are wrong, or nearly."""
    holders = [*space["sweep"], space["calibration"], space["search"], space["execution"], space]
    for _ in range(chance.choice([1, 1, 2])):
        holder = chance.choice(holders)
        names = [name for name in NEARLY if name in holder]
        if names and chance.random() < 0.5:
            name = chance.choice(names)
            holder[name] = chance.choice(NEARLY[name])
        elif chance.random() < 0.3:
            known = {**GOOD, **RETRAINED, **NEARLY, **CALIBRATION, **EXECUTION}
            name = chance.choice(list(known))
            holder[name] = chance.choice(known[name])
        elif holder is not space:
            holder[chance.choice([*holder, "x"])] = odd_value(chance)
        else:
            change_data(chance, space, 1)


def typed_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """One in eight has the machine measured, which takes seconds."""
    _, path = typed_space(chance, site, folder)
    probe = [] if chance.random() < 0.125 else ["--no-probe"]
    return Case(["plan", str(path), "--storage", str(folder / "results"), *probe])


LINES = (
    "x: !!python/object/apply:os.system ['touch pwned']",
    "x: !!python/name:os.system",
    "x: !!python/object/new:subprocess.Popen [[touch, pwned]]",
    "!!python/object/apply:os.system ['touch pwned']",
    "x: !!binary aGVsbG8=",
    "x: !!set {a, b}",
    "x: !!timestamp 2001-12-14",
    "x: !local 5",
    "x: !!int 'abc'",
    "x: !!float [1]",
    "x: &a [*a]",
    "x: &a {b: *a}",
    "x: *nothing",
    "<<: {name: other}",
    "<<: *nothing",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "? !!binary aGVs\n: c",
    "name: twice",
    "\tname: tab",
    "--- \nname: second",
    "...",
    "%YAML 9.9\n---",
    "%TAG ! tag:x,2000:\n---",
    'name: "\\ud800"',
    'name: "\\x00"',
    'name: "\\U0010ffff"',
    "name: \u2028\u2029\x85",
    "name: |\n  a\n  b",
    "name: >-\n  folded",
    "# only a remark \u202e",
    "calibration: null",
    "model: []",
    "sweep: {}",
    "sweep: 5",
    "search: [1]",
    "evaluation: {perplexity: 3}",
    "evaluation: 3",
    "evaluation: [3]",
    "1: 2",
    "null: 2",
    "true: 2",
    "'': 2",
    ".nan: 2",
)
VALUES = (
    "9" * 5000,
    "-" + "9" * 30,
    ".nan",
    "-.inf",
    "1e999999",
    "0o17",
    "0x1F",
    "1_000",
    "12:30:45",
    "2001-01-01",
    "yes",
    "'it''s'",
    '"\\u0000"',
    "!!str 5",
    "!!null ''",
    "!!bool maybe",
    "&anchor 0.5",
    "{loguniform: [1e-9, 1]}",
    "[[[[[[[[]]]]]]]]",
    "{a: {a: {a: {a: 1}}}}",
    "|",
    "@x",
    "`x`",
    "%x",
    "*",
    "&",
    "!",
)


def yaml_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """YAML text: a right one that was bent, or what is meant to do harm."""
    path = folder / "space.yaml"
    if chance.random() < 0.5:
        text = yaml.safe_dump(small_space(site), sort_keys=False)
    else:
        text = typed_space(chance, site, folder)[1].read_text(encoding="utf-8")
    how = chance.random()
    content = text.encode()
    if how < 0.3:
        content = change_bytes(chance, content, chance.choice([1, 1, 2, 5]))
    elif how < 0.75:
        for _ in range(chance.choice([1, 1, 2, 3])):
            text = _changed_line(chance, text)
        content = text.encode("utf-8", "surrogatepass")
    elif how < 0.85:
        content = text.encode(chance.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig", "cp037"]), "replace")
    else:
        content = _harmful(chance, text).encode()
    path.write_bytes(content)
    return Case(["plan", str(path), "--storage", str(folder / "results")])


def _changed_line(chance: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    place = chance.randrange(len(lines))
    how = chance.randrange(8)
    if how == 7:
        lines.insert(place, chance.choice(["", "  # a remark", "# \u202e \U0001f600", "\r"]))
    elif how == 0:
        lines.insert(place, lines[place])
    elif how == 1:
        del lines[place]
    elif how == 2:
        lines[place] = " " * chance.randint(1, 5) + lines[place]
    elif how == 3:
        lines[place] = lines[place].lstrip()
    elif how == 4:
        lines.insert(place, chance.choice(LINES))
    elif how == 5:
        key, colon, _ = lines[place].partition(":")
        lines[place] = f"{key}{colon} {chance.choice(VALUES)}"
    else:
        other = chance.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    return "\n".join(lines) + "\n"


def _harmful(chance: random.Random, text: str) -> str:
    """Bombs: aliases of aliases, depth, length, breadth, more trials than anyone can run."""
    number = chance.choice([5, 30, 1000, 100_000])
    levels = chance.choice([3, 8, 40])
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    ways = [
        "\n".join(bomb) + "\n" + text,
        "x: " + "[" * number,
        "x: " + "[" * number + "]" * number,
        "x: " + "{a: " * number + "1" + "}" * number,
        "\n".join(" " * k + "a:" for k in range(min(number, 1000))),
        "- " * number,
        "? " * number,
        text + "x: " + "y" * (number * 20),
        text + "".join(f"k{k}: 1\n" for k in range(min(number, 60_000))),
        text.replace("sweep:", f"sweep: [{', '.join(['{recovery: none}'] * min(number, 20_000))}]\nold:"),
        text.replace("0.5", "[" + ", ".join(f"0.{k}" for k in range(1, min(number, 60_000))) + "]"),
        text.replace("seed: 0", f"seed: [{', '.join(map(str, range(min(number, 20_000))))}]"),
        text.replace("num_samples: 4", "num_samples: 2147483647"),
        text + "\x00" * number,
        "&a " * number + "x",
        "!" * number,
        "'" + "''" * number,
        "\n" * number,
    ]
    return chance.choice(ways)
