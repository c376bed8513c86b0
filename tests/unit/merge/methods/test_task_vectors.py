import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trials import normal, patient, run, seeds, shapes

from cabochon.merge.methods.task_vectors import TASK_VECTOR_METHODS

NAMES = [method.name for method in TASK_VECTOR_METHODS]
ELECTING = ["ties", "dare_ties", "breadcrumbs_ties", "della"]
weights = st.floats(0.1, 2)


@pytest.mark.parametrize("method", NAMES)
@patient
@given(seed=seeds, shape=shapes)
def test_one_model_at_density_one_is_task_arithmetic(method: str, seed: int, shape: tuple[int, ...]) -> None:
    base, model = normal(seed, shape), normal(seed + 1, shape)
    got = run(method, [model], base, weight=1, **{"lambda": 0.7})
    torch.testing.assert_close(got, run("task_arithmetic", [model], base, weight=0.7))


@patient
@given(seed=seeds, w=st.lists(weights, min_size=1, max_size=4), scale=weights, normalize=st.booleans())
def test_task_arithmetic_adds_weighted_differences(seed: int, w: list[float], scale: float, normalize: bool) -> None:
    base, *models = (normal(seed + i, (3, 4)) for i in range(len(w) + 1))
    change = sum(x * (m - base).double() for x, m in zip(w, models, strict=True)) * scale
    expected = base + (change / sum(w) if normalize else change)
    got = run("task_arithmetic", models, base, [{"weight": x} for x in w], normalize=normalize, **{"lambda": scale})
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def elected(deltas: list[Tensor], w: list[float], normalize: bool) -> Tensor:
    """One element after the other, as the paper writes it."""
    result = torch.zeros_like(deltas[0])
    for place in range(result.numel()):
        terms = [x * d.flatten()[place].item() for x, d in zip(w, deltas, strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        winners = [i for i, term in enumerate(terms) if term * sign > 0]
        share = sum(w[i] for i in winners) if normalize else 1
        result.view(-1)[place] = sum(terms[i] for i in winners) / (share or 1)
    return result


@pytest.mark.parametrize("method", ELECTING)
@patient
@given(
    seed=seeds,
    w=st.lists(st.integers(-8, 8).filter(bool).map(lambda n: n / 4), min_size=1, max_size=4),
    normalize=st.booleans(),
)
def test_signs_are_elected(method: str, seed: int, w: list[float], normalize: bool) -> None:
    base = torch.zeros(3, 4)
    deltas = [normal(seed + i, (3, 4)) for i in range(len(w))]
    got = run(method, deltas, base, [{"weight": x} for x in w], normalize=normalize)
    torch.testing.assert_close(got, elected(deltas, w, normalize), rtol=1e-4, atol=1e-4)


def test_opposite_changes_elect_plus() -> None:
    base = torch.zeros(2)
    got = run("ties", [torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])], base, weight=1)
    assert torch.equal(got, torch.tensor([1.0, 1.0]))


def test_ties_takes_the_mean_of_those_that_agree() -> None:
    base = torch.zeros(1)
    models = [torch.tensor([x]) for x in (1.0, 3.0, -2.0)]
    assert run("ties", models, base, weight=1) == 2
    assert run("ties", models, base, weight=1, normalize=False) == 4


def test_the_vote_is_among_what_was_kept() -> None:
    """The first model's -9 wins, unless a density of one half drops it in favour of its 10."""
    base = torch.zeros(2)
    models = [torch.tensor([-9.0, 10.0]), torch.tensor([8.0, 0.0])]
    assert run("ties", models, base, weight=1)[0] == -9
    assert run("ties", models, base, weight=1, density=0.5)[0] == 8


def test_the_type_of_a_mask_changes_nothing() -> None:
    base, *models = (normal(i, (5, 6)) for i in range(4))
    one, two = (run("ties", models, base, weight=0.5, density=0.4, int8_mask=flag) for flag in (True, False))
    assert torch.equal(one, two)
