import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trials import normal, patient, run, seeds


@patient
@given(seed=seeds, epsilon=st.floats(0, 1))
def test_ram_averages_shared_changes_and_keeps_single_ones(seed: int, epsilon: float) -> None:
    base, *models = (normal(seed + i, (3, 4)) for i in range(4))
    deltas = torch.stack([m - base for m in models])
    changed = deltas.abs() > torch.tensor(epsilon)
    mean = (deltas * changed).sum(0) / changed.sum(0).clamp(min=1)
    torch.testing.assert_close(run("ram", models, base, epsilon=epsilon), base + mean)


def test_ram_plus_raises_single_changes_by_the_share_of_shared_ones() -> None:
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 4.0])]
    got = run("ramplus_tl", models, base, r=0.5, alpha=0.8)
    # The first model shares one change and has two of its own; the second shares one and has one, limited by alpha.
    expected = torch.tensor([1 + 0.5 * 0.5, 2 * (1 + 0.5 * 0.5), 2.0, 4 * (1 + 0.5 * 0.8)])
    torch.testing.assert_close(got, expected)


def test_ram_plus_of_changes_that_are_all_shared() -> None:
    base, models = torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)]
    torch.testing.assert_close(run("ramplus_tl", models, base), torch.full((2,), 2.0))


@patient
@given(seed=seeds)
def test_sce_selects_what_varies_and_weighs_by_squares(seed: int) -> None:
    base = torch.zeros(2, 6)
    models = [normal(seed, (2, 6)), normal(seed + 1, (2, 6))]
    stack = torch.stack(models)
    top = stack.var(0, unbiased=False).flatten().topk(3).indices
    mask = torch.zeros(12).index_fill(0, top, 1).view(2, 6)
    kept = stack * mask
    weights = kept.square().sum((1, 2)) / kept.square().sum()
    sign = torch.where(kept.sum(0) >= 0, 1, -1)
    shares = weights.view(2, 1, 1) * (kept * sign > 0)
    expected = (kept * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
    torch.testing.assert_close(run("sce", models, base, select_topk=0.25), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("models", [1, 2])
def test_sce_of_models_that_do_not_vary_selects_nothing(models: int) -> None:
    base, model = normal(0, (3, 4)), normal(1, (3, 4))
    assert torch.equal(run("sce", [model] * models, base, select_topk=0.5), base)
    torch.testing.assert_close(run("sce", [model] * models, base), model)
