"""The exact optimum of a matrix against float64 least squares on the tokens themselves."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysweep import at_once
from raysweep.at_once import column_parts, row_pieces, solving_bytes
from raysweep.errors import NumericalError
from raysweep.pruning.recipe import MaskRecipe
from raysweep.reconstruction import exact, solving
from raysweep.reconstruction.exact import (
    DOUBLE,
    MAX_ITERATIONS,
    MIXED,
    Quadratic,
    masked_least_squares,
    times_wide,
)
from raysweep.reconstruction.measures import CALIBRATION, VALIDATION, UnitResult
from tests.families import make_model
from tests.reconstruction.ranges import (
    IDS,
    VALIDATION_IDS,
    mask_of,
    masks_of,
    range_of,
    reconstruct_trial,
    recover_all,
)
from tests.reconstruction.streams import linear_io, through


def problem_of(x_NI: torch.Tensor, drift_NO: torch.Tensor | None = None) -> Quadratic:
    """Of inputs X' and, where targets are not what the dense weight makes of them, the difference Y - X' W^T."""
    x = x_NI.double()
    if drift_NO is None:
        return Quadratic(x.T @ x)
    drift = drift_NO.double()
    return Quadratic(x.T @ x, drift.T @ x, float((drift**2).sum()))


def least_squares(
    x: torch.Tensor, target: torch.Tensor, free: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Row by row over the free columns, by SVD, in float64; the change of smallest norm from the start."""
    found = start.double().clone()
    for row in range(free.shape[0]):
        columns = free[row].nonzero().flatten()
        if len(columns):
            rest = target[:, row].double() - x.double() @ found[row]
            found[row, columns] += torch.linalg.lstsq(x.double()[:, columns], rest, driver="gelsd").solution
    return found


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 12),
    rows=st.integers(1, 40),
    density=st.floats(0, 1),
    drift=st.booleans(),
    precision=st.sampled_from([DOUBLE, MIXED]),
    seed=st.integers(0, 1000),
)
def test_the_loss_is_that_of_float64_least_squares_also_without_full_rank(
    outputs, inputs, rows, density, drift, precision, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    free = torch.rand(outputs, inputs, generator=generator) < density
    start = torch.randn(outputs, inputs, generator=generator)
    drift_NO = torch.randn(rows, outputs, generator=generator) if drift else None
    problem = problem_of(x, drift_NO)
    optimum = masked_least_squares(problem, free, start, precision)
    target = torch.zeros(rows, outputs) if drift_NO is None else drift_NO
    exact = least_squares(x, target, free, start)
    best = float(((x.double() @ exact.T - target.double()) ** 2).sum())
    found = float(((x.double() @ optimum.change_OI.T - target.double()) ** 2).sum())
    at_start = float(((x.double() @ start.double().T - target.double()) ** 2).sum())
    assert optimum.converged
    rounding = (1e-9 if precision == DOUBLE else 1e-7) * at_start
    assert found == pytest.approx(best, rel=1e-6, abs=rounding)
    assert problem.error(optimum.change_OI) == pytest.approx(found, rel=1e-6, abs=rounding)
    assert torch.equal(optimum.change_OI[~free], start.double()[~free])


def correlated(inputs: int, tokens: int, steepness: float) -> torch.Tensor:
    """Inputs whose k-th direction has a standard deviation of k ** -steepness, in channels of a hundredfold range."""
    generator = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))
    spread = torch.arange(1.0, inputs + 1) ** -steepness
    x = torch.randn(tokens, inputs, generator=generator) * spread @ turned
    return x * torch.logspace(-1, 1, inputs)


def test_float32_iterations_find_what_float64_ones_find_in_about_as_many():
    problem = problem_of(correlated(256, 2000, 0.5))
    free = torch.rand(48, 256, generator=torch.Generator().manual_seed(1)) < 0.4
    start = torch.where(free, 0.0, -1.0)
    double, mixed = (masked_least_squares(problem, free, start, p) for p in (DOUBLE, MIXED))
    assert double.converged
    assert mixed.converged
    assert problem.error(mixed.change_OI) == pytest.approx(problem.error(double.change_OI), rel=1e-6)
    assert mixed.iterations <= 1.3 * double.iterations + MIXED.stride
    assert torch.equal(mixed.change_OI[~free], start.double()[~free])


