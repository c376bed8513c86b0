"""Answers with what they were worth: against sums written out, failures left out, budgets, passes, going on."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from cabochon.base.errors import BadInput
from cabochon.data.config import DataConfig
from cabochon.data.pack import IGNORED
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.anchor import View, of_model
from cabochon.train.loop import Halted
from cabochon.train.on_policy import open_rollouts, prompts_of
from cabochon.train.policy import PolicyBatch, policy_objective
from cabochon.train.policy_config import PolicyConfig
from cabochon.train.policy_stream import PolicyStream, Worth
from cabochon.train.rollout import RolloutStream
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.scoring import Failure, Rewards, Sample, Score
from cabochon.train.step import Trainer
from cabochon.weights.hub import built_in
from support import small_model

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=96,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(built_in())


class Scores:
    """A reward made of a function of the answer."""

    def __init__(self, function: Callable[[Sample], Score]) -> None:
        self.function = function
        self.seen: list[Sample] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        self.seen += samples
        return [self.function(sample) for sample in samples]

    def close(self) -> None:
        pass


def length_of(sample: Sample) -> Score:
    return len(sample.completion) / 10


@pytest.fixture
def opened(tokenizer: Tokenizer, tmp_path: Any) -> Callable[..., PolicyStream]:
    """Opens a stream over six prompts, two a step with three answers each."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in range(6)))

    def open_(
        scorers: Mapping[str, Any] | None = None,
        *,
        model: Gemma2 | None = None,
        reference: View | None = None,
        limit: int = 100,
        temperature: float = 1.0,
        **chosen: Any,
    ) -> PolicyStream:
        model = model or small_model(CONFIG, size=0.2)
        config = PolicyConfig(steps=9, length=64, precision="float32", **chosen)
        trainer = Trainer(model, config, policy_objective(config, temperature))
        rollouts = RolloutConfig(
            prompts_per_step=2, samples=3, max_new_tokens=10, sample_temperature=temperature, side_by_side=6
        )
        asked = prompts_of(DataConfig(sources=(str(prompts),)), tokenizer, config, rollouts)
        stream = open_rollouts(model, tokenizer, asked, config, rollouts)
        worth = Worth(
            Rewards(scorers or {"length": Scores(length_of)}), limit, tokenizer,
            reference or of_model(small_model(CONFIG, seed=1, size=0.2)), lambda step: f"take that before {step}",
        )  # fmt: skip
        return PolicyStream(stream, trainer, worth)

    return open_


def answers(stream: PolicyStream, batch: PolicyBatch) -> list[dict[str, Any]]:
    """What a batch says of each answer, the answers told apart by row and document."""
    found = []
    for row in range(len(batch.ids)):
        for document in batch.documents[row].unique():
            inside = batch.documents[row] == document
            there = inside & (batch.targets[row] != IGNORED)
            if there.any():
                ids, targets = batch.ids[row][inside].tolist(), batch.targets[row][there].tolist()
                found.append({
                    "ids": [*ids, targets[-1]], "prompt": tuple([*ids, 0][: -len(targets)]), "targets": targets,
                    "old": batch.old[row][there].double(), "reference": batch.reference[row][there].double(),
                    "advantage": batch.advantages[row][there], "shares": batch.shares[row][there],
                })  # fmt: skip
    return found


def test_a_batch_written_out(opened: Callable[..., PolicyStream], tokenizer: Tokenizer) -> None:
    scores = Scores(length_of)
    stream = opened({"length": scores}, beta=0.25, length_penalty=0.125, temperature=0.8)
    batch = next(stream)
    stops = stream.rollouts.sampler.engine.stop_ids
    found = answers(stream, batch)
    assert len(found) == 6 and {sample.prompt for sample in scores.seen} <= {f"What is {n} + 1?" for n in range(6)}
    model, groups = stream.trainer.model, {}
    for one in found:
        text = tokenizer.decode([i for i in one["targets"] if i not in stops])
        assert text in [sample.completion for sample in scores.seen]
        kl = float((one["old"] - one["reference"]).sum())
        one["reward"] = len(text) / 10 - 0.125 * len(one["targets"]) - 0.25 * kl
        groups.setdefault(one["prompt"], []).append(one)
        said = (model(torch.tensor([one["ids"]]))[0, -len(one["targets"]) - 1 : -1] / 0.8).log_softmax(-1)
        plain = said.gather(1, torch.tensor(one["targets"])[:, None])[:, 0]
        torch.testing.assert_close(one["old"].float(), plain, rtol=1e-4, atol=1e-4)
    assert [len(group) for group in groups.values()] == [3, 3]
    for group in groups.values():
        for one in group:
            others = [other["reward"] for other in group if other is not one]
            wanted = torch.full_like(one["advantage"], one["reward"] - sum(others) / 2)
            torch.testing.assert_close(one["advantage"], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one["shares"], torch.full_like(one["shares"], 1 / 6))
    assert batch.measures["reward"] == pytest.approx(sum(map(length_of, scores.seen)) / 6)
    assert batch.measures["length"] == pytest.approx(sum(len(one["targets"]) for one in found) / 6)
    assert batch.measures["kl"] > 0 and batch.measures["entropy"] > 0 and batch.measures["failed"] == 0


