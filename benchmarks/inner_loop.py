"""How near the training of units comes to what a GPU can do: the product's own loop beside a plain one.

    python benchmarks/inner_loop.py                     a block of Llama 3.1 8B's shape, 2048 tokens a sample
    python benchmarks/inner_loop.py --shape embedded    the embedded model's, where launches are what costs

Prints one JSON line per figure. `share` is of the bfloat16 matrix product measured in the same run, counting six
operations a weight and token (forward, and twice back) and causal attention; `true_share` counts the products that are
really taken. The plain loop is the common one: float32 weights under float16 autocast, masks multiplied in at every
pass, a gradient scaler, AdamW as it comes, samples that lie on the GPU already.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from raysweep.config.trial import Trial
from raysweep.model.shard import ModelShard
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.statistics import InputStatistics
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.boundaries import INPUT
from raysweep.reconstruction.device_stage import DeviceStage
from raysweep.reconstruction.measures import CALIBRATION
from raysweep.reconstruction.objectives import objective_of
from raysweep.reconstruction.placement import DEVICE, Placement
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import units_in
from raysweep.reconstruction.stage import Stage, UnitTraining

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tokens": 2048,
        "samples": 32,
        "batches": (2, 8),
    },
    "embedded": {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tokens": 128,
        "samples": 48,
        "batches": (2,),
    },
}


def report(figure: str, **values: Any) -> None:
    print(json.dumps({"figure": figure} | values), flush=True)


def seconds_of(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def matrix_peak(size: int = 8192) -> float:
    """FLOP a second of a bfloat16 matrix product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    return 20 * 2 * size**3 / seconds_of(lambda: [a @ b for _ in range(20)])


def make_range(shape: dict[str, Any], placement: Placement | None = None) -> BlockRange:
    """One block with random weights and a dense pass over random activations."""
    sizes = {name: value for name, value in shape.items() if name not in ("tokens", "samples", "batches")}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=256, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    blocks = BlockRange(ModelShard.whole(model), placement=placement)
    blocks.compiles = True
    for rows in batches(shape["samples"], shape["tokens"], blocks.device):
        size = (rows.stop - rows.start, shape["tokens"], shape["hidden_size"])
        blocks.dense_pass(CALIBRATION, shape["samples"], rows, torch.randn(size, device="cuda").bfloat16())
    return blocks


def stage_of(
    kind: type[Stage] | type[DeviceStage], blocks: BlockRange, granularity: str, place: int, **fields: Any
) -> Stage | DeviceStage:
    """A unit of a pruned trial, ready to be trained."""
    trial = Trial(
        recovery="reconstruct",
        criterion="magnitude",
        sparsity=0.5,
        granularity=granularity,
        learning_rate=1e-4,
        **fields,
    )
    blocks.release("trial")
    blocks.begin("trial")
    blocks.prune("trial", MaskRecipe.of(trial), blocks.blocks[0])
    unit = units_in(blocks, granularity)[place]
    return kind(blocks, "trial", trial, unit, objective_of(blocks, "trial", trial, unit))


def six_per_weight(stage: UnitTraining, shape: dict[str, Any], batch: int) -> float:
    """Operations of a step by the common count: 6 a weight and token, and causal attention where the unit has it."""
    weights = sum(linear.weight_OI.numel() for linear in stage.unit.linears.values())
    attention = stage.unit.linear is None and stage.unit.half != "mlp"
    each = 6 * weights + (6 * shape["tokens"] * shape["hidden_size"] if attention else 0)
    return float(each * batch * shape["tokens"])


def measure(
    blocks: BlockRange, shape: dict[str, Any], peak: float, granularity: str, place: int, **fields: Any
) -> float:
    """Milliseconds of a step of the product's own loop, recording and reading ahead included; reports them."""
    stage_of(DeviceStage, blocks, granularity, place, **fields).train()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stage = stage_of(DeviceStage, blocks, granularity, place, **fields)
    seconds = seconds_of(stage.train) / len(stage.steps)
    batch = fields["batch_size"]
    report(
        f"{stage.unit.name if stage.unit.half or stage.unit.linear else 'block'}, {fields.get('trainable', 'all')}",
        tokens=batch * shape["tokens"],
        ms=round(1e3 * seconds, 3),
        share=round(six_per_weight(stage, shape, batch) / seconds / peak, 3),
        true_share=round(stage.objective.flops(batch) / seconds / peak, 3),
        gib=round((torch.cuda.max_memory_allocated() - before) / 2**30, 2),
    )
    return 1e3 * seconds


