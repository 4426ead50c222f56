"""Linears that are 2:4 as torch's semi-structured sparse tensors: which of them qualify, and the exchange.

Imports little, so that a benchmark runs where no more than torch and transformers are installed.
"""

# O outputs, I inputs of a linear

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysweep.errors import UsageError
from raysweep.model.linears import Linear

Backend = Literal["cusparselt", "cutlass"]
BACKENDS: tuple[Backend, ...] = ("cusparselt", "cutlass")
SPARSE_DTYPES = (torch.bfloat16, torch.float16)
GROUP, KEPT = 4, 2  # of that many consecutive inputs at most this many are not zero
OLDEST_CAPABILITY = (8, 0)  # of GPUs with sparse tensor cores (NVIDIA Ampere)
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


def exchange_weights(linears: Iterable[Linear], choice: Choice, backend: Backend = "cusparselt") -> int:
    """Gives the chosen linears sparse weights in place of the dense ones, one after another; returns the bytes that
    these take now. The modules run as before, and can be compiled.

    Raises UsageError where torch cannot make them.
    """
    wanted, taken = set(choice.sparse), 0
    for linear in (linear for linear in linears if linear.name in wanted):
        sparse = as_sparse(linear.weight_OI, backend)
        linear.module.weight = nn.Parameter(sparse, requires_grad=False)
        taken += stored_bytes(sparse)
    return taken


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
