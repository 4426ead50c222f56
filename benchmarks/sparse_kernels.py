"""What 2:4 weights are worth on a GPU: a decoder block of Llama 3.1 8B's shape with dense and with sparse kernels.

    python benchmarks/sparse_kernels.py              needs an NVIDIA GPU from the Ampere generation on
    python benchmarks/sparse_kernels.py --rehearse   a small block on the CPU, dense in both places, to try the script

Needs torch and transformers alone. Prints one JSON line per figure: `ratio` is tokens a second with sparse kernels
over tokens a second with dense ones, of medians taken in turns in one run. `prefill` passes B x 2048 tokens through
the block. `decode` passes one token of each of B sequences: linears, norms and rotary angles, without the attention to
a context, which takes equally long with both and so lessens the ratio. `how`: eager, compiled (torch.compile), graph
(compiled and replayed as a CUDA graph, so that launches cost nothing). `searched`: the algorithm of cuSPARSELt that its
own search finds fastest for the batch, in place of its first. What cannot run is a line with its `error`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from raysweep.model.linears import block_linears
from raysweep.model.shard import ModelShard
from raysweep.model.sparse_kernels import BACKENDS, GROUP, KEPT, Backend, as_sparse, stored_bytes

# B samples, T tokens of a sample, N tokens of a batch, H hidden, O outputs, I inputs of a linear

TOKENS = 2048
PREFILL, DECODE = (1, 4, 16), (1, 16, 64, 256)
LINEAR_TOKENS = (1, 16, 256, 2048, 32768)
ROUNDS, WARM_UP, LEAST_SECONDS = 15, 3, 0.02
"""Rounds in which dense and sparse take turns, calls before them, and how long the calls of a round take at least."""
TOLERANCE = 0.02
"""Of the block's output in bfloat16: sums in another order."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Of a block and of what passes through it."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    tokens: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    linear_tokens: tuple[int, ...]


LLAMA_8B = Shape(4096, 14336, 32, 8, TOKENS, PREFILL, DECODE, LINEAR_TOKENS)
SMALL = Shape(64, 128, 4, 2, 16, (1, 2), (1, 2), (1, 16))


@dataclass(frozen=True)
class Variant:
    """How 2:4 weights are multiplied."""

    backend: Backend
    searched: bool = False

    def named(self) -> dict[str, Any]:
        return {"backend": self.backend} | ({"searched": True} if self.searched else {})


VARIANTS = (*(Variant(backend) for backend in BACKENDS), Variant("cusparselt", searched=True))


