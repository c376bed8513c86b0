import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trials import normal, patient, run, seeds, shapes

from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge
from cabochon.merge.methods.warp import arcs


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Straight from the paper, in float64."""
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@patient
@given(seed=seeds, shape=shapes)
def test_one_policy_all_the_way_is_itself(seed: int, shape: tuple[int, ...]) -> None:
    base, policy = normal(seed, shape), normal(seed + 1, shape)
    for method in ("warp", "liti"):
        assert torch.equal(run(method, [policy], base, eta=1), policy)
        assert torch.equal(run(method, [policy], base, eta=0), base)
    assert torch.equal(run("warp_slerp", [policy], base), policy)


@patient
@given(seed=seeds, count=st.integers(2, 5))
def test_policies_are_merged_one_after_the_other(seed: int, count: int) -> None:
    base, *policies = (normal(seed + i, (4, 6)).double() for i in range(count + 1))
    merged = policies[0] - base
    for m, policy in enumerate(policies[1:], 2):
        merged = slerp(merged, policy - base, 1 / m)
    got = run("warp_slerp", [p.float() for p in policies], base.float())
    torch.testing.assert_close(got, (base + merged).float(), rtol=1e-4, atol=1e-4)


@patient
@given(seed=seeds, eta=st.floats(0, 1))
def test_warp_is_slerp_then_liti(seed: int, eta: float) -> None:
    base, *policies = (normal(seed + i, (4, 6)) for i in range(4))
    merged = run("warp_slerp", policies, base)
    expected = run("liti", [merged], base, eta=eta)
    torch.testing.assert_close(run("warp", policies, base, eta=eta), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected, (1 - eta) * base + eta * merged, rtol=1e-5, atol=1e-5)


@patient
@given(seed=seeds, mu=st.floats(0, 1), started=st.booleans())
def test_ema_is_its_recursion(seed: int, mu: float, started: bool) -> None:
    first, *steps = (normal(seed + i, (4, 6)) for i in range(5))
    average = first.double()
    for step in steps:
        average = (1 - mu) * average + mu * step
    got = run("ema", steps, first, mu=mu) if started else run("ema", [first, *steps], mu=mu)
    torch.testing.assert_close(got, average.float(), rtol=1e-5, atol=1e-5)


def test_one_angle_for_all_tensors_of_a_layer() -> None:
    """Task vectors parallel in one tensor and opposite in the other: at a right angle over the layer."""
    base = {"q": normal(0, (3, 4)), "k": normal(1, (3, 4))}
    step = {"q": normal(2, (3, 4)), "k": normal(3, (3, 4))}
    step = {name: s / s.norm() for name, s in step.items()}
    one = {name: base[name] + step[name] for name in base}
    two = {"q": base["q"] + step["q"], "k": base["k"] - step["k"]}
    method = METHODS["warp_slerp"]
    assert method.per_layer and method.measure
    bound = bind(method, {}, [{}, {}])
    wholes = {name: Whole((one[name], two[name]), base[name]) for name in base}
    products = [method.measure(whole, bound) for whole in wholes.values()]
    out = torch.empty(3, 4)
    merge(method, wholes["q"], bound, out, measured=products[0] + products[1])
    torch.testing.assert_close(out, base["q"] + 2**0.5 * step["q"], rtol=1e-4, atol=1e-5)
    merge(method, wholes["q"], bound, out)
    torch.testing.assert_close(out, base["q"] + step["q"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second", [1.0, 3.0, -1.0, -2.0, 0.0])
def test_parallel_opposite_and_zero_task_vectors_are_interpolated(second: float) -> None:
    base, step = normal(0, (3, 4)), normal(1, (3, 4))
    got = run("warp_slerp", [base + step, base + second * step], base)
    share = (1 + second) / 2 if second else math.sin(math.pi / 4)  # a zero vector has no angle: mergekit's takes 90°
    torch.testing.assert_close(got, base + share * step, rtol=1e-4, atol=1e-5)


def test_orthogonal_task_vectors_keep_their_length() -> None:
    assert arcs(torch.eye(2, dtype=torch.float64)) == pytest.approx([0.5**0.5] * 2)
    assert math.hypot(*arcs(torch.eye(5, dtype=torch.float64))) == pytest.approx(1)


def test_slerp_of_full_weights_is_nearly_linear_and_that_of_task_vectors_is_not() -> None:
    """The paper's finding, section 3.2: fine-tuned weights are collinear, their task vectors about orthogonal.

    Linear interpolation therefore shrinks what was learned by 1/sqrt(2), and only around the start can it be kept.
    """
    base = normal(0, (64, 64))
    a, b = (base + normal(i, (64, 64), 0.01) for i in (1, 2))
    linear = run("linear", [a, b], weight=1)
    full, around = run("slerp", [b], a, t=0.5), run("warp_slerp", [a, b], base)

    def learned(merged: Tensor) -> float:
        return ((merged - base).norm() / (a - base).norm()).item()

    assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
    assert abs(torch.cosine_similarity((a - base).flatten(), (b - base).flatten(), dim=0)) < 0.1
    assert ((full - linear).norm() / (linear - base).norm()).item() < 1e-4
    assert learned(linear) == pytest.approx(0.5**0.5, abs=0.02)
    assert learned(around) == pytest.approx(1, abs=0.02)
    assert ((around - linear).norm() / (linear - base).norm()).item() > 0.3


def test_published_settings_are_the_defaults() -> None:
    defaults = {name: METHODS[name].parameters[0].default for name in ("ema", "liti", "warp")}
    assert defaults == {"ema": 0.01, "liti": 0.3, "warp": 0.3}


def test_liti_draws_a_line_from_base_to_model() -> None:
    base, policy = normal(0, (3, 4)), normal(1, (3, 4))
    points = [run("liti", [policy], base, eta=eta) for eta in (0.0, 0.25, 0.5, 0.75, 1.0)]
    steps = torch.stack([b - a for a, b in pairwise(points)])
    torch.testing.assert_close(steps, ((policy - base) / 4).expand_as(steps), rtol=1e-4, atol=1e-5)
