"""Policy gradients: advantages against written-out sums, losses against plain autograd, estimators on a bandit."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraConfig, adapter_parameters, attach
from cabochon.train.advantages import EPSILON, advantages
from cabochon.train.anchor import beneath_adapters, look, of_average, of_model
from cabochon.train.losses import fused
from cabochon.train.losses.fused import cross_entropy, likelihood
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.losses.teachers import Head
from cabochon.train.optim import Average
from cabochon.train.parallel import setup
from cabochon.train.policy import PolicyBatch, policy_objective, surrogate
from cabochon.train.policy_config import GroupConfig, PolicyConfig, check_policy
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.step import Measured
from several import together
from support import SMALL, random_ids, small_model

CAPPED = LogitTransform(SMALL.final_softcap, 0.8)

# Advantages


def test_rloo_and_grpo_written_out() -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, 3.0, 2.0, 7.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    rloo = advantages("rloo", rewards, groups, 100.0, "auto")
    # The last one has nobody to be compared with.
    assert rloo.tolist() == pytest.approx([1.0, -1.0, 5 - 2.5, 3 - 3.5, 2 - 4.0, 0.0])
    mean, deviation = (5 + 3 + 2) / 3, math.sqrt(((5 - 10 / 3) ** 2 + (3 - 10 / 3) ** 2 + (2 - 10 / 3) ** 2) / 2)
    grpo = advantages("grpo", rewards, groups, 100.0, "auto")
    wanted = [0.5 / (math.sqrt(0.5) + EPSILON), -0.5 / (math.sqrt(0.5) + EPSILON)]
    wanted += [(r - mean) / (deviation + EPSILON) for r in (5, 3, 2)] + [0.0]
    assert grpo.tolist() == pytest.approx(wanted)
    plain = advantages("grpo", rewards, groups, 100.0, "none")
    assert plain.tolist() == pytest.approx([0.5, -0.5, *(r - mean for r in (5, 3, 2)), 0])
    batch = advantages("rloo", rewards, groups, 0.0, "batch")
    assert batch.tolist() == pytest.approx((rloo / (rewards.std() + EPSILON)).tolist())
    assert advantages("reinforce", rewards, groups, 2.0, "auto").tolist() == [-1, -2, 3, 1, 0, 5]


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 3)), min_size=1, max_size=20))
def test_rloo_is_the_mean_of_the_others(drawn: list[tuple[float, int]]) -> None:
    rewards, groups = torch.tensor([r for r, _ in drawn], dtype=torch.float64), torch.tensor([g for _, g in drawn])
    found = advantages("rloo", rewards, groups, 0.0, "none")
    for place, (reward, group) in enumerate(drawn):
        others = [r for n, (r, g) in enumerate(drawn) if g == group and n != place]
        wanted = reward - sum(others) / len(others) if others else 0
        assert float(found[place]) == pytest.approx(wanted, abs=1e-9)


def scaled(rewards: list[float], groups: list[int]) -> list[float]:
    """Advantages of the answers on this rank, which has two groups at most."""
    ranks = setup("cpu")
    mine = [place for place, group in enumerate(groups) if group // 2 == ranks.rank]
    own = torch.tensor([rewards[place] for place in mine], dtype=torch.float64)
    found: list[float] = advantages(
        "rloo", own, torch.tensor([groups[p] for p in mine], dtype=torch.long), 0.0, "batch", ranks
    ).tolist()
    return found


def test_a_batch_is_that_of_all_ranks() -> None:
    rewards, groups = [1.0, 0.0, 5.0, 3.0, 2.0, 7.0], [0, 0, 1, 1, 2, 2]
    whole = advantages("rloo", torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), 0.0, "batch").tolist()
    parts = together(2, scaled, rewards, groups)
    assert [*parts[0], *parts[1]] == pytest.approx(whole, rel=1e-12)
    shared = together(2, scaled, rewards[:4], groups[:4])  # the other rank has no answer
    alone = advantages("rloo", torch.tensor(rewards[:4], dtype=torch.float64), torch.tensor(groups[:4]), 0.0, "batch")
    assert shared == [pytest.approx(alone.tolist(), rel=1e-12), []]


def test_no_answers_at_all() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    for estimator in ("reinforce", "rloo", "grpo"):
        assert advantages(estimator, nothing, torch.zeros(0, dtype=torch.long), 0.0, "auto").tolist() == []


@pytest.mark.parametrize(("estimator", "factor"), [("reinforce", 1.0), ("rloo", 1.0), ("grpo", 0.75)], ids=str)
def test_estimators_are_unbiased_on_a_bandit(estimator: Any, factor: float) -> None:
    """Three arms, rewards known, logits as parameters: the gradient of the expected reward is p_k (r_k - mean)."""
    arms = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    p = logits.softmax(0)
    wanted = p * (arms - p @ arms)
    draw = torch.Generator().manual_seed(1)
    groups, each = 4000, 4
    chosen = torch.multinomial(p, groups * each, replacement=True, generator=draw)
    which = torch.arange(groups).repeat_interleave(each)
    weighed = advantages(estimator, arms[chosen], which, 1.7, "none")
    # d log p_a / d z = [k = a] - p_k
    single = weighed[:, None] * (torch.nn.functional.one_hot(chosen, 3).double() - p)
    per_group = single.view(groups, each, 3).mean(1)  # groups are independent of each other
    mean, error = per_group.mean(0), per_group.std(0) / math.sqrt(groups)
    assert ((mean - factor * wanted).abs() < 4 * error).all()
    # The test can tell: an estimate from the group's own mean is not that of the others' mean.
    other = 0.75 if factor == 1 else 1.0
    assert ((mean - other * wanted).abs() > 4 * error).any()


# The loss of a token


def config(**given_: Any) -> PolicyConfig:
    return PolicyConfig(**given_)


@pytest.mark.parametrize("clip", [0.0, 0.2])
@settings(max_examples=60)
@given(st.floats(-3, 3), st.floats(-9, -0.01), st.floats(-1, 1))
def test_slopes_are_those_of_autograd(clip: float, advantage: float, logprob: float, apart: float) -> None:
    l = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)  # noqa: E741
    a, old = torch.tensor([advantage], dtype=torch.float64), torch.tensor([logprob + apart], dtype=torch.float64)
    ratio = (l - old).exp()
    plain = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) if clip else -a * l
    (slope,) = torch.autograd.grad(plain.sum(), l)
    values, slopes, clipped = surrogate(config(clip=clip), l.detach(), a, old)
    assert float(values) == pytest.approx(float(plain.detach()), abs=1e-12)
    if abs(abs(float(ratio.detach()) - 1) - clip) > 1e-9:  # at the corner itself there are two slopes
        assert float(slopes) == pytest.approx(float(slope), abs=1e-12)
        assert bool(clipped) == (float(slope) == 0) or abs(advantage) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_likelihood_is_cross_entropy_for_minus_l_and_agrees_with_autograd(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "chunk_rows", lambda *_: 3)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=draw, dtype=torch.float64).requires_grad_() for n in (10, 17))
    targets = torch.randint(17, (10,), generator=draw)
    targets[[2, 7]] = IGNORED
    weights = torch.rand(10, generator=draw, dtype=torch.float64)
    offsets = torch.randn(10, generator=draw, dtype=torch.float64)
    head = Head(weight, 5.0)

    def negative(logprobs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return -logprobs, -torch.ones_like(logprobs)

    ours = torch.autograd.grad(likelihood(hidden, head, targets, negative, weights, temperature), (hidden, weight))
    usual = cross_entropy(hidden, head, targets, 1, temperature=temperature, weights=weights)
    for one, other in zip(ours, torch.autograd.grad(usual, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)

    def bent(logprobs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return (logprobs - offsets[rows]) ** 2, 2 * (logprobs - offsets[rows])

    value = likelihood(hidden, head, targets, bent, weights, temperature)
    logits = 5.0 * torch.tanh(hidden @ weight.T / 5.0) / temperature
    kept = targets != IGNORED
    plain_logprobs = logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])[:, 0]
    plain = (weights[kept] * (plain_logprobs - offsets[kept]) ** 2).sum()
    torch.testing.assert_close(value, plain)
    for one, other in zip(
        torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


# The objective of a batch


def batch_of(model: Gemma2, seed: int = 0) -> PolicyBatch:
    draw = torch.Generator().manual_seed(seed)
    ids = random_ids(SMALL, 3, 12, seed)
    targets = random_ids(SMALL, 3, 12, seed + 1)
    targets[:, :4] = IGNORED
    documents = torch.arange(12).ge(7).long().expand(3, 12)
    shape = (3, 12)
    columns = [torch.randn(shape, generator=draw), -5 + torch.rand(shape, generator=draw)]
    columns += [-5 + torch.rand(shape, generator=draw), torch.rand(shape, generator=draw)]
    return PolicyBatch(ids, targets, documents, *columns, {"reward": 0.5})


@pytest.mark.parametrize(
    "chosen",
    [{}, {"clip": 0.2}, {"kl_in": "loss", "beta": 0.3}, {"estimator": "grpo", "clip": 0.3, "beta": 0.2}],
    ids=lambda chosen: "-".join(chosen) or "plain",
)
def test_loss_and_gradient_against_plain_autograd(chosen: dict[str, Any]) -> None:
    model, settings_ = small_model().double(), config(**chosen)
    batch = batch_of(model)
    # Log-probabilities near the old ones, so that some tokens are clipped and some are not.
    seen = look(of_model(model), of_model(model), batch, CAPPED, SMALL.vocab_size)
    apart = torch.randn(3, 12, generator=torch.Generator().manual_seed(5)) * 0.4
    batch = replace(batch, old=seen.logprobs + apart, reference=seen.logprobs - apart.flip(1))
    found = policy_objective(settings_, 0.8)(model, batch, batch.num_targets)
    assert isinstance(found, Measured)
    ours = torch.autograd.grad(found.loss, list(model.parameters()))

    kept = batch.targets != IGNORED
    logits = model(batch.ids, documents=batch.documents).double() / 0.8
    l = logits.log_softmax(-1)[kept].gather(1, batch.targets[kept][:, None])[:, 0]  # noqa: E741
    a, old, reference, shares = (t.double()[kept] for t in (batch.advantages, batch.old, batch.reference, batch.shares))
    ratio = (l - old).exp()
    clip = settings_.clip
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) if clip else -l * a
    if settings_.kl_is_in_loss:
        loss = loss + settings_.beta * ((reference - l).exp() - (reference - l) - 1)
    plain = (loss * shares).sum()
    torch.testing.assert_close(found.loss.double(), plain, rtol=1e-6, atol=1e-7)
    for one, other in zip(ours, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found.measures["reward"] == pytest.approx(0.5)
    if clip:
        assert 0 < found.measures["clipped"] < 1


def test_parts_of_a_batch_add_up() -> None:
    model, objective = small_model(), policy_objective(config(), 1.0)
    batch = batch_of(model)
    whole = objective(model, batch, batch.num_targets)
    parts = [objective(model, part, batch.num_targets) for part in batch.split(1)]
    assert sum(float(part.loss.detach()) for part in parts) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    assert sum(part.measures["reward"] for part in parts) == pytest.approx(0.5)


# What policy and reference say


@pytest.mark.parametrize("vocab_size", [211, 224])  # the kernel takes multiples of 16
def test_look_against_whole_logits(vocab_size: int) -> None:
    ours, theirs = (small_model(replace(SMALL, vocab_size=vocab_size), seed=seed) for seed in (0, 1))
    batch = batch_of(ours)
    seen = look(of_model(ours), of_model(theirs), batch, replace(CAPPED, temperature=0.7), SMALL.vocab_size)
    p, q = ((model(batch.ids, documents=batch.documents) / 0.7).log_softmax(-1).double() for model in (ours, theirs))
    kept = batch.targets != IGNORED
    wanted = batch.targets.clamp_min(0)[..., None]
    for found, plain in (
        (seen.logprobs, p.gather(2, wanted)[..., 0]), (seen.reference, q.gather(2, wanted)[..., 0]),
        (seen.entropy, -(p.exp() * p).sum(-1)), (seen.kl, (p.exp() * (p - q)).sum(-1)),
    ):  # fmt: skip
        torch.testing.assert_close(found[kept].double(), plain[kept], rtol=1e-4, atol=1e-5)
        assert not found[~kept].any()


def test_the_average_is_seen_without_touching_the_model() -> None:
    model, batch = small_model(), batch_of(small_model())
    average = Average(model, 0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = model(batch.ids, documents=batch.documents).detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    view, capped = of_average(model, average), replace(CAPPED, temperature=1.0).apply
    old = capped(view.raw(view.hidden(batch))).view_as(start)
    torch.testing.assert_close(old, start)
    average.update(model)
    mixed = {name: 0.9 * before[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    other = small_model()
    other.load_state_dict(mixed)
    new = capped(view.raw(view.hidden(batch))).view_as(start)
    torch.testing.assert_close(new, other(batch.ids, documents=batch.documents), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(new, start) and not torch.allclose(new, model(batch.ids, documents=batch.documents))


def test_beneath_adapters_is_the_start() -> None:
    model, batch = small_model(), batch_of(small_model())
    start = model.hidden(batch.ids, documents=batch.documents).detach().flatten(0, 1)
    attach(model, LoraConfig(rank=4))
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.normal_()
        view = beneath_adapters(model)
        torch.testing.assert_close(view.hidden(batch), start)
        assert not torch.allclose(of_model(model).hidden(batch), start)


# What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"passes": 2}, {"passes": 0}, {"mu": 0.0}, {"mu": 1.0}, {"beta": -1.0}, {"beta": math.nan}, {"clip": math.inf},
        {"estimator": "ppo"}, {"kl_in": "both"}, {"reference": "teacher"}, {"ema": 0.99}, {"label_smoothing": 0.1},
        {"z_loss": 1e-4}, {"kl_budget": -1.0}, {"over": "words"}, {"advantage_scale": "mad"}, {"length_penalty": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PolicyConfig(**wrong)


def test_groups_of_one_cannot_be_compared() -> None:
    for estimator in ("rloo", "grpo"):
        with pytest.raises(UsageError, match="--samples"):
            check_policy(config(estimator=estimator), RolloutConfig(samples=1))
    check_policy(config(estimator="reinforce"), RolloutConfig(samples=1))
    with pytest.raises(UsageError, match="temperature"):
        check_policy(config(), GroupConfig(sample_temperature=0))
