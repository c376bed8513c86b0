import torch
from hypothesis import given
from hypothesis import strategies as st
from trials import normal, patient, run, seeds


def test_orthogonal_changes_are_dropped_and_equal_ones_kept() -> None:
    base = torch.zeros(2, 2)
    a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(run("model_stock", [a, b], base), base)
    torch.testing.assert_close(run("model_stock", [a, a], base), a)


def test_a_known_angle() -> None:
    """At 60 degrees between two, t = 2 cos / (1 + cos) = 2/3 of the way to their mean."""
    base = torch.zeros(2)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    torch.testing.assert_close(run("model_stock", [a, b], base), 2 / 3 * (a + b) / 2)


def test_changes_that_cancel_keep_the_base() -> None:
    base, step = normal(0, (3, 4)), normal(1, (3, 4))
    torch.testing.assert_close(run("model_stock", [base + step, base - step], base), base)


@patient
@given(seed=seeds, count=st.integers(2, 4))
def test_row_by_row_is_each_row_alone(seed: int, count: int) -> None:
    base, *models = (normal(seed + i, (4, 6)) for i in range(count + 1))
    models = [base + 0.1 * m + normal(seed + 9, (4, 6)) for m in models]  # far from cancelling
    got = run("model_stock", models, base, filter_wise=True)
    for row in range(4):
        alone = run("model_stock", [m[row] for m in models], base[row])
        torch.testing.assert_close(got[row], alone, rtol=1e-4, atol=1e-4)
