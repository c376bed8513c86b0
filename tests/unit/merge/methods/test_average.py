import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trials import normal, patient, run, seeds, shapes

from cabochon.base.errors import BadInput


@patient
@given(seed=seeds, shape=shapes)
def test_one_model_of_weight_one_is_itself(seed: int, shape: tuple[int, ...]) -> None:
    model = normal(seed, shape)
    assert torch.equal(run("linear", [model], weight=1), model)
    assert torch.equal(run("passthrough", [model]), model)


@patient
@given(seed=seeds, weights=st.lists(st.floats(0.1, 3), min_size=2, max_size=5), normalize=st.booleans())
def test_linear_is_the_weighted_mean_or_sum(seed: int, weights: list[float], normalize: bool) -> None:
    models = [normal(seed + i, (3, 5)) for i in range(len(weights))]
    expected = sum(w * m.double() for w, m in zip(weights, models, strict=True))
    assert isinstance(expected, torch.Tensor)
    if normalize:
        expected /= sum(weights)
    got = run("linear", models, None, [{"weight": w} for w in weights], normalize=normalize)
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("method", ["linear", "multislerp", "task_arithmetic", "dare_linear"])
def test_weights_that_sum_to_zero_cannot_be_normalised(method: str) -> None:
    base = torch.zeros(3) if method != "linear" else None
    normalize = {} if method == "multislerp" else {"normalize": True}
    with pytest.raises(BadInput, match=r"weights of \w+ cannot be normalised\n  cause: 0.5, -0.5 sum to zero"):
        run(method, [torch.ones(3), torch.ones(3)], base, [{"weight": 0.5}, {"weight": -0.5}], **normalize)


def test_such_weights_are_fine_as_they_are() -> None:
    got = run("linear", [torch.ones(3), torch.ones(3)], None, [{"weight": 1}, {"weight": -1}], normalize=False)
    assert torch.equal(got, torch.zeros(3))


def test_passthrough_scales() -> None:
    assert torch.equal(run("passthrough", [torch.ones(3)], scale=0.5), torch.full((3,), 0.5))


def test_the_base_stays_exact_where_models_do_not_differ_from_it() -> None:
    base = normal(0, (4, 6))
    models = [base.clone() for _ in range(3)]
    models[1][2, 3] += 1
    for method in ("warp", "ema", "nuslerp", "multislerp", "task_arithmetic"):
        if method == "nuslerp":
            got = run(method, models[:2], base, weight=0.3)
        else:
            got = run(method, models, base, **({"weight": 0.3} if method in ("multislerp", "task_arithmetic") else {}))
        assert (got != base).sum() == 1
