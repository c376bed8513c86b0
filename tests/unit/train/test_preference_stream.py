"""Pairs of a model's own answers: which they are, how they are packed, what is told of them, and when it ends."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cabochon.data.config import DataConfig
from cabochon.data.prompts import Prompt
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.loop import Halted
from cabochon.train.on_policy import open_rollouts, prompts_of
from cabochon.train.preference import pair_count, pairs_of, preference
from cabochon.train.preference_config import PreferenceConfig
from cabochon.train.preference_stream import PATIENCE, PairStream, chosen_pairs, pack_pairs
from cabochon.train.rollout import Rollout
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.sampler import Answer
from cabochon.train.scoring import Failure, Rewards, Sample, Score
from cabochon.train.step import Trainer
from cabochon.weights.hub import built_in
from support import small_model

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(built_in())


class Scores:
    """A reward made of a function of the answer."""

    def __init__(self, function: Callable[[Sample], Score]) -> None:
        self.function = function
        self.seen: list[tuple[Sample, Score]] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        found = [self.function(sample) for sample in samples]
        self.seen += zip(samples, found, strict=True)
        return found

    def close(self) -> None:
        pass


def letters(sample: Sample) -> Score:
    return len(sample.completion)


@pytest.fixture
def opened(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., PairStream]:
    """Opens a stream over six prompts, two a step with four answers each."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(6)))

    def open_(scores: Scores, limit: int = 100) -> PairStream:
        model = small_model(CONFIG, size=0.2)
        train = PreferenceConfig(steps=9, length=48, precision="float32")
        how = RolloutConfig(prompts_per_step=2, samples=4, max_new_tokens=8, side_by_side=8)
        asked = prompts_of(DataConfig(sources=(str(prompts),)), tokenizer, train, how)
        rollouts = open_rollouts(model, tokenizer, asked, train, how)
        return PairStream(rollouts, Rewards({"it": scores}), limit, tokenizer, length=96)

    return open_


def texts(batch: Any, tokenizer: Tokenizer) -> list[str]:
    """The answers of a batch in pairs, the chosen one first."""
    pairs = pairs_of(batch)
    targets = batch.targets.flatten()[pairs.counted]
    answers = [targets[pairs.answers == number].tolist() for number in range(2 * len(pairs.lengths))]
    return [tokenizer.decode([t for t in answer if t not in tokenizer.stop_ids]) for answer in answers]


def test_a_batch_is_the_best_and_the_worst(opened: Callable[..., PairStream], tokenizer: Tokenizer) -> None:
    scores = Scores(letters)
    stream = opened(scores)
    batch = next(stream)
    wanted = []
    for first in range(0, 8, 4):
        group = [sample.completion for sample, _ in scores.seen[first : first + 4]]
        wanted.append((max(group, key=len), min(group, key=len)))
    found = texts(batch, tokenizer)
    assert sorted(zip(found[::2], found[1::2], strict=True)) == sorted(wanted)
    mean = sum(len(sample.completion) for sample, _ in scores.seen) / 8
    assert batch.measures["reward"] == pytest.approx(mean) and batch.measures["decided"] == 1
    assert batch.measures["cut"] == 0.875 and 7 < batch.measures["length"] < 8 and batch.measures["failed"] == 0


def rollout(group: int, *ids: int) -> Rollout:
    return Rollout(Prompt([2, 10 + group], {}), Answer(list(ids), [0.0] * len(ids), False), group)


def test_equal_rewards_are_no_pair() -> None:
    answers = [rollout(0, 5, 1), rollout(0, 6, 1), rollout(1, 7, 1), rollout(1, 8, 1), rollout(2, 9, 1)]
    scored = list(zip(answers, [1.0, 1.0, 0.5, 1.0, 3.0], strict=True))
    assert chosen_pairs(scored) == [(answers[3], answers[2])]


def test_pairs_stay_together_in_a_row() -> None:
    pairs = [(rollout(n, *range(20, 21 + n)), rollout(n, 30, 31)) for n in range(5)]
    batch = pack_pairs(pairs, 20)
    found = pairs_of(batch)
    assert len(batch.ids) > 1 and batch.ids.shape[1] <= 20 and pair_count(batch) == 5
    assert sorted(found.lengths.tolist()) == [[n + 1, 2] for n in range(5)]
    assert pair_count(pack_pairs([], 20)) == 0


def test_means_stay_means_in_parts(opened: Callable[..., PairStream]) -> None:
    stream = opened(Scores(letters))
    batch = next(stream)
    for micro_rows in (0, 1):
        config = PreferenceConfig(steps=1, precision="float32", micro_rows=micro_rows)
        model = stream.rollouts.sampler.trained
        trainer = Trainer(model, config, preference(config, small_model(CONFIG, size=0.2)), counted=pair_count)
        measures = trainer.gradients(batch)[2]
        model.zero_grad()
        assert {name: measures[name] for name in batch.measures} == pytest.approx(dict(batch.measures))


def test_it_looks_on_until_answers_differ(opened: Callable[..., PairStream]) -> None:
    seen: list[Sample] = []

    def undecided_at_first(sample: Sample) -> Score:
        seen.append(sample)
        return len(sample.completion) if len(seen) > 16 else 1.0

    batch = next(opened(Scores(undecided_at_first)))
    assert len(seen) == 24 and batch.measures["decided"] == pytest.approx(pair_count(batch) / 6)


def test_it_ends_when_they_never_do(opened: Callable[..., PairStream]) -> None:
    scores = Scores(lambda _: 1.0)
    stream = opened(scores)
    before = stream.state()
    with pytest.raises(Halted, match="no pair"):
        next(stream)
    assert stream.state() == before and len(scores.seen) == 8 * PATIENCE


def test_answers_without_a_reward_are_left_out_and_counted(opened: Callable[..., PairStream]) -> None:
    def partly(sample: Sample) -> Score:
        return len(sample.completion) if len(sample.completion) % 2 else Failure("it is even")

    scores = Scores(partly)
    stream = opened(scores)
    batch = next(stream)
    failed = [isinstance(score, Failure) for _, score in scores.seen]
    assert batch.measures["failed"] == pytest.approx(sum(failed) / len(failed)) and stream.failed == sum(failed) > 0
    assert "got no reward" in stream.remarks()[-1]
    stream = opened(Scores(lambda _: Failure("never")), limit=7)
    with pytest.raises(Halted, match="8 answers got no reward, and 7 may"):
        next(stream)
    assert stream.failed == 0


def test_it_goes_on_where_it_stood(opened: Callable[..., PairStream]) -> None:
    one, other = opened(Scores(letters)), opened(Scores(letters))
    next(one)
    state = json.loads(json.dumps(one.state()))
    wanted = next(one)
    other.restore(state)
    found = next(other)
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.targets, wanted.targets)
    assert found.measures == wanted.measures
