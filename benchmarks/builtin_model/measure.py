"""Measures builtin:pystdlib: bits per byte on the test files beside xz, and what pruning costs.

python benchmarks/builtin_model/measure.py
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
from pathlib import Path

import pyarrow.parquet as pq
import torch
from corpus import PACKAGE
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW, STRIDE = 512, 256
EVALUATION_LENGTH, EVALUATION_WINDOWS = 256, 64  # the quickstart's evaluation
SPARSITIES = (0.5, 0.6, 0.7)
BATCH = 16


def xz_bits_per_byte(texts: list[bytes]) -> float:
    """What `xz -9e` needs for a list of streams, its container included."""
    compressed = sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts)
    return 8 * compressed / sum(len(text) for text in texts)


@torch.no_grad()
def target_nats(model: nn.Module, window_BT: Tensor) -> Tensor:
    """Loss in nats of every token of the windows but the first, (B, T - 1)."""
    logits = model(window_BT[:, :-1]).logits
    target_BT = window_BT[:, 1:]
    nats = functional.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none")
    return nats.view_as(target_BT)


def file_nats(model: nn.Module, tokens: list[int], end: int) -> float:
    """Nats of a file: the end-of-text token first, windows of 512 predictions, each token predicted once.

    A window after the first overlaps the one before by 256 tokens, so that all but the first 512 tokens of a
    file have at least 256 tokens of context.
    """
    stream, total = torch.tensor([end, *tokens]), 0.0
    first = 0
    while first < len(tokens):
        begin = max(0, min(first - STRIDE, len(stream) - WINDOW - 1)) if first else 0
        window = stream[begin : begin + WINDOW + 1]
        total += float(target_nats(model, window[None])[0, first - begin :].double().sum())
        first = begin + len(window) - 1
    return total


def model_bits_per_byte(model: nn.Module, texts: list[str]) -> float:
    """Total nats of all files over ln 2 over their bytes."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "model")
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    nats = sum(file_nats(model, tokens, tokenizer.eos_token_id) for tokens in encoded)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def evaluation_windows(texts: list[str]) -> Tensor:
    """The first windows of the test text: files joined by blank lines, tokenized once."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "model")
    tokens = tokenizer("\n\n".join(texts), verbose=False).input_ids
    count = EVALUATION_LENGTH * EVALUATION_WINDOWS
    return torch.tensor(tokens[:count]).view(EVALUATION_WINDOWS, EVALUATION_LENGTH)


def perplexity(model: nn.Module, window_BT: Tensor) -> float:
    """exp of the mean loss over all targets of the windows."""
    total = sum(float(target_nats(model, part).double().sum()) for part in window_BT.split(BATCH))
    return math.exp(total / window_BT[:, 1:].numel())


def pruned_by_magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose block linears lost the smallest weights of every output row."""
    pruned = copy.deepcopy(model)
    for module in pruned.model.layers.modules():
        if isinstance(module, nn.Linear):
            removed = int(module.in_features * sparsity)
            smallest = module.weight.abs().argsort(dim=1, stable=True)[:, :removed]
            module.weight.data.scatter_(1, smallest, 0.0)
    return pruned


def figures() -> dict[str, object]:
    """All figures of the README."""
    table = pq.read_table(PACKAGE / "text" / "test.parquet").to_pydict()
    texts = table["text"]
    data = [text.encode() for text in texts]
    model = AutoModelForCausalLM.from_pretrained(PACKAGE / "model", dtype=torch.float32).eval()
    window_BT = evaluation_windows(texts)
    return {
        "test_files": len(texts),
        "test_bytes": sum(map(len, data)),
        "model_bits_per_byte": model_bits_per_byte(model, texts),
        "xz_bits_per_byte_one_stream": xz_bits_per_byte([b"".join(data)]),
        "xz_bits_per_byte_file_by_file": xz_bits_per_byte(data),
        "perplexity_dense": perplexity(model, window_BT),
        "perplexity_magnitude_row": {
            str(sparsity): perplexity(pruned_by_magnitude(model, sparsity), window_BT)
            for sparsity in SPARSITIES
        },
    }


def main() -> None:
    """Prints the figures and files them beside this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    document = json.dumps(figures(), indent=2) + "\n"
    (Path(__file__).parent / "figures.json").write_text(document)
    print(document, end="")


if __name__ == "__main__":
    main()