@pytest.mark.parametrize(("over", "estimator"), [("auto", "grpo"), ("tokens", "rloo")])
def test_how_tokens_count(opened: Callable[..., PolicyStream], over: str, estimator: str) -> None:
    stream = opened(over=over, estimator=estimator)
    batch = next(stream)
    found = answers(stream, batch)
    total = sum(len(one["targets"]) for one in found)
    for one in found:
        wanted = 1 / (6 * len(one["targets"])) if over == "auto" else 1 / total
        torch.testing.assert_close(one["shares"], torch.full_like(one["shares"], wanted))
    assert not batch.shares[batch.targets == IGNORED].any()


def test_kl_in_the_loss_leaves_rewards_alone(opened: Callable[..., PolicyStream]) -> None:
    with_kl, without = (next(opened(kl_in=place, beta=beta)) for place, beta in (("loss", 5.0), ("reward", 0.0)))
    torch.testing.assert_close(with_kl.advantages, without.advantages)


def test_reinforce_expects_what_came_before(opened: Callable[..., PolicyStream]) -> None:
    values = iter([1.0] * 6 + [3.0] * 6 + [0.0] * 6)
    stream = opened({"r": Scores(lambda _: next(values))}, estimator="reinforce", beta=0.0)
    weighed = [float(next(stream).advantages.max()), float(next(stream).advantages.max())]
    assert weighed == pytest.approx([1.0, 3.0 - 1.0])
    assert float(next(stream).advantages.min()) == pytest.approx(0 - (0.9 * 1 + 0.1 * 3))


def test_answers_without_a_reward_are_left_out_up_to_a_limit(opened: Callable[..., PolicyStream]) -> None:
    calls = iter(range(1000))

    def every_third(sample: Sample) -> Score:
        number = next(calls)
        return [Failure("no idea"), float("nan"), 1.0, 2.0, 3.0, 4.0][number % 6]

    stream = opened({"r": Scores(every_third)}, limit=4)
    batch = next(stream)
    found = answers(stream, batch)
    assert len(found) == 4 and batch.measures["failed"] == pytest.approx(2 / 6) and batch.measures["reward"] == 2.5
    alone = [one for one in found if sum(other["prompt"] == one["prompt"] for other in found) == 1]
    assert len(alone) == 1 and not alone[0]["advantage"].any()  # nobody left to compare it with
    next(stream)
    before = stream.state()
    with pytest.raises(Halted, match=r"6 answers got no reward(.|\n)*r: (no idea|it gave nan)"):
        next(stream)
    assert stream.state() == before and before["failed"] == 4
    assert "4 answers got no reward" in " ".join(stream.remarks())


def test_a_step_without_any_reward_teaches_nothing(opened: Callable[..., PolicyStream]) -> None:
    stream = opened({"r": Scores(lambda _: Failure("never"))})
    batch = next(stream)
    assert batch.num_targets == 0
    weights = {name: p.detach().clone() for name, p in stream.trainer.model.named_parameters()}
    report = stream.trainer.step(batch)
    assert report.loss == 0 and report.grad_norm == 0 and report.measures["failed"] == 0  # no target to weigh it by
    decayed = stream.trainer.config.learning_rate * stream.trainer.config.weight_decay
    for name, p in stream.trainer.model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=2 * decayed + 1e-6, atol=1e-7)


def test_a_kl_budget_ends_the_run(opened: Callable[..., PolicyStream]) -> None:
    model = small_model(CONFIG, size=0.2)
    stream = opened(model=model, reference=of_model(model), kl_budget=0.001)
    assert next(stream).measures["kl"] == pytest.approx(0, abs=1e-6)
    stream = opened(kl_budget=0.001)
    before = stream.state()
    with pytest.raises(BadInput, match=r"nats per token(.|\n)*--kl-budget 0.001(.|\n)*take that before 0") as raised:
        next(stream)
    assert not isinstance(raised.value, Halted)  # these weights are not to be kept
    assert stream.state() == before


def test_passes_serve_the_same_answers_and_a_checkpoint_between_them_holds_these(
    opened: Callable[..., PolicyStream],
) -> None:
    stream = opened(passes=3, clip=0.2)
    first, second = next(stream), next(stream)
    assert second is first
    state = json.loads(json.dumps(stream.state()))
    third, fourth = next(stream), next(stream)
    assert third is first and fourth is not first
    other = opened(passes=3, clip=0.2, model=small_model(CONFIG, seed=9, size=0.2))  # weights have moved on
    other.restore(state)
    again = next(other)
    for name in ("ids", "targets", "documents", "advantages", "old", "reference", "shares"):
        one, two = getattr(again, name), getattr(first, name)
        assert one.dtype == two.dtype and torch.equal(one, two), name
    assert again.measures == first.measures
    assert not torch.equal(next(other).old, first.old)  # the next ones are new


def test_it_goes_on_where_it_was(opened: Callable[..., PolicyStream]) -> None:
    stream = opened(estimator="reinforce")
    next(stream)
    state = json.loads(json.dumps(stream.state()))
    wanted, other = next(stream), opened(estimator="reinforce")
    other.restore(state)
    found = next(other)
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.advantages, wanted.advantages)


def test_engine_and_trainer_agree(opened: Callable[..., PolicyStream]) -> None:
    stream = opened()
    source: RolloutStream = stream.rollouts
    state = source.state()
    drawn = next(source)
    source.restore(state)
    batch = next(stream)
    torch.testing.assert_close(batch.old, drawn.logprobs, rtol=0, atol=1e-5)
