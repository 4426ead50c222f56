"""A host that allows 4 GiB sweeps 2 GiB of weights with over 3 GiB of activations: what has no room waits on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig

from raysweep.model.builtin import resolve_model_path
from raysweep.results.reader import load_results

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

GIB = 1 << 30
ALLOWED = 4 * GIB
ROOM = 32 * GIB  # for the model, activations, Gram matrices, and weights and masks of trials
HIDDEN, FFN, HEADS, BLOCKS, BLOCKS_A_FILE = (
    512,
    512,
    8,
    342,
    18,
)  # narrow: arithmetic is cheap beside the bytes
SAMPLES, TOKENS = 18, 128
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
ROOT = Path(__file__).resolve().parents[2]


class Group:
    """A control group of its own, of version 1 or 2, whose processes together have little memory, files' pages and all.

    folder: of the group
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _is_new(self) -> bool:
        return (self.folder / "memory.max").exists()

    def limit(self, nbytes: int) -> None:
        """Raises OSError where that cannot be done."""
        self._set("memory.max" if self._is_new else "memory.limit_in_bytes", nbytes)
        with suppress(OSError):  # where the system counts no swap there is none to flee to
            if self._is_new:
                self._set("memory.swap.max", 0)
            else:
                self._set("memory.memsw.limit_in_bytes", nbytes)

    def _set(self, name: str, value: int) -> None:
        with open(
            self.folder / name, "r+"
        ) as file:  # what is not there is not made: this may be a plain folder
            file.write(str(value))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`raysweep` with these words, in the group, to its end."""
        enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs")]
        command = [*enter, sys.executable, "-m", "raysweep", *words]
        environment = os.environ | {"COLUMNS": "120"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    @property
    def peak(self) -> int:
        """Bytes at most; pages of files count, until the system takes them back."""
        return int(
            (self.folder / ("memory.peak" if self._is_new else "memory.max_usage_in_bytes")).read_text()
        )

    @property
    def killed(self) -> int:
        """Processes that ended because nothing could be taken back."""
        file = self.folder / ("memory.events" if self._is_new else "memory.oom_control")
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts["oom_kill"])

    def remove(self) -> None:
        """Once its last process has ended."""
        for _ in range(50):
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.2)
        self.folder.rmdir()


@pytest.fixture
def group() -> Iterator[Group]:
    """With 4 GiB."""
    made = next(filter(None, map(_group_in, _places())), None)
    if made is None:
        pytest.skip(
            "no control group that limits memory can be made here (it takes root, outside of containers)"
        )
    yield made
    made.remove()


def _group_in(place: Path) -> Group | None:
    """With 4 GiB; None where the place lets none be made, or it would not say what happened in it."""
    made = Group(place / f"raysweep-test-{os.getpid()}")
    try:
        made.folder.mkdir()
    except OSError:
        return None
    try:
        made.limit(ALLOWED)
        _ = made.peak, made.killed
        return made
    except OSError:
        made.remove()
        return None


def _places() -> Iterator[Path]:
    """Where a group may be made: within this process's own, or further up, where version 2 allows it at all."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = Path("/sys/fs/cgroup", controllers)
            own = mount / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


@pytest.fixture
def on_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk: in memory, files would take what they are to save."""
    for place in (tmp_path, Path("/var/tmp"), ROOT):
        if _file_system(place) not in IN_MEMORY and shutil.disk_usage(place).free >= ROOM:
            folder = place / f"raysweep-test-{os.getpid()}"
            folder.mkdir()
            yield folder
            shutil.rmtree(folder)
            return
    pytest.skip(f"no folder on a disk with {ROOM // GIB} GiB free")


def _file_system(folder: Path) -> str:
    """The kind of the one that a folder lies on, by the last mount of the longest path."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(len(Path(where).parts), kind) for where, kind in mounts if folder.is_relative_to(where)]
    return max(around, key=lambda pair: pair[0])[1]


