"""Linears that are 2:4 as torch's semi-structured sparse tensors: which of them qualify, and the exchange.

Imports little, so that a benchmark runs where no more than torch and transformers are installed.
"""

# O outputs, I inputs of a linear, N tokens of a batch

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError
from raysweep.model.linears import Linear, block_linears

Backend = Literal["cusparselt", "cutlass"]
BACKENDS: tuple[Backend, ...] = ("cusparselt", "cutlass")
SPARSE_DTYPES = (torch.bfloat16, torch.float16)
GROUP, KEPT = 4, 2  # of that many consecutive inputs at most this many are not zero
OLDEST_CAPABILITY = (8, 0)  # of GPUs with sparse tensor cores (NVIDIA Ampere)
TILE = 16  # tokens; products of other numbers are padded
NAMED = 3  # linears that a message names before it only counts

NOT_2_4, FOREIGN, SHAPE = "not 2:4", "stored by inputs, as GPT-2's", "of a shape that the kernels do not take"


@dataclass(frozen=True)
class Choice:
    """Which linears the sparse kernels can run, and why not the others.

    sparse: their names;  dense: by name, the reason (one of NOT_2_4, FOREIGN, SHAPE)
    """

    sparse: tuple[str, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """How many there are of each kind, with the first names of those that stay dense."""
        total = len(self.sparse) + len(self.dense)
        parts = [f"{len(self.sparse)} of {total} linears are 2:4"]
        for reason in dict.fromkeys(self.dense.values()):
            names = [name for name, why in self.dense.items() if why == reason]
            more = ", ..." if len(names) > NAMED else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:NAMED])}{more})")
        return "; ".join(parts)


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Whether of every four consecutive inputs of every output at most two weights are not zero."""
    outputs, inputs = weight_OI.shape
    if inputs % GROUP:
        return False
    nonzero = weight_OI.reshape(outputs, inputs // GROUP, GROUP).ne(0).sum(2)
    return bool((nonzero <= KEPT).all())


def check_sparse_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError, with the reason, where torch has no sparse kernels for a device and number format."""
    if device.type != "cuda":
        raise UsageError(
            f"sparse kernels run on NVIDIA GPUs, and the device is {device.type}",
            where="--kernels sparse",
            remedy="Run it on a machine with a GPU, or leave --kernels out: the perplexity is the same.",
        )
    if dtype not in SPARSE_DTYPES:
        raise UsageError(
            f"sparse kernels take no {_name(dtype)} weights",
            where="--kernels sparse",
            allowed=" | ".join(map(_name, SPARSE_DTYPES)),
            remedy="Add --dtype bfloat16.",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has no sparse tensor cores",
            where="--kernels sparse",
            allowed="GPUs from NVIDIA's Ampere generation on (compute capability 8.0)",
        )


def choose_linears(linears: Iterable[Linear], backend: Backend = "cusparselt") -> Choice:
    """Which linears the kernels of `backend` can run."""
    sparse: list[str] = []
    dense: dict[str, str] = {}
    for linear in linears:
        reason = _reason(linear, backend)
        if reason is None:
            sparse.append(linear.name)
        else:
            dense[linear.name] = reason
    return Choice(tuple(sparse), dense)


def check_any(choice: Choice) -> None:
    """Raises UsageError where no linear qualifies: which, how many, and why not."""
    if not choice.sparse:
        raise UsageError(
            f"nothing for sparse kernels in this model: {choice.describe()}",
            where="--kernels sparse",
            allowed="a model whose linears have two zeros among every four consecutive inputs",
            remedy='Prune with pattern "2:4" and export the trial.',
        )


def exchange_linears(block: nn.Module, prefix: str, choice: Choice) -> int:
    """Puts SparseLinears in the place of the chosen linears of a block, one after another; returns the bytes that their
    weights take. prefix: the block's name. Raises UsageError where torch cannot make them."""
    wanted, taken = set(choice.sparse), 0
    for name, linear in block_linears(block, prefix).items():
        if name in wanted:
            sparse = SparseLinear(linear.weight_OI, linear.bias_O)
            block.set_submodule(name.removeprefix(f"{prefix}."), sparse)
            taken += sparse.packed.nbytes
    return taken


