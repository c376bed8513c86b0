import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trials import normal, patient, run, seeds

from cabochon.base.errors import BadInput
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.sphere import arc, cosine, gram

shares = st.floats(0, 1)


def of_length(seed: int, length: float = 1.0) -> Tensor:
    vector = normal(seed, (6, 8)).double()
    return (vector / vector.norm() * length).float()


@patient
@given(seed=seeds)
def test_slerp_ends_at_its_ends(seed: int) -> None:
    a, b = normal(seed, (4, 6)), normal(seed + 1, (4, 6))
    torch.testing.assert_close(run("slerp", [b], a, t=0), a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run("slerp", [b], a, t=1), b, rtol=1e-6, atol=1e-6)


@patient
@given(seed=seeds, t=shares, length=st.floats(0.1, 10))
def test_slerp_keeps_the_norm(seed: int, t: float, length: float) -> None:
    a, b = of_length(seed, length), of_length(seed + 1, length)
    for merged in (run("slerp", [b], a, t=t), run("nuslerp", [a, b], None, [{"weight": 1 - t}, {"weight": t}])):
        assert math.isclose(merged.norm().item(), length, rel_tol=1e-5)


@patient
@given(seed=seeds, t=shares)
def test_slerp_moves_in_proportion_to_the_angle(seed: int, t: float) -> None:
    a, b = of_length(seed), of_length(seed + 1)
    merged = run("slerp", [b], a, t=t).double()
    whole, part = (math.acos(min(1.0, (a.double() * x).sum().item() / x.norm().item())) for x in (b.double(), merged))
    assert math.isclose(part, t * whole, abs_tol=1e-3)


def test_slerp_of_nearly_parallel_tensors_is_linear() -> None:
    a = normal(0, (4, 6))
    b = 2 * a + 1e-3 * normal(1, (4, 6))
    torch.testing.assert_close(run("slerp", [b], a, t=0.3), 0.7 * a + 0.3 * b)


@patient
@given(seed=seeds)
def test_nuslerp_around_a_base_is_slerp_of_task_vectors(seed: int) -> None:
    base, a, b = (normal(seed + i, (4, 6)) for i in range(3))
    plain = run("slerp", [b - base], a - base, t=0.25)
    torch.testing.assert_close(
        run("nuslerp", [a, b], base, [{"weight": 3}, {"weight": 1}]), base + plain, rtol=1e-4, atol=1e-5
    )


@patient
@given(seed=seeds, columns=st.booleans())
def test_nuslerp_by_rows_and_columns_is_nuslerp_of_each(seed: int, columns: bool) -> None:
    a, b = normal(seed, (4, 6)), normal(seed + 1, (4, 6))
    got = run("nuslerp", [a, b], weight=0.5, nuslerp_flatten=False, nuslerp_row_wise=columns)
    if columns:
        a, b, got = a.T, b.T, got.T
    for x, y, merged in zip(a, b, got, strict=True):
        torch.testing.assert_close(run("nuslerp", [x, y], weight=0.5), merged, rtol=1e-4, atol=1e-5)


@patient
@given(seed=seeds)
def test_means_on_the_sphere_of_two_lie_half_way(seed: int) -> None:
    a, b = of_length(seed, 2.0), of_length(seed + 1, 2.0)
    half = run("slerp", [b], a, t=0.5)
    torch.testing.assert_close(run("karcher", [a, b]), half, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run("multislerp", [a, b], weight=1), half, rtol=1e-4, atol=1e-4)


@patient
@given(seed=seeds)
def test_karcher_is_where_the_pulls_cancel(seed: int) -> None:
    vectors = [of_length(seed + i, 1.0 + i) for i in range(4)]
    mean = run("karcher", vectors, max_iter=100, tol=1e-9).double()
    assert math.isclose(mean.norm().item(), 2.5, rel_tol=1e-5)
    mean /= mean.norm()
    pull = torch.zeros_like(mean)
    for vector in vectors:
        unit = vector.double() / vector.double().norm()
        dot = (unit * mean).sum()
        pull += torch.acos(dot) / torch.sin(torch.acos(dot)) * (unit - dot * mean)
    assert pull.norm() < 1e-5


def test_karcher_of_nothing_is_nothing() -> None:
    assert torch.equal(run("karcher", [torch.zeros(3), torch.zeros(3)]), torch.zeros(3))


def test_directions_that_cancel_have_no_mean_direction() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 3**0.5 / 2])
    with pytest.raises(BadInput, match="directions of the models cancel"):
        run("multislerp", [a, b, -a - b], weight=1)
    assert torch.equal(run("multislerp", [a, -a], weight=1), torch.zeros(2))


def test_inner_products_and_what_follows_from_them() -> None:
    vectors = [normal(i, (50, 7)) for i in range(3)]
    products = gram(Whole(tuple(vectors), block=20))
    flat = torch.stack(vectors).double().view(3, -1)
    torch.testing.assert_close(products, flat @ flat.T)
    assert math.isclose(cosine(products, 0, 2), torch.cosine_similarity(flat[0], flat[2], dim=0).item(), rel_tol=1e-12)
    assert cosine(torch.zeros(2, 2), 0, 1) == 0
    assert arc(0.0, 0.5, False) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert arc(0.0, 0.25, True) == (0.75, 0.25)
