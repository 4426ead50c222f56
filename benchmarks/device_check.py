"""A sweep on this machine's accelerators, through Ray and Tune, beside the same sweep on its CPU cores.

    python benchmarks/device_check.py [--space SPACE.yaml] [--output DIR]      default space: the quickstart

Prints one JSON line per comparison: the largest relative difference of perplexities between CPU and device, in float32
and in bfloat16, and what the number format itself does on the CPU; whether removed weights are exactly zero, and the
seconds of both. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from raysweep.config.trial import Trial

DTYPES = ("float32", "bfloat16")
QUALITY = ["perplexity", "validation_perplexity", "pruned_perplexity"]
KEY = [*(name for name in Trial.model_fields), "sparsity_by_name"]


def run(
    file: str, name: str, storage: Path, overrides: list[str], **options: Any
) -> tuple[pd.DataFrame, float]:
    """The rows of a space with `overrides`, and its seconds."""
    from raysweep.config.space import SearchSpace
    from raysweep.config.spaces import resolve_space
    from raysweep.launching.launch import launch

    space = SearchSpace.from_yaml(resolve_space(file), overrides)
    start = time.perf_counter()
    rows = launch(space, storage=storage, name=name, **options)
    return rows, time.perf_counter() - start


def cpu_reference(file: str, dtype: str, storage: Path) -> pd.DataFrame:
    """The same sweep by a process that sees no accelerator."""
    from raysweep.results.reader import load_results

    start = time.perf_counter()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--space", file, "--cpu-reference", dtype, "--output", str(storage)]
    subprocess.run(command, env=environment, check=True)
    report(f"{file} on 8 CPU threads in {dtype}, in process", seconds=round(time.perf_counter() - start, 1))
    return load_results(f"cpu-{dtype}", storage)


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def keyed(rows: pd.DataFrame) -> pd.DataFrame:
    """By the fields of the trial, whose identity also holds the number format."""
    labels = rows[KEY].apply(lambda fields: " ".join(map(str, fields.dropna())), axis=1)
    return rows.set_index(labels).sort_index()


def compare(name: str, rows: pd.DataFrame, reference: pd.DataFrame) -> None:
    """Largest relative difference over all trials and measures, and the exactness of the zeros."""
    left, right = keyed(rows), keyed(reference).reindex(keyed(rows).index)
    differences = ((left[QUALITY] - right[QUALITY]) / right[QUALITY]).abs()
    worst = differences.max(axis=1).idxmax()
    report(
        name,
        largest_relative_difference=float(differences.max().max()),
        median_relative_difference=float(differences.max(axis=1).median()),
        where=worst,
        zeros_equal=bool((left.realized_sparsity == right.realized_sparsity).all()),
        statuses=rows.status.value_counts().to_dict(),
        device=rows.device_name.iloc[0],
        device_seconds=round(float(rows.device_seconds.sum()), 1),
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", default="quickstart", help="a search space, by path or name")
    parser.add_argument("--output", type=Path, help="keep the rows as Parquet in this folder")
    parser.add_argument("--cpu-reference", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_reference:
        run(
            options.space,
            f"cpu-{options.cpu_reference}",
            options.output,
            [
                f"model.dtype={options.cpu_reference}",
                "execution.threads_per_worker=8",
                "execution.shards=1",
            ],
            in_process=True,
        )
        return
    if not torch.cuda.is_available():
        parser.error("no accelerator that torch can use")
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        cpu = {dtype: cpu_reference(options.space, dtype, storage) for dtype in DTYPES}
        compare("bfloat16 against float32, both on the CPU", cpu["bfloat16"], cpu["float32"])
        for dtype in DTYPES:
            rows, seconds = run(options.space, dtype, storage, [f"model.dtype={dtype}"], address="local")
            report(
                f"{options.space} on the device in {dtype}, over Ray",
                seconds=round(seconds, 1),
                shards=int(rows.shards.iloc[0]),
            )
            compare(f"{dtype} on the device against {dtype} on the CPU", rows, cpu[dtype])
            if options.output:
                rows.to_parquet(options.output / f"{dtype}.parquet")
                cpu[dtype].to_parquet(options.output / f"cpu-{dtype}.parquet")


if __name__ == "__main__":
    main()