def make_model(folder: Path) -> int:
    """A Llama of random weights in several files, of which no page stays in memory; the bytes of its blocks."""
    tokenizer = Path(resolve_model_path("builtin:pystdlib"))
    config = LlamaConfig(
        vocab_size=json.loads((tokenizer / "config.json").read_text())["vocab_size"],
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    index, generator = dict[str, str](), torch.Generator().manual_seed(0)

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5

    def write(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        with open(
            folder / name, "rb"
        ) as file:  # or pages that this process has paid for would serve the sweep
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    ends = {
        "model.embed_tokens": matrix(config.vocab_size, HIDDEN),
        "lm_head": matrix(config.vocab_size, HIDDEN),
    }
    write(
        "ends.safetensors", {f"{n}.weight": t for n, t in (ends | {"model.norm": torch.ones(HIDDEN)}).items()}
    )
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    nbytes = 0
    for first in range(0, BLOCKS, BLOCKS_A_FILE):
        tensors = {}
        for block in range(first, min(first + BLOCKS_A_FILE, BLOCKS)):
            prefix = f"model.layers.{block}"
            tensors |= {f"{prefix}.{name}.weight": matrix(*size) for name, size in sizes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{prefix}.{name}.weight": torch.ones(HIDDEN) for name in norms}
        nbytes += write(f"blocks-{first:03}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return nbytes


def space_of(model: Path, scratch: Path) -> dict[str, Any]:
    """Where weights, activations and statistics lie is left to the plan."""
    text = {"dataset": "builtin:pystdlib", "sequence_length": TOKENS}
    pruned = {"criterion": "wanda", "sparsity": 0.5}
    return {
        "name": "small",
        "model": {"path": str(model), "dtype": "float32"},
        "calibration": text | {"num_samples": SAMPLES},
        "validation": {"samples": 2},
        "evaluation": {"perplexity": [text | {"name": "test", "split": "test", "max_windows": 4}]},
        "sweep": [
            pruned | {"recovery": "none"},
            pruned
            | {"recovery": "reconstruct", "granularity": "subblock", "learning_rate": 1e-4, "epochs": 1},
        ],
        "execution": {
            "keep": "none",
            "shards": 1,
            "threads_per_worker": min(4, len(os.sched_getaffinity(0))),
            "scratch": str(scratch),
        },
    }


@pytest.mark.parametrize("where", [["--in-process"], ["--address", "local"]], ids=["in_process", "over_ray"])
def test_4_gib_are_enough_for_2_of_weights_and_3_of_activations(group, on_disk, where):
    weights = make_model(on_disk / "model")
    activations = 4 * (2 * BLOCKS + 1) * SAMPLES * TOKENS * HIDDEN  # of calibration, at and within blocks
    assert weights >= 2 * GIB
    assert activations >= 3 * GIB
    scratch, storage = on_disk / "scratch", on_disk / "results"
    scratch.mkdir()
    assert _file_system(scratch) not in IN_MEMORY
    space = on_disk / "small.yaml"
    space.write_text(yaml.safe_dump(space_of(on_disk / "model", scratch)))

    planned = group.run("plan", str(space), "--storage", str(storage), "--no-probe", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["machine"]["memory_bytes"] == ALLOWED
    assert [model["activation_store"] for model in plan["models"]] == ["disk"]
    assert [model["host_bytes"] <= ALLOWED for model in plan["models"]] == [True]

    launched = group.run("launch", str(space), "--storage", str(storage), *where)
    assert launched.returncode == 0, launched.stderr
    assert group.killed == 0
    assert group.peak <= ALLOWED
    rows = load_results("small", storage)
    assert (rows.status == "finished").all()
    assert sorted(rows.recovery) == ["dense", "none", "reconstruct"]
    assert all(map(math.isfinite, rows.perplexity))
    held = json.loads((storage / "small" / "plan.json").read_text())["host"]
    assert held["measured"] <= held["planned"]
    assert not any(scratch.iterdir())  # files without names end with what lies in them
