"""Answers of a model in training: from its own weights as they are, packed with what objectives need."""

import copy
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.prompts import Prompt, Prompts, open_prompts
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraConfig, adapter_parameters, attach
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.config import TrainConfig
from cabochon.train.objectives import next_tokens
from cabochon.train.ranks import Ranks
from cabochon.train.rollout import Rollout, RolloutBatch, RolloutStream, pack_rollouts
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.sampler import Answer, Sampler
from cabochon.train.step import Trainer
from cabochon.weights.hub import built_in
from support import SMALL, random_ids, small_model

STOP = frozenset({7})
PROMPTS = [random_ids(SMALL, 1, length, length)[0].tolist() for length in (3, 40, 9)]
SEEDS = [5, 6, 7]


def sampler(model: Gemma2, precision: str = "float32", **settings: int | float) -> Sampler:
    config = RolloutConfig(**{"samples": 2, "max_new_tokens": 12, **settings})
    return Sampler(model, STOP, config, longest=64, precision=precision)


@torch.no_grad()
def logprobs(model: Gemma2, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Of an answer's tokens, by the plain network."""
    ids = torch.tensor([[*prompt, *answer]])
    rows = model(ids)[0, len(prompt) - 1 : -1].double().log_softmax(1)
    return rows.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("vocab_size", [211, 224])  # kernels take whole registers
def test_log_probabilities_are_those_of_the_trainer(vocab_size: int) -> None:
    model = small_model(SMALL.with_vocabulary(vocab_size))
    for prompt, group in zip(PROMPTS, sampler(model, sample_temperature=0.7).sample(PROMPTS, SEEDS), strict=True):
        for answer in group:
            expected = logprobs(model, prompt, answer.ids)
            assert torch.allclose(torch.tensor(answer.logprobs).double(), expected, atol=1e-5)
            assert answer.cut == (answer.ids[-1] not in STOP)


def test_seeds_decide() -> None:
    model = small_model()
    first, again = (sampler(model).sample(PROMPTS, SEEDS) for _ in range(2))
    assert first == again
    assert first[0][0].ids != first[0][1].ids
    assert sampler(model).sample(PROMPTS, [8, 6, 7])[0] != first[0]
    alone = sampler(model, side_by_side=1).sample(PROMPTS, SEEDS)
    assert [[a.ids for a in group] for group in alone] == [[a.ids for a in group] for group in first]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_is_remembered_lasts_as_long_as_the_weights(precision: str) -> None:
    model = small_model()
    one = sampler(model, precision)
    before = one.sample(PROMPTS, SEEDS)
    known = len(one.engine.prefixes)
    reused = one.sample(PROMPTS, SEEDS)
    if precision == "float32":  # bfloat16 falls on another side of a near-tie when pieces are read together
        assert [[a.ids for a in group] for group in reused] == [[a.ids for a in group] for group in before]
    assert len(one.engine.prefixes) >= known > 0  # nothing was forgotten
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    changed = one.sample(PROMPTS, SEEDS)
    assert changed == sampler(model, precision).sample(PROMPTS, SEEDS)  # as if nothing had been known
    assert changed != before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_is_a_change(optimizer: str) -> None:
    model = small_model()
    settings = {"steps": 1, "optimizer": optimizer, "warmup_steps": 0, "precision": "float32"}
    config = TrainConfig(**settings, learning_rate=0.1, matrix_learning_rate=0.1)
    trainer, one = Trainer(model, config, next_tokens(config)), sampler(model)
    one.sample(PROMPTS, SEEDS)
    ids = random_ids(SMALL, 2, 31)
    trainer.step(Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:])))
    assert one.sample(PROMPTS, SEEDS) == sampler(model).sample(PROMPTS, SEEDS)


def test_with_bf16_products_a_copy_writes_and_goes() -> None:
    model = small_model()
    rounded = copy.deepcopy(model).bfloat16()
    one = sampler(model, "bf16")
    assert one.engine.model is not model
    plain = Sampler(rounded, STOP, one.config, longest=64).sample(PROMPTS, SEEDS)
    assert one.sample(PROMPTS, SEEDS) == plain
    assert sum(p.numel() for p in one.engine.model.parameters()) == 0
    assert sampler(model).engine.model is model  # with float32 there is no copy


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_adapters_write_as_they_are(precision: str) -> None:
    model = small_model()
    base = sampler(model).sample(PROMPTS, SEEDS)
    attach(model, LoraConfig(rank=2, alpha=4, dropout=0.5))
    one = sampler(model, precision)
    if precision == "float32":
        assert one.sample(PROMPTS, SEEDS) == base
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(0.3)
    model.train()
    prompt, answer = PROMPTS[1], one.sample(PROMPTS, SEEDS)[1][0]
    assert model.training
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = logprobs(model.eval(), prompt, answer.ids)
    tolerance = 1e-5 if precision == "float32" else 0.1
    assert torch.allclose(torch.tensor(answer.logprobs).double(), expected, atol=tolerance)


def test_split_layers_and_adapters_of_several_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="split layers"):
        Sampler(small_model(), STOP, RolloutConfig(), longest=64, ranks=Ranks(world=2, tensor_parallel=2))
    adapted = small_model()
    attach(adapted, LoraConfig(rank=2, alpha=4))
    with pytest.raises(UsageError, match="adapters on several"):
        Sampler(adapted, STOP, RolloutConfig(), longest=64, ranks=Ranks(world=2))