@pytest.mark.parametrize("steepness", [2.0, 3.0])
def test_where_float32_is_blind_float64_goes_on(steepness):
    """Eigenvalues over ten and more decades: float32 iterations find a descent that is not there."""
    problem = problem_of(correlated(128, 1000, steepness))
    free = torch.rand(8, 128, generator=torch.Generator().manual_seed(1)) < 0.4
    start = torch.where(free, 0.0, -1.0)
    double, mixed = (masked_least_squares(problem, free, start, p) for p in (DOUBLE, MIXED))
    at_start = problem.error(start)
    assert problem.error(mixed.change_OI) <= problem.error(double.change_OI) + 1e-9 * at_start


@pytest.mark.parametrize("precision", [DOUBLE, MIXED])
@pytest.mark.parametrize("apart", [1e-3, 3e-4, 1e-4])
def test_what_only_float64_can_tell_apart_is_told_apart(apart, precision):
    """Two inputs that are nearly one, and a target that is their difference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    x[:, 1] = x[:, 0] + apart * x[:, 2]
    start = torch.zeros(2, 16, dtype=torch.float64)
    start[0, 2] = start[1, 5] = -1.0
    free = torch.zeros(2, 16, dtype=torch.bool)
    free[0, :2] = free[1, 6:9] = True
    problem = Quadratic(x.T @ x)
    optimum = masked_least_squares(problem, free, start, precision)
    best = least_squares(x, torch.zeros(400, 2), free, start)
    assert problem.error(optimum.change_OI) <= problem.error(best) + 1e-4 * problem.error(start)


def test_an_infinite_direction_is_left_to_float64(monkeypatch):
    """Where products in float32 give NaN nothing of them is kept."""
    monkeypatch.setattr(exact, "_times", lambda scaled: lambda x_OI: x_OI * math.nan)
    problem = problem_of(correlated(32, 200, 0.5))
    free = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) < 0.4
    start = torch.where(free, 0.0, -1.0)
    double, mixed = (masked_least_squares(problem, free, start, p) for p in (DOUBLE, MIXED))
    assert mixed.converged
    torch.testing.assert_close(mixed.change_OI, double.change_OI)


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that operations within it make, and the most that there are at a time."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self._known = {other.untyped_storage()._cdata: 0 for other in others}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key)


def in_small_pieces(monkeypatch: pytest.MonkeyPatch, columns: int, weights: int) -> None:
    for module in (at_once, exact):
        monkeypatch.setattr(module, "COLUMNS_AT_ONCE", columns)
    monkeypatch.setattr(at_once, "WEIGHTS_AT_ONCE", weights)


@pytest.mark.parametrize(("outputs", "inputs"), [(300, 80), (128, 448), (448, 128)])
@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_no_more_is_held_than_is_counted(monkeypatch, outputs, inputs, drift, pieces):
    """With float32 iterations less: float64 ones, where they have to go on, come in the place of these."""
    if pieces:
        in_small_pieces(monkeypatch, columns=100, weights=20_000)
    generator = torch.Generator().manual_seed(0)
    gram = problem_of(torch.randn(2 * inputs, inputs, generator=generator)).gram_II.float()
    cross = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) if drift else None
    free = torch.rand(outputs, inputs, generator=generator) < 0.4
    with Counted(gram, free, *([] if cross is None else [cross])) as counted:
        for rows in row_pieces(outputs, inputs):
            problem = Quadratic(gram, None if cross is None else cross[rows], 0.0 if cross is None else 1e9)
            optimum = masked_least_squares(problem, free[rows], torch.where(free[rows], 0.0, -1.0).double())
            assert optimum.converged
            del problem, optimum
    vectors = 100 * (outputs + inputs)
    assert counted.peak <= solving_bytes(outputs, inputs) + vectors
    assert counted.peak >= 0.85 * solving_bytes(outputs, inputs)


def test_of_a_large_matrix_less_is_held_than_it_would_take_in_one_piece():
    gib = 1 << 30
    assert solving_bytes(4096, 14336) < 3.2 * gib
    assert solving_bytes(14336, 4096) < 1.7 * gib
    assert solving_bytes(4096, 4096) == 57 * 4096**2


@settings(max_examples=60, deadline=None)
@given(outputs=st.integers(1, 1 << 17), inputs=st.integers(1, 1 << 17))
def test_pieces_are_even_and_none_is_too_large_and_matrices_of_ordinary_size_are_one(outputs, inputs):
    pieces = row_pieces(outputs, inputs)
    sizes = [rows.stop - rows.start for rows in pieces]
    assert (pieces[0].start, pieces[-1].stop) == (0, outputs)
    assert all(before.stop == after.start for before, after in pairwise(pieces))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * inputs <= (1 << 25) + inputs
    assert len(pieces) == 1 or outputs * inputs > 1 << 25
    assert (column_parts(inputs) == 1) == (inputs <= 4096)


def test_only_columns_of_a_wide_matrix_become_float64(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, wide = torch.randn(5, 70, generator=generator).double(), torch.randn(70, 103, generator=generator)
    with Counted(x, wide) as counted:
        whole = times_wide(x, wide)
    assert torch.equal(whole, x @ wide.double())
    assert counted.peak == 8 * 103 * (70 + 5)
    in_small_pieces(monkeypatch, columns=20, weights=1000)
    with Counted(x, wide) as counted:
        parts = times_wide(x, wide)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    assert counted.peak == 8 * (103 * 5 + 18 * 70 + 18 * 5)


@pytest.mark.parametrize("precision", [DOUBLE, MIXED])
@pytest.mark.parametrize("drift", [False, True])
def test_a_gram_matrix_in_float32_gives_what_it_gives_in_float64(monkeypatch, precision, drift):
    """To the bit, and nearly so in parts of it."""
    generator = torch.Generator().manual_seed(1)
    drift_NO = torch.randn(2000, 48, generator=generator) if drift else None
    wide = problem_of(correlated(256, 2000, 0.5), drift_NO)
    gram = wide.gram_II.float()
    free = torch.rand(48, 256, generator=generator) < 0.4
    start = torch.where(free, 0.0, -1.0)
    small, large = (Quadratic(g, wide.cross_OI, wide.offset) for g in (gram, gram.double()))
    optimum = masked_least_squares(small, free, start, precision)
    assert torch.equal(optimum.change_OI, masked_least_squares(large, free, start, precision).change_OI)
    in_small_pieces(monkeypatch, columns=50, weights=1000)
    parts = masked_least_squares(small, free, start, precision)
    assert small.error(parts.change_OI) == pytest.approx(large.error(optimum.change_OI), rel=1e-10)


@pytest.mark.parametrize("drift", [False, True])
def test_rows_are_problems_of_their_own(monkeypatch, drift):
    generator = torch.Generator().manual_seed(0)
    x, drift_NO = torch.randn(500, 60, generator=generator), torch.randn(500, 24, generator=generator)
    whole = problem_of(x, drift_NO if drift else None)
    free = torch.rand(24, 60, generator=generator) < 0.4
    start = torch.where(free, 0.0, -1.0)
    at_once = masked_least_squares(whole, free, start)
    in_small_pieces(monkeypatch, columns=20, weights=300)
    error, most = 0.0, 0
    for rows in row_pieces(24, 60):
        problem = problem_of(x, drift_NO[:, rows] if drift else None)
        optimum = masked_least_squares(problem, free[rows], start[rows])
        error, most = error + problem.error(optimum.change_OI), max(most, optimum.iterations)
    assert len(row_pieces(24, 60)) == 5
    assert error == pytest.approx(whole.error(at_once.change_OI), rel=1e-10)
    assert most == pytest.approx(at_once.iterations, abs=2)


def test_start_and_problem_stay_as_they_are():
    problem = problem_of(correlated(64, 300, 0.5), torch.randn(300, 8))
    free = torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    start = torch.randn(8, 64, dtype=torch.float64)
    assert problem.cross_OI is not None
    tensors = (start, free, problem.gram_II, problem.cross_OI)
    before = [tensor.clone() for tensor in tensors]
    for precision in (DOUBLE, MIXED):
        masked_least_squares(problem, free, start, precision)
        problem.error(start)
    assert all(map(torch.equal, tensors, before))


def test_dead_and_duplicated_inputs_leave_weights_where_they_began_or_share_what_is_to_be_done():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    x[:, 2], x[:, 5] = 0.0, x[:, 4]
    start = torch.randn(3, 6, generator=generator)
    start[:, 0] = 2.0
    free = torch.ones(3, 6, dtype=torch.bool)
    free[:, 0] = False
    optimum = masked_least_squares(problem_of(x), free, start)
    assert torch.equal(optimum.change_OI[:, 2], start.double()[:, 2])
    moved = optimum.change_OI - start.double()
    torch.testing.assert_close(moved[:, 4], moved[:, 5])
    assert optimum.iterations < 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(value):
    gram = torch.eye(3, dtype=torch.float64)
    gram[1, 1] = value
    with pytest.raises(NumericalError, match="NaN or infinity"):
        masked_least_squares(Quadratic(gram), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))


def test_iterations_are_bounded():
    assert MAX_ITERATIONS < 10_000
    hilbert = torch.tensor([[1.0 / (i + j + 1) for j in range(40)] for i in range(40)], dtype=torch.float64)
    optimum = masked_least_squares(Quadratic(hilbert), torch.ones(1, 40, dtype=torch.bool), torch.ones(1, 40))
    assert optimum.iterations <= MAX_ITERATIONS


EXACT = {"granularity": "matrix", "optimizer": "exact", "learning_rate": None}


@pytest.mark.parametrize("trainable", ["all", "weights"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_matrices_are_at_the_optimum_of_the_dense_models_tokens(family, trainable):
    model = make_model(family)
    blocks, trial = range_of(model, validation=True), reconstruct_trial(**EXACT, trainable=trainable)
    results = {result.linears: result for result in recover_all(blocks, "trial", trial)}
    recipe = MaskRecipe.of(trial)
    for block in blocks.blocks.values():
        for name, linear in block.linears.items():
            x, y = linear_io(model, IDS, name)
            mask, has_bias = mask_of(blocks, recipe, name), linear.bias_O is not None
            free, ones = mask, torch.ones(len(x), 1)
            weight = linear.from_stored(blocks.weights["trial"][f"{name}.weight"])
            output = x.double() @ weight.double().T
            if has_bias:
                x = torch.cat([x, ones], 1)
                free = torch.cat([mask, torch.full_like(mask[:, :1], trainable == "all")], 1)
                bias = blocks.weights["trial"].get(f"{name}.bias", linear.bias_O)
                output = output + bias.double()
            start = (
                torch.cat([linear.weight_OI * mask, linear.bias_O[:, None]], 1)
                if has_bias
                else linear.weight_OI * mask
            )
            best = least_squares(x, y, free, start)
            expected = float(((x.double() @ best.T - y.double()) ** 2).sum())
            found = float(((output - y.double()) ** 2).sum())
            assert found == pytest.approx(expected, rel=1e-5), name
            assert results[name].error_after == pytest.approx(
                found / float((y.double() ** 2).sum()), rel=1e-4
            )
            assert not bool(weight[~mask].count_nonzero())
            assert results[name].fallback is None
    adamw = {
        r.linears: r for r in recover_all(blocks, "steps", reconstruct_trial(granularity="matrix", epochs=50))
    }
    for name, result in results.items():
        assert result.loss_before == pytest.approx(adamw[name].loss_before, rel=1e-6)
        if trainable == "all":
            assert result.loss_after <= adamw[name].loss_after * (1 + 1e-6)


def test_the_optimum_starts_at_the_updated_weights_of_sparsegpt_and_is_below_them():
    blocks, trial = range_of(make_model("llama")), reconstruct_trial(criterion="sparsegpt", **EXACT)
    results = recover_all(blocks, "trial", trial)
    assert all(result.loss_after < result.loss_before for result in results)
    wanda = recover_all(blocks, "wanda", reconstruct_trial(criterion="wanda", **EXACT))
    assert sum(r.loss_before for r in results) < sum(r.loss_before for r in wanda)
    for name, mask in masks_of(blocks, trial).items():
        assert not bool(blocks.weights["trial"][name][~mask].count_nonzero())


@pytest.mark.parametrize("target", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_on_pruned_inputs_the_optimum_is_that_of_the_inputs_that_arrive(family, target):
    """Each matrix of the first two blocks, on the inputs behind all that was recovered before it."""
    model = make_model(family)
    blocks = range_of(model)
    trial = reconstruct_trial(**EXACT, input_stream="pruned", target_stream=target)
    seen = through(blocks, trial, units=2 * len(blocks.blocks[0].linears))
    for name, stage in seen.items():
        x = torch.cat([stage.inputs, torch.ones(len(stage.inputs), 1)], 1)
        mask, linear = stage.mask, stage.linear
        has_bias = linear.bias_O is not None
        free = torch.cat([mask, torch.full_like(mask[:, :1], has_bias)], 1)
        bias = torch.zeros(len(mask)) if linear.bias_O is None else linear.bias_O
        start = torch.cat([linear.weight_OI * mask, bias[:, None]], 1)
        _, dense_y = linear_io(model, IDS, name)
        y = dense_y if target == "dense" else stage.inputs @ linear.weight_OI.T + bias
        best = least_squares(x, y, free, start)
        expected = float(((x.double() @ best.T - y.double()) ** 2).sum())
        found = float(((stage.outputs.double() - y.double()) ** 2).sum())
        assert found == pytest.approx(expected, rel=1e-4), name
        power = float((y.double() ** 2).sum())
        assert stage.result.error_after == pytest.approx(found / power, rel=1e-3)
        assert math.isfinite(stage.result.loss_before)


@pytest.mark.parametrize(
    ("family", "stream", "target"),
    [
        ("llama", "dense", "dense"),
        ("gpt2", "dense", "dense"),
        ("opt", "pruned", "dense"),
        ("llama", "pruned", "pruned"),
    ],
)
def test_rows_in_pieces_end_where_all_rows_at_once_end(monkeypatch, family, stream, target):
    """Also where another text's problem waits aside. Without full rank the end is a matter of the tolerance, and behind
    others a matrix sees what that made of them."""
    trial = reconstruct_trial(**EXACT, input_stream=stream, target_stream=target)

    def solved() -> tuple[list[UnitResult], dict[str, torch.Tensor]]:
        blocks = range_of(make_model(family), validation=True)
        blocks.begin("trial")
        if trial.is_sequential:
            for text, ids in ((CALIBRATION, IDS), (VALIDATION, VALIDATION_IDS)):
                embedded = blocks.shard.embed(ids)
                blocks.enter_stream("trial", text, len(ids), slice(0, len(ids)), embedded)
        return recover_all(blocks, "trial", trial), blocks.weights["trial"]

    whole, weights = solved()
    in_small_pieces(monkeypatch, columns=20, weights=200)
    monkeypatch.setattr(solving, "SET_ASIDE", 0)
    pieces, close = solved()
    close_enough = 1e-7 if stream == "dense" else 1e-3
    for one, other in zip(whole, pieces, strict=True):
        assert other.loss_before == pytest.approx(one.loss_before, rel=close_enough)
        assert other.loss_after == pytest.approx(one.loss_after, rel=close_enough)
        assert other.validation_loss_after == pytest.approx(one.validation_loss_after, rel=1e-2)
        assert other.trainable_parameters == one.trainable_parameters
        assert other.peak_bytes < one.peak_bytes
        assert other.training_flops <= one.training_flops * (other.steps + 1) / (one.steps + 1)
    for name, weight in weights.items():
        torch.testing.assert_close(close[name], weight, rtol=1e-2, atol=1e-2)
