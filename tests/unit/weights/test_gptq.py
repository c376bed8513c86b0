"""GPTQ against the slow and literal form of its formula, and what it is for: outputs that change less."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.model.linear import Quantized, int4_grid, quantize
from cabochon.weights import gptq as module
from cabochon.weights.gptq import DAMPING, best_grid, gptq, nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs of unequal size, as activations are."""
    mixed = normal(count, width // 4, seed=seed) @ normal(width // 4, width, seed=seed + 1)
    return (mixed + 0.3 * normal(count, width, seed=seed + 2)) * torch.logspace(-1, 1, width)


def slow(weight: Tensor, hessian: Tensor, matrix: Quantized) -> Tensor:
    """The numbers that equation 3 of 2210.17323 gives on the same grids, the inverse made anew for every column."""
    hessian = hessian.double()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    weight = weight.double().clone()
    assert matrix.zero is not None
    scale, zero = (g.double().repeat_interleave(matrix.group, 1) for g in (matrix.scale, matrix.zero))
    q, left = torch.zeros_like(weight), hessian.diagonal().argsort(descending=True)
    while len(left):
        inverse = torch.linalg.inv(hessian[left][:, left])
        first = left[0]
        q[:, first] = (torch.round(weight[:, first] / scale[:, first]) + zero[:, first]).clamp(0, 15)
        error = weight[:, first] - (q[:, first] - zero[:, first]) * scale[:, first]
        weight[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return q


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (96, 32), (128, 64)])
def test_the_numbers_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, columns: int, group: int, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    weight, x = normal(40, columns), inputs(500, columns)
    matrix = gptq(weight, x.t() @ x, group)
    # float32 here, float64 there: a value half way between two numbers may fall to either side.
    different = (matrix.q != slow(weight, x.t() @ x, matrix)).float().mean()
    assert different < 0.01
    plain = nearest(weight, group).q != slow(weight, x.t() @ x, matrix)
    assert plain.float().mean() > 0.2  # rounding to the nearest is something else


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(8, 150), group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99)
)
def test_outputs_change_less_than_with_the_nearest(rows: int, columns: int, group: int, seed: int) -> None:
    weight, x = normal(rows, columns, seed=seed), inputs(400, columns, seed=seed)

    def change(matrix: Quantized) -> float:
        return float(((matrix.dequantize()[:, :columns] - weight) @ x.t()).norm())

    assert change(gptq(weight, x.t() @ x, group)) < 0.8 * change(quantize(weight, 4, group))


def test_inputs_without_correlation_leave_nothing_to_make_up_for() -> None:
    weight = normal(30, 128)
    matrix = gptq(weight, torch.eye(128), 64)
    assert torch.equal(matrix.q, nearest(weight, 64).q)


@pytest.mark.parametrize("hessian", ["zero", "one input", "huge", "tiny"])
def test_degenerate_inputs(hessian: str) -> None:
    x = inputs(200, 64)
    given: Any = {
        "zero": torch.zeros(64, 64),
        "one input": x[:1].t() @ x[:1],
        "huge": 1e12 * x.t() @ x,
        "tiny": 1e-12 * x.t() @ x,
    }
    weight = normal(20, 64)
    matrix = gptq(weight, given[hessian], 32)
    error = (matrix.dequantize() - weight).norm() / weight.norm()
    assert torch.isfinite(matrix.scale).all() and int(matrix.q.max()) <= 15
    assert error < (0.12 if hessian == "zero" else 1)


def test_the_hessian_and_the_weight_stay_as_they_are() -> None:
    weight, x = normal(20, 64), inputs(200, 64)
    hessian = x.t() @ x
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 32)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_a_hessian_that_float32_has_ruined() -> None:
    """Its smallest eigenvalue is below zero by far more than rounding alone would do."""
    x = inputs(300, 64)
    hessian = x.t() @ x
    hessian -= 0.05 * hessian.diagonal().mean() * torch.outer(torch.ones(64), torch.ones(64)) / 64
    assert torch.isfinite(gptq(normal(5, 64), hessian, 32).dequantize()).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), weighted=st.booleans(), seed=st.integers(0, 99))
def test_the_best_grid_is_no_worse_than_the_whole_range(rows: int, groups: int, weighted: bool, seed: int) -> None:
    values = normal(rows, groups, 64, seed=seed) ** 3  # long tails, which clipping is for
    importance = normal(groups, 64, seed=seed + 1).square() if weighted else torch.ones(groups, 64)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        middle, step = zero.float()[..., None], scale.float()[..., None]
        q = (torch.round(values / step) + middle).clamp(0, 15)
        return (((q - middle) * step - values).square() * importance).sum(-1)

    found = error(*best_grid(values, importance if weighted else None))
    assert (found <= error(*int4_grid(values)) * 1.0001).all()


def test_a_large_weight_whose_input_is_never_there_is_clipped() -> None:
    values, importance = normal(20, 1, 64), torch.ones(1, 64)
    values[..., 3], importance[:, 3] = 10, 0
    assert best_grid(values, importance)[0].mean() < 0.8 * best_grid(values)[0].mean()


def test_the_nearest_on_the_best_grid() -> None:
    weight = normal(200, 100)
    plain, better = quantize(weight, 4), nearest(weight, 64)
    errors = [(matrix.dequantize()[:, :100] - weight).norm() for matrix in (plain, better)]
    assert better.q.shape == plain.q.shape and better.q.dtype == torch.uint8
    assert errors[1] < 0.97 * errors[0]