def made(lengths: Sequence[tuple[int, int]]) -> list[Rollout]:
    """Rollouts of prompts and answers of these lengths; no token comes twice."""
    ids = iter(range(10**6))
    found = []
    for group, (asked, said) in enumerate(lengths):
        prompt, answer = ([next(ids) for _ in range(n)] for n in (asked, said))
        found.append(Rollout(Prompt(prompt, {}), Answer(answer, [-i / 8 for i in answer], False), group))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rollouts = made([tuple(draw.integers(1, 20, 2).tolist()) for _ in range(30)])
    batch = pack_rollouts(rollouts, 50)
    assert batch.ids.shape[1] <= 50 and len(batch.ids) <= sum(r.length for r in rollouts) / 50 + 4
    for place, rollout in enumerate(rollouts):
        row, at = (batch.answers == place).nonzero().T
        assert len(row.unique()) == 1 and (at.diff() == 1).all()
        assert batch.targets[row, at].tolist() == rollout.answer.ids
        assert batch.logprobs[row, at].tolist() == rollout.answer.logprobs
        start, end = int(at[0]) - len(rollout.prompt.ids) + 1, int(at[-1]) + 1
        assert batch.ids[row[0], start:end].tolist() == (rollout.prompt.ids + rollout.answer.ids)[:-1]
        document = batch.documents[row[0]]
        assert (document == document[start]).nonzero()[:, 0].tolist() == list(range(start, end))
    assert ((batch.answers >= 0) == (batch.targets != IGNORED)).all()
    assert batch.num_targets == sum(len(rollout.answer.ids) for rollout in rollouts)
    parts = list(batch.split(1))
    assert all(isinstance(part, RolloutBatch) and part.rollouts == batch.rollouts for part in parts)
    assert torch.equal(torch.cat([part.answers for part in parts]), batch.answers)


def test_rows_are_alike_and_short() -> None:
    batch = pack_rollouts(made([(77, 128)] * 8), 1024)
    assert tuple(batch.ids.shape) == (2, 832)
    assert tuple(pack_rollouts([], 1024).ids.shape) == (1, 32)


class _TwoRanks(Ranks):
    def most(self, value: int) -> int:
        return max(value, 3)


def test_all_ranks_have_as_many_rows() -> None:
    assert len(pack_rollouts(made([(5, 5)]), 64, _TwoRanks()).ids) == 3


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    path = tmp_path_factory.mktemp("asked") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i} + 1?", "number": i}) + "\n" for i in range(7)))
    return open_prompts([str(path)], load_tokenizer(built_in()), longest=50)


class _Fake:
    """Answers with the seed that it was given."""

    def __init__(self, **settings: int) -> None:
        self.config = RolloutConfig(**{"prompts_per_step": 4, **settings})
        self.engine = self
        self.stop_ids = STOP

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Answer]]:
        return [[Answer([7 if seed % 2 else 8], [-seed], True)] * self.config.samples for seed in seeds]

    def forget(self) -> None:
        pass


def drawn(stream: RolloutStream) -> list[tuple[int, float]]:
    return [(r.prompt.row["number"], r.answer.logprobs[0]) for r in stream.rollouts()]


def test_every_prompt_once_an_epoch(asked: Prompts) -> None:
    stream = RolloutStream(_Fake(), asked, length=64, seed=3)
    steps = [drawn(stream) for _ in range(7)]
    order = [number for step in steps for number, _ in step]
    epochs = [order[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len({seed for step in steps for _, seed in step}) == 28
    in_order = RolloutStream(_Fake(), asked, length=64, shuffle=False)
    assert [number for number, _ in drawn(in_order)] == [0, 1, 2, 3]
    assert "were cut" in stream.remarks()[0] and "were empty" in stream.remarks()[1]


def test_it_goes_on_where_it_stood(asked: Prompts) -> None:
    stream = RolloutStream(_Fake(), asked, length=64, seed=3)
    steps, states = [], []
    for _ in range(5):
        states.append(json.loads(json.dumps(stream.state())))
        steps.append(drawn(stream))
    for state, step in zip(states, steps, strict=True):
        again = RolloutStream(_Fake(), asked, length=64, seed=3)
        again.restore(state)
        assert drawn(again) == step
    with pytest.raises(UsageError, match="with these prompts"):
        RolloutStream(_Fake(), asked, length=64, seed=4).restore(states[0])


def test_ranks_share_the_prompts_of_a_step(asked: Prompts) -> None:
    whole = drawn(RolloutStream(_Fake(), asked, length=64))
    parts = [drawn(RolloutStream(_Fake(), asked, length=64, ranks=Ranks(rank, 2))) for rank in (0, 1)]
    assert [parts[place % 2][place // 2] for place in range(4)] == whole
    with pytest.raises(UsageError, match="cannot be shared"):
        RolloutStream(_Fake(prompts_per_step=3), asked, length=64, ranks=Ranks(0, 2))


def test_a_step_is_the_same_in_a_process_that_has_just_begun(asked: Prompts) -> None:
    """What earlier steps asked would change the last bits: prompts that are partly known are read in other pieces."""
    torch.manual_seed(0)
    config = SMALL.with_vocabulary(4096)
    model = small_model(config)

    def stream() -> RolloutStream:
        return RolloutStream(sampler(model, prompts_per_step=4), asked, length=64)

    long, fresh = stream(), stream()
    next(long)
    fresh.restore(long.state())
    first, second = next(long), next(fresh)
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, next(long).ids)


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("max_new_tokens", 0), ("sample_temperature", -1.0)])
def test_settings_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        RolloutConfig(**{name: value})
