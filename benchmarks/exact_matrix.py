"""The exact recovery of a matrix beside one epoch of AdamW of the product's own loop, at the size of an 8B model.

    python benchmarks/exact_matrix.py              4096 x 4096, 128 x 2048 tokens; needs an NVIDIA GPU
    python benchmarks/exact_matrix.py --small      512 x 512, 16 x 128 tokens, to try the script on a CPU

Prints one JSON line per figure. Both start at the same Wanda mask of 60 %, and both are timed in one run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from raysweep.config.trial import Trial
from raysweep.model.shard import ModelShard
from raysweep.pruning.recipe import MaskRecipe
from raysweep.pruning.statistics import InputStatistics
from raysweep.reconstruction.activations import batches
from raysweep.reconstruction.exact import DOUBLE, Precision, Quadratic, masked_least_squares
from raysweep.reconstruction.measures import CALIBRATION, UnitResult
from raysweep.reconstruction.range import BlockRange
from raysweep.reconstruction.recovery import recover_unit

UNIT = "0.self_attn.q_proj"
LINEAR = f"model.layers.{UNIT}"
VOCABULARY = 4096
BASE = {"recovery": "reconstruct", "criterion": "wanda", "sparsity": 0.6, "granularity": "matrix"}
EXACT = Trial(**BASE, optimizer="exact")
EPOCH = Trial(**BASE, learning_rate=1.0e-4, epochs=1, batch_size=8)
EPOCHS = Trial(**BASE, learning_rate=1.0e-3, epochs=50, batch_size=8)


def one_block(hidden: int, dtype: torch.dtype, device: str) -> ModelShard:
    """A Llama of one block whose embeddings are correlated: the k-th direction has a variance in proportion to 1 / k.

    Assumption: about as trained models do. A flatter spectrum takes fewer iterations, a steeper one more.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    turned, _ = torch.linalg.qr(torch.randn(hidden, hidden))
    spread = torch.arange(1, hidden + 1).rsqrt()
    model.model.embed_tokens.weight.copy_(torch.randn(VOCABULARY, hidden) * spread @ turned)
    model.model.layers[0].input_layernorm.weight.copy_(torch.logspace(-1, 1, hidden))
    return ModelShard.whole(model.to(device=device, dtype=dtype))


def pass_text(blocks: BlockRange, samples: int, tokens: int) -> None:
    ids_ST = torch.randint(0, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(0))
    for rows in batches(samples, tokens, blocks.device):
        blocks.dense_pass(CALIBRATION, samples, rows, blocks.shard.embed(ids_ST[rows]))


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Of the second of two calls: the first one compiles, allocates and fills what trials share."""
    call()
    start = _now(device)
    value = call()
    return _now(device) - start, value


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def recovered(blocks: BlockRange, trial: Trial) -> UnitResult:
    blocks.release("trial")
    blocks.begin("trial")
    blocks.prune("trial", MaskRecipe.of(trial), blocks.blocks[0])
    result = recover_unit(blocks, "trial", trial, UNIT)
    assert result is not None
    return result


def gram_seconds(blocks: BlockRange) -> float:
    """Of summing up the statistics over all tokens, inputs lying on the device."""
    inputs_STI = next(iter(blocks.knowledge.get(("linear_inputs", CALIBRATION, 0), dict).values()))
    piece_NI = inputs_STI[:8].flatten(0, 1).to(blocks.device)
    statistics = InputStatistics.empty(piece_NI.shape[1], blocks.device)
    elapsed, _ = seconds(lambda: statistics.add(piece_NI), blocks.device)
    return elapsed * inputs_STI.shape[0] / 8


def float64_loss(blocks: BlockRange) -> float:
    """Of the optimum, solved to the last bits from the same Gram matrix."""
    block = blocks.blocks[0]
    linear = block.linears[LINEAR]
    gram_II = blocks.statistics.of(CALIBRATION, linear, block).gram_II.double()
    layer = blocks.pruner.layer(MaskRecipe.of(EXACT), block, linear)
    assert layer is not None
    change_OI = layer.masked(linear.weight_OI).double() - linear.weight_OI.double()
    for _ in range(3):  # each goes on where the last one ended, with a residual of its own
        change_OI = masked_least_squares(Quadratic(gram_II), layer.mask_OI, change_OI, DOUBLE).change_OI
    return Quadratic(gram_II).error(change_OI)


def report(figure: str, value: float, **more: Any) -> None:
    print(json.dumps({"figure": figure, "value": value} | more), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small matrix, to try the script")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("no accelerator that torch can use; --small runs on a CPU")
    hidden, samples, tokens = (512, 16, 128) if options.small else (4096, 128, 2048)
    for dtype in (torch.float32, torch.bfloat16):
        blocks = BlockRange(one_block(hidden, dtype, device), knowledge_bytes=1 << 36)
        blocks.keep_halves = False
        pass_text(blocks, samples, tokens)
        shape = f"{hidden} x {hidden}, {samples} x {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        epoch_s, epoch = seconds(lambda blocks=blocks: recovered(blocks, EPOCH), blocks.device)
        exact_s, exact = seconds(lambda blocks=blocks: recovered(blocks, EXACT), blocks.device)
        prune_s, _ = seconds(lambda blocks=blocks: _only_prune(blocks), blocks.device)
        gram_s = gram_seconds(blocks)
        common = {
            "shape": shape,
            "iterations": exact.steps,
            "precision": str(Precision.of(blocks.device).dtype).removeprefix("torch."),
        }
        report(
            "exact over one epoch of AdamW",
            round((exact_s - prune_s) / (epoch_s - prune_s), 3),
            exact_s=round(exact_s - prune_s, 4),
            epoch_s=round(epoch_s - prune_s, 4),
            **common,
        )
        report(
            "exact with its Gram matrix formed, over one epoch",
            round((exact_s - prune_s + gram_s) / (epoch_s - prune_s), 3),
            gram_s=round(gram_s, 4),
            shape=shape,
        )
        best = float64_loss(blocks) / blocks.output_power(
            CALIBRATION, blocks.blocks[0], blocks.blocks[0].linears[LINEAR]
        )
        report(
            "error after exact over the float64 optimum, minus 1", exact.error_after / best - 1, shape=shape
        )
        report("error after exact over that before", exact.error_after / exact.error_before, shape=shape)
        report("error after one epoch over exact", epoch.error_after / exact.error_after, shape=shape)
        if options.small:
            report(
                "error after 50 epochs over exact", recovered(blocks, EPOCHS).error_after / exact.error_after
            )


def _only_prune(blocks: BlockRange) -> None:
    """What both have in common."""
    blocks.release("trial")
    blocks.begin("trial")
    blocks.prune("trial", MaskRecipe.of(EXACT), blocks.blocks[0])


if __name__ == "__main__":
    main()