class Bench:
    """One block, dense and sparse, on one device. rehearses: both are dense, on a CPU"""

    def __init__(self, shape: Shape, rehearses: bool) -> None:
        self.shape, self.rehearses = shape, rehearses
        self.device = torch.device("cpu" if rehearses else "cuda")
        self.dtype = torch.float32 if rehearses else torch.bfloat16
        self.shard = two_of_four_block(shape, self.device, self.dtype)
        self.dense = self.shard.blocks[0].module

    def report(self, figure: str, **values: Any) -> None:
        print(json.dumps({"figure": figure} | values), flush=True)

    def describe(self) -> None:
        on_gpu = self.device.type == "cuda"
        linears = block_linears(self.dense, "block").values()
        self.report(
            "machine",
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            torch=str(torch.__version__),
            cusparselt=torch.backends.cusparselt.version() if on_gpu else None,
            dtype=str(self.dtype).removeprefix("torch."),
            dense_mib=round(sum(linear.weight_OI.nbytes for linear in linears) / 2**20, 1),
        )

    def sparse_weight(self, weight_OI: Tensor, variant: Variant, tokens: int) -> Tensor:
        """tokens: of the batch, which the search for an algorithm is for"""
        if self.rehearses:
            return weight_OI
        sparse = as_sparse(weight_OI, variant.backend)
        if variant.searched:
            x_NI = torch.randn(
                tokens + -tokens % 16, weight_OI.shape[1], device=self.device, dtype=self.dtype
            )
            found = torch._cslt_sparse_mm_search(sparse.packed, x_NI.t())  # type: ignore[attr-defined]
            sparse.alg_id_cusparselt = int(found)  # type: ignore[attr-defined]
        return sparse

    def sparse_block(self, variant: Variant, tokens: int) -> nn.Module:
        block = copy.deepcopy(self.dense)
        for linear in block_linears(block, "block").values():
            weight = self.sparse_weight(linear.weight_OI, variant, tokens)
            linear.module.weight = nn.Parameter(weight, requires_grad=False)
        return block

    # Single linears

    def linears(self) -> None:
        shapes: dict[tuple[int, ...], Tensor] = {}
        for linear in block_linears(self.dense, "block").values():
            shapes.setdefault(tuple(linear.weight_OI.shape), linear.weight_OI)
        for (outputs, inputs), weight_OI in shapes.items():
            for tokens in self.shape.linear_tokens:
                x_NI = torch.randn(tokens, inputs, device=self.device, dtype=self.dtype)
                for variant in VARIANTS:
                    self._linear(f"linear {outputs} x {inputs}", weight_OI, x_NI, variant)

    def _linear(self, figure: str, weight_OI: Tensor, x_NI: Tensor, variant: Variant) -> None:
        about = {"tokens": len(x_NI), **variant.named()}
        try:
            sparse = self.sparse_weight(weight_OI, variant, len(x_NI))
            nbytes = weight_OI.nbytes if self.rehearses else stored_bytes(sparse)
            self._compare(
                figure,
                len(x_NI),
                lambda: functional.linear(x_NI, weight_OI),
                lambda: functional.linear(x_NI, sparse),
                bytes_ratio=round(nbytes / weight_OI.nbytes, 4),
                **about,
            )
        except Exception as error:  # a backend that this GPU or build lacks is a finding
            self.report(figure, **about, error=first_line(error))

    # The block

    def blocks(self) -> None:
        batches = [("prefill", batch, self.shape.tokens) for batch in self.shape.prefill]
        batches += [("decode", batch, 1) for batch in self.shape.decode]
        for what, batch, tokens in batches:
            arguments = self.shard.blocks[0].arguments(batch, tokens)
            x_BTH = torch.randn(batch, tokens, self.shape.hidden, device=self.device, dtype=self.dtype)
            for variant in VARIANTS:
                self._block(f"{what} {batch} x {tokens}", x_BTH, arguments, variant)

    def _block(self, figure: str, x_BTH: Tensor, arguments: Any, variant: Variant) -> None:
        tokens = x_BTH.shape[0] * x_BTH.shape[1]
        torch._dynamo.reset()  # which else gives up after some shapes
        try:
            sparse = self.sparse_block(variant, tokens)
        except Exception as error:
            self.report(figure, **variant.named(), error=first_line(error))
            return
        ways = zip(
            self._ways(self.dense, x_BTH, arguments), self._ways(sparse, x_BTH, arguments), strict=True
        )
        for (how, dense_run), (_, sparse_run) in ways:
            about = {"how": how, **variant.named()}
            try:
                self._compare(figure, tokens, dense_run(), sparse_run(), **about)
            except Exception as error:
                self.report(figure, **about, error=first_line(error))

    def _ways(
        self, block: nn.Module, x_BTH: Tensor, arguments: Any
    ) -> Iterator[tuple[str, Callable[[], Run]]]:
        """Names, and what makes the block's run ready: eager, compiled, and of decoding as a graph."""
        more, keywords = arguments

        def eager() -> Run:
            return lambda: block(x_BTH, *more, **keywords)

        def compiled() -> Run:
            module = torch.compile(block, dynamic=False)
            return lambda: module(x_BTH, *more, **keywords)

        yield "eager", eager
        yield "compiled", compiled
        if x_BTH.shape[1] == 1:
            yield "graph", lambda: self._graph(compiled())

    def _graph(self, run: Run) -> Run:
        if self.rehearses:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return first_tensor(output)

        return replay

    # Timing

    def _compare(self, figure: str, count: int, dense: Run, sparse: Run, **about: Any) -> None:
        """Reports medians of rounds in which both take turns. Raises RuntimeError where outputs differ.

        count: tokens of a call
        """
        difference = relative_difference(first_tensor(sparse()), first_tensor(dense()))
        if difference > TOLERANCE:
            raise RuntimeError(f"outputs differ by {difference:.3g} of their size")
        calls = {run: self._calls(run) for run in (dense, sparse)}
        seconds: dict[Run, list[float]] = {dense: [], sparse: []}
        for _ in range(ROUNDS):
            for run, times in seconds.items():
                times.append(self._seconds(run, calls[run]))
        dense_s, sparse_s = statistics.median(seconds[dense]), statistics.median(seconds[sparse])
        self.report(
            figure,
            ratio=round(dense_s / sparse_s, 3),
            dense_tokens_per_second=round(count / dense_s),
            sparse_tokens_per_second=round(count / sparse_s),
            dense_us=round(dense_s * 1e6, 1),
            sparse_us=round(sparse_s * 1e6, 1),
            difference=float(f"{difference:.2g}"),
            **about,
        )

    def _calls(self, run: Run) -> int:
        """How many calls a round takes, so that it can be timed; the first ones warm up."""
        for _ in range(WARM_UP):
            run()
        return max(1, int(LEAST_SECONDS / self._seconds(run, 1)))

    def _seconds(self, run: Run, calls: int) -> float:
        """Of one of `calls` calls, which follow one another without waiting."""
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self._wait()
        return (time.perf_counter() - start) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def two_of_four_block(shape: Shape, device: torch.device, dtype: torch.dtype) -> ModelShard:
    """A Llama of one block with random weights, of every four consecutive inputs the two largest."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=128,
        max_position_embeddings=max(TOKENS, shape.tokens),
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device=device, dtype=dtype)
    for linear in block_linears(model.model.layers[0], "block").values():
        groups = linear.weight_OI.view(-1, GROUP)
        gone = groups.abs().topk(GROUP - KEPT, dim=1, largest=False).indices
        groups.scatter_(1, gone, 0)
    return ModelShard.whole(model)


def first_tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="a small block on the CPU, to try the script")
    parser.add_argument("--only", choices=("linears", "blocks"), help="a part of the figures")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --rehearse tries the script on a CPU")
    bench = Bench(SMALL if options.rehearse else LLAMA_8B, options.rehearse)
    bench.describe()
    if options.only != "blocks":
        bench.linears()
    if options.only != "linears":
        bench.blocks()


if __name__ == "__main__":
    main()
