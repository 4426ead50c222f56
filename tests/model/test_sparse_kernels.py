"""Which linears the sparse kernels take, against a naive loop; the kernels themselves where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysweep.errors import UsageError
from raysweep.model.linears import Linear, block_linears
from raysweep.model.sparse_kernels import (
    BACKENDS,
    NOT_2_4,
    SHAPE,
    SparseLinear,
    as_sparse,
    check_any,
    check_sparse_kernels,
    choose_linears,
    exchange_linears,
    fits,
    is_two_of_four,
    stored_bytes,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def pruned(outputs: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random weights, (outputs, inputs), of every four consecutive inputs two zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs // 4, 4, generator=generator) + 3
    kept = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(2) < 2
    return (weight * kept).reshape(outputs, inputs).to(dtype)


def linear(name: str, weight: torch.Tensor, transposed: bool = False) -> Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    return Linear(name, module, transposed)


def naive(weight: torch.Tensor) -> bool:
    for row in weight.tolist():
        if len(row) % 4:
            return False
        for start in range(0, len(row), 4):
            if sum(value != 0 for value in row[start : start + 4]) > 2:
                return False
    return True


@pytest.mark.parametrize("seed", range(6))
def test_two_of_four_is_what_a_loop_over_every_group_says(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator) * (torch.rand(3, 8, generator=generator) < 0.4)
    assert is_two_of_four(weight) == naive(weight)
    assert is_two_of_four(pruned(5, 12, seed))
    assert naive(pruned(5, 12, seed))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 0, 1, 1, 1, 1, 0, 0], True),
        ([0, 1, 1, 1, 0, 0, 0, 0], False),  # three of a group, though half of the row is zero
        ([0, 0, 1, 1, 1, 1, 1, 0], False),
        ([0, 0, 0, 0, 0, 0, 0, 0], True),
        ([0, 0, 1, 1, 0, 0], False),  # the last group is cut off
        ([1, 0, 0, 1, 1, -0.0, 0, 1], True),  # minus zero is a zero
    ],
)
def test_groups_are_of_consecutive_inputs(row, expected):
    assert is_two_of_four(torch.tensor([row], dtype=torch.float32)) is expected


def test_what_stays_dense_is_counted_and_named():
    weight = pruned(64, 64)
    full, odd = torch.ones(64, 64, dtype=torch.bfloat16), pruned(64, 8)
    choice = choose_linears(
        [
            linear("a", weight),
            *(linear(f"b{number}", full) for number in range(4)),
            linear("c", odd),
            linear("d", weight, transposed=True),
        ]
    )
    assert choice.sparse == ("a",)
    assert {name for name, why in choice.dense.items() if why == NOT_2_4} == {"b0", "b1", "b2", "b3"}
    assert choice.dense["c"] == SHAPE
    words = choice.describe()
    assert words.startswith("1 of 7 linears are 2:4; 4 not 2:4 (b0, b1, b2, ...)")
    assert "GPT-2's (d)" in words
    check_any(choice)
    with pytest.raises(
        UsageError, match=r"0 of 4 linears are 2:4; 4 not 2:4 \(b0, b1, b2, \.\.\.\)"
    ) as refused:
        check_any(choose_linears([linear(f"b{number}", full) for number in range(4)]))
    assert "2:4" in str(refused.value.remedy)


def test_what_a_linear_multiplies_counts_and_not_what_it_stores():
    """Two zeros among four consecutive outputs are worth nothing to the kernels."""
    assert not is_two_of_four(linear("a", pruned(64, 64), transposed=True).module.weight)
    assert not choose_linears([linear("a", pruned(64, 64).T.contiguous())]).sparse


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_are_multiples_of_what_torch_says(backend):
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    limits = classes[backend]._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    assert fits((rows, columns), torch.bfloat16, backend)
    assert fits((3 * rows, 5 * columns), torch.bfloat16, backend)
    assert not fits((rows // 2, columns), torch.bfloat16, backend)
    assert not fits((rows, columns + 4), torch.bfloat16, backend)
    assert not fits((4096, 4096), torch.float64, backend)


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("cpu", torch.bfloat16, ["NVIDIA GPUs", "cpu", "--kernels"]),
        ("cuda", torch.float32, ["float32", "bfloat16 | float16", "--dtype bfloat16"]),
    ],
)
def test_no_kernels_no_figures(device, dtype, said):
    with pytest.raises(UsageError) as refused:
        check_sparse_kernels(torch.device(device), dtype)
    assert all(word in str(refused.value) for word in said)


def test_a_build_without_the_library_is_an_error_that_says_so():
    if torch.cuda.is_available():
        pytest.skip("of a machine without a GPU")
    with pytest.raises(UsageError, match="cannot make a sparse tensor by cusparselt"):
        as_sparse(pruned(64, 64))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_weights_give_the_products_of_dense_ones(dtype):
    weight = pruned(256, 512, dtype=dtype).cuda()
    block = nn.Sequential(nn.Linear(512, 256), nn.Linear(512, 256, bias=False), nn.Linear(512, 256))
    block = block.to("cuda", dtype).requires_grad_(False)
    for pruned_one in block[:2]:
        pruned_one.weight.copy_(weight)
    x = torch.randn(7, 33, 512, device="cuda", dtype=dtype)  # a number of tokens that no tile divides
    expected = [one(x).double() for one in block]
    nbytes = exchange_linears(block, "b", choose_linears(block_linears(block, "b").values()))
    assert nbytes == 2 * stored_bytes(as_sparse(weight)) < 0.6 * 2 * weight.nbytes
    assert [type(one) for one in block] == [SparseLinear, SparseLinear, nn.Linear]
    for one, right in zip(block, expected, strict=True):
        found = one(x)
        assert found.is_contiguous()
        assert (found.double() - right).norm() < 0.01 * right.norm()