class SparseLinear(nn.Module):
    """x W^T + b with a 2:4 weight, by cuSPARSELt.

    As torch's sparse tensor alone multiplies, results lie column by column, which makes attention behind them take a
    path that is several times slower; and the first algorithm is not the fastest one. Here rows are rows, and in
    bfloat16 the library's own search chooses, once for every shape and number of tokens. In float16 that search ends in
    an internal error, after which nothing else of the library works (torch 2.11 on an H200), so that there the first
    algorithm multiplies.
    """

    packed: Tensor
    bias: Tensor | None
    _algorithms: ClassVar[dict[tuple[Any, ...], dict[str, int]]] = {}

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        """Raises UsageError where torch cannot make the weight sparse."""
        super().__init__()
        self.outputs = weight_OI.shape[0]
        self.register_buffer("packed", as_sparse(weight_OI).packed)  # type: ignore[attr-defined]
        self.register_buffer("bias", None if bias_O is None else bias_O.clone())

    def forward(self, x: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        tokens = len(x_NI)
        if not tokens:  # of an expert to which none is routed
            return x.new_zeros(*x.shape[:-1], self.outputs)
        x_NI = nn.functional.pad(x_NI, (0, 0, 0, -tokens % TILE))
        algorithm = self._algorithm(x_NI)
        out_NO = torch._cslt_sparse_mm(
            self.packed, x_NI.t(), bias=self.bias, transpose_result=True, **algorithm
        )
        result: Tensor = out_NO[:tokens].reshape(*x.shape[:-1], self.outputs)
        return result

    @torch._dynamo.disable
    def _algorithm(self, x_NI: Tensor) -> dict[str, int]:
        if x_NI.dtype != torch.bfloat16:
            return {}
        key = (x_NI.device, x_NI.shape, self.outputs, self.bias is None)
        if key not in self._algorithms:
            library: Any = torch._C._cusparselt
            found = library.mm_search(self.packed, x_NI.t(), self.bias, None, None, True)
            names = ("alg_id", "split_k", "split_k_mode")
            self._algorithms[key] = dict(zip(names, map(int, found), strict=False))
        return self._algorithms[key]


def as_sparse(weight_OI: Tensor, backend: Backend = "cusparselt") -> Tensor:
    """The 2:4 weight as torch's semi-structured tensor. Raises UsageError where torch cannot make one."""
    kind = _class_of(backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that its interface is a prototype
            made: Tensor = kind.from_dense(weight_OI.detach().contiguous())
            return made
    except (RuntimeError, ValueError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"torch {torch.__version__} cannot make a sparse tensor by {backend}: {line}",
            where="--kernels sparse",
            remedy="Use a torch build with cuSPARSELt (the CUDA builds on PyPI have it).",
        ) from error


def stored_bytes(sparse: Tensor) -> int:
    """What a semi-structured tensor takes: kept values and their places."""
    names, _ = sparse.__tensor_flatten__()  # type: ignore[attr-defined]
    parts: list[Tensor] = [getattr(sparse, name) for name in names]
    return sum(part.nbytes for part in parts)


def fits(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> bool:
    """Whether the kernels of `backend` take weights of this shape (O, I): multiples of what torch's class says."""
    limits = _class_of(backend)._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    if limits is None:
        return False
    return all(
        size and size % least == 0
        for size, least in zip(shape, (limits.sparse_min_rows, limits.sparse_min_cols), strict=True)
    )


def _reason(linear: Linear, backend: Backend) -> str | None:
    """Why a linear stays dense; None where it need not."""
    weight_OI = linear.weight_OI
    if linear.transposed:  # its module multiplies by itself what torch would have to dispatch
        return FOREIGN
    if not is_two_of_four(weight_OI):
        return NOT_2_4
    return None if fits(tuple(weight_OI.shape), weight_OI.dtype, backend) else SHAPE


def _class_of(backend: Backend) -> Any:
    """Torch's class of sparse tensors that are multiplied by `backend`."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    return {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}[
        backend
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
