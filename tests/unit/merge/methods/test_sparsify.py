import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trials import normal, patient, run, seeds

from cabochon.base.errors import BadInput
from cabochon.merge.methods.ranks import Cut
from cabochon.merge.methods.sparsify import by_chance, keep_probabilities, kept_count, largest, random_bits


def delta(method: str, values: Tensor, **parameters: object) -> Tensor:
    """What a method makes of one task vector with weight 1."""
    return run(method, [values], torch.zeros_like(values), weight=1, **parameters)


@patient
@given(seed=seeds, density=st.floats(0.01, 0.99))
def test_magnitude_keeps_the_largest(seed: int, density: float) -> None:
    values = normal(seed, (6, 7))
    kept = delta("ties", values, density=density)
    n = max(1, int(density * 42))
    top = values.abs().flatten().topk(n).indices
    expected = torch.zeros(42).index_copy(0, top, values.flatten()[top]).view(6, 7)
    assert torch.equal(kept, expected)


@patient
@given(seed=seeds, density=st.floats(0.01, 0.99), gamma=st.floats(0, 1))
def test_outliers_are_dropped_as_far_as_density_leaves_room(seed: int, density: float, gamma: float) -> None:
    values = normal(seed, (6, 7))
    kept = delta("breadcrumbs", values, density=density, gamma=gamma)
    n = max(1, int(density * 42))
    dropped = min(int(gamma * 42), 42 - n)
    order = values.abs().flatten().sort(descending=True).indices[dropped : dropped + n]
    assert torch.equal(kept.flatten()[order], values.flatten()[order])
    assert int((kept != 0).sum()) == n


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della_linear"])
def test_a_density_of_one_keeps_all_and_of_zero_nothing(method: str) -> None:
    values = normal(0, (6, 7))
    assert torch.equal(delta(method, values), values)
    assert not delta(method, values, density=0).any()


def test_a_tensor_of_one_element_is_kept() -> None:
    assert kept_count(0.5, 1) == kept_count(1e-9, 10) == 1
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        assert delta(method, torch.tensor([2.0]), density=0.5) == 2


@pytest.mark.parametrize("start", [0, 3, 100])
@pytest.mark.parametrize("index", [-1, 0, 4, 99, 103, 200])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, 3.0])
def test_cuts_keep_what_lies_above_them(start: int, index: int, value: float) -> None:
    values = torch.tensor([[1.0, -2.0, 2.0], [0.0, 3.0, -2.0]])
    place = torch.arange(start, start + 6).view(2, 3)
    above = (values.abs() > value) | ((values.abs() == value) & (place <= index))
    assert torch.equal(largest(values, start, Cut(value, index)), values * above)


# Random choices


@settings(max_examples=30, deadline=None)
@given(seed=seeds, model=st.integers(0, 9), start=st.integers(0, 50), count=st.integers(1, 50))
def test_every_element_has_its_own_random_number(seed: int, model: int, start: int, count: int) -> None:
    assert torch.equal(random_bits(seed, model, 0, 100)[start : start + count], random_bits(seed, model, start, count))


def test_random_numbers_are_uniform_and_differ_by_seed_and_model() -> None:
    streams = [random_bits(seed, model, 0, 65536).double() / 65536 + 0.5 for seed in (0, 1) for model in (0, 1)]
    for stream in streams:
        counts = torch.histc(stream.float(), 16, 0, 1)
        assert ((counts - 4096) ** 2 / 4096).sum() < 45  # chi-square, 15 degrees of freedom: p = 0.0001
        assert np.corrcoef(stream[1:], stream[:-1])[0, 1] == pytest.approx(0, abs=0.02)
    assert np.abs(np.corrcoef(torch.stack(streams)) - np.eye(4)).max() < 0.02


@pytest.mark.parametrize("density", [0.0, 0.003, 0.25, 0.5, 0.9, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("many", [False, True])
def test_masks_keep_as_often_as_they_should(density: float, many: bool) -> None:
    values = normal(0, (200, 500)) + 9
    found = by_chance(values, 3, 1, 2, torch.full_like(values, density) if many else density)
    assert ((found == values) | (found == 0)).all()
    share = (found != 0).double().mean().item()
    assert share == pytest.approx(density, abs=4 * (density * (1 - density) / 1e5) ** 0.5)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_kept_elements_are_scaled_by_one_factor_that_restores_their_sum(method: str) -> None:
    values = normal(0, (30, 40))
    kept = delta(method, values, density=0.4)
    factors = (kept / values)[kept != 0]
    torch.testing.assert_close(factors, factors[0].expand_as(factors))
    torch.testing.assert_close(kept.abs().sum(), values.abs().sum())
    plain = delta(method, values, density=0.4, rescale=False)
    assert torch.equal(plain != 0, kept != 0)
    assert torch.equal(plain[plain != 0], values[plain != 0])


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "dare_ties", "della"])
def test_the_mean_over_seeds_is_the_task_vector(method: str) -> None:
    base, model = normal(0, (20, 30)), normal(1, (20, 30))
    runs, chance = 800, 0.5
    more = {"epsilon": 0.01} if "della" in method else {}
    total = torch.zeros_like(base)
    for seed in range(runs):
        total += run(method, [model], base, weight=1, density=chance, seed=seed, **more) - base
    error = total / runs - (model - base)
    spread = (model - base).abs() * ((1 - chance) / chance / runs) ** 0.5
    assert (error.abs() / spread.clamp(min=0.01)).max() < 5
    assert error.mean().abs() < 0.01


def test_models_draw_their_own_numbers() -> None:
    base, model = torch.zeros(20, 30), normal(1, (20, 30))
    one = run("dare_linear", [model, model], base, [{"weight": 1}, {"weight": 0}], density=0.5)
    two = run("dare_linear", [model, model], base, [{"weight": 0}, {"weight": 1}], density=0.5)
    assert not torch.equal(one != 0, two != 0)


@patient
@given(seed=seeds)
def test_probabilities_rise_with_the_rank_in_the_row(seed: int) -> None:
    values = normal(seed, (5, 9))
    chances = keep_probabilities(values, 0.6, 0.2)
    order = values.abs().argsort(-1)
    expected = torch.linspace(0.4, 0.8, 9).expand(5, 9)
    torch.testing.assert_close(chances.gather(-1, order), expected)
    equal = keep_probabilities(torch.ones(1, 5), 0.5, 0.2)
    torch.testing.assert_close(equal, torch.linspace(0.3, 0.7, 5).view(1, 5))


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.1, 0.1), (0.5, 0.5)])
def test_probabilities_outside_of_0_to_1_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(BadInput, match=f"della cannot use density {density:g} with epsilon {epsilon:g}"):
        delta("della", torch.ones(3), density=density, epsilon=epsilon)