def plain_loop(
    blocks: BlockRange, shape: dict[str, Any], batch: int, attention: str, foreach: bool, steps: int = 10
) -> float:
    """Milliseconds of a step of the common loop on the same block."""
    block = blocks.blocks[0]
    masks = {
        f"{name}.weight": (torch.rand_like(linear.weight_OI, dtype=torch.float32) < 0.5).float()
        for name, linear in block.linears.items()
    }
    parameters = {
        f"{block.prefix}.{name}": nn.Parameter(p.detach().float())
        for name, p in block.module.named_parameters()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, weight_decay=0.0, foreach=foreach)
    scaler = torch.amp.GradScaler("cuda")
    boundaries = blocks.texts[CALIBRATION].activations
    given, target = (boundaries.get(INPUT, place)[:batch].to("cuda").float() for place in (0, 1))
    known = block.arguments
    if attention == "eager":  # which takes causality from a mask alone, made in the dtype of the model
        causal_TT = torch.full([shape["tokens"]] * 2, torch.finfo(torch.float32).min, device="cuda").triu(1)
        mask_B1TT = causal_TT.expand(batch, 1, -1, -1)
        block.arguments = lambda samples, tokens: (
            known(samples, tokens)[0],
            {**known(samples, tokens)[1], "attention_mask": mask_B1TT},
        )
    block.module.self_attn.config._attn_implementation = attention

    def step() -> None:
        masked = {name: p * masks[name] if name in masks else p for name, p in parameters.items()}
        with torch.autocast("cuda", torch.float16):
            output = block.run(given, instead=masked)
            loss = functional.mse_loss(output.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    try:
        for _ in range(3):
            step()
        return 1e3 * seconds_of(lambda: [step() for _ in range(steps)]) / steps
    finally:
        block.arguments = known
        block.module.self_attn.config._attn_implementation = "sdpa"


def profile(blocks: BlockRange, granularity: str, **fields: Any) -> None:
    """What the GPU does in a step of the block: the kernels that take longest, by kind."""
    stage = stage_of(DeviceStage, blocks, granularity, 0, **fields)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        stage.train()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    for kernel in kernels[:25]:
        report(
            kernel.key[:110],
            ms=round(kernel.self_device_time_total / 1e3 / len(stage.steps), 3),
            calls=round(kernel.count / len(stage.steps), 1),
            share=round(kernel.self_device_time_total / total, 3),
        )


def statistics_and_dense(blocks: BlockRange, shape: dict[str, Any], peak: float) -> None:
    rows, hidden = 16384, shape["hidden_size"]
    for inputs in (hidden, shape["intermediate_size"]):
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        statistics = InputStatistics.empty(inputs, x.device)
        statistics.add(x)
        seconds = seconds_of(lambda x=x, s=statistics: [s.add(x) for _ in range(5)]) / 5
        flops = 2 * rows * inputs * inputs
        report(
            f"Gram matrix of {inputs} inputs",
            ms=round(1e3 * seconds, 2),
            share=round(flops / seconds / peak, 3),
        )
    block = blocks.blocks[0]
    x = torch.randn(rows // shape["tokens"], shape["tokens"], hidden, device="cuda").bfloat16()
    weights = sum(linear.weight_OI.numel() for linear in block.linears.values())
    with torch.no_grad():
        block.run(x)
        seconds = seconds_of(lambda: [block.run(x) for _ in range(5)]) / 5
    flops = (2 * weights + 2 * shape["tokens"] * hidden) * rows
    report("dense block", ms=round(1e3 * seconds, 2), share=round(flops / seconds / peak, 3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--quick", action="store_true", help="the block alone")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step of the block, no more")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    peak = matrix_peak()
    report("bfloat16 matrix product", device=torch.cuda.get_device_name(), tflops=round(peak / 1e12))
    blocks = make_range(shape)
    if options.profile:
        stage_of(DeviceStage, blocks, "block", 0, batch_size=shape["batches"][0]).train()
        profile(blocks, "block", batch_size=shape["batches"][0])
        return
    for batch in shape["batches"]:
        steps: dict[str, Any] = {"batch_size": batch, "epochs": max(1, 32 * batch // shape["samples"])}
        own = measure(blocks, shape, peak, "block", 0, **steps)
        blocks.compiles = False
        report("the same, not compiled")
        measure(blocks, shape, peak, "block", 0, **steps)
        blocks.compiles = True
        for attention, foreach in (("sdpa", True), ("eager", True), ("eager", False)):
            plain = plain_loop(blocks, shape, batch, attention, foreach)
            report(
                f"plain loop, block, attention {attention}, AdamW {'foreach' if foreach else 'one by one'}",
                tokens=batch * shape["tokens"],
                ms=round(plain, 3),
                ratio=round(plain / own, 2),
            )
        if options.quick:
            continue
        measure(blocks, shape, peak, "block", 0, trainable="weights", **steps)
        for place in (0, 1):
            for trainable in ("all", "weights"):
                measure(blocks, shape, peak, "subblock", place, trainable=trainable, **steps)
        for place in (0, 1, 6):
            measure(blocks, shape, peak, "matrix", place, **steps)
    blocks = make_range(shape, Placement(activations=DEVICE))
    for batch in shape["batches"]:
        report("the same with activations on the GPU")
        measure(
            blocks, shape, peak, "block", 0, batch_size=batch, epochs=max(1, 32 * batch // shape["samples"])
        )
    if options.shape == "8b" and not options.quick:
        statistics_and_dense(blocks, shape, peak)


if __name__ == "__main__":
    main()
