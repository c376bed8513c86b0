"""On-policy distillation: the student writes, the teacher says what it thinks of every token (arXiv 2306.13649).

Of all batches a share, lambda there, is written by the student; the others come from data. The gradient does not pass
through the draws, as there (algorithm 1).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.data.config import DataConfig
from cabochon.data.order import random_state
from cabochon.data.pack import Batch
from cabochon.data.prompts import Prompts, open_prompts
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer
from cabochon.train.config import TrainConfig
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.rollout import RolloutBatch, RolloutStream
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.run import Stream
from cabochon.train.sampler import Sampler
from cabochon.train.step import Measured, Objective

_SHARE = 0x53484152  # what random numbers are for


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """What the student writes answers to, and how. Raises `UsageError` when the share is none.

    Args:
        prompts: rows that ask something (`data/prompts.py`); `epochs` counts how often each is answered.
        rollouts: how answers are drawn.
        share: of the batches, above 0; the others come from data.
    """

    prompts: DataConfig
    rollouts: RolloutConfig = RolloutConfig()
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(
                f"the student cannot write a share of {self.share} of the batches",
                "it has to be above 0 and at most 1",
                "give another value (--on-policy), or leave out --prompts to learn from data alone",
            )

    def settled(self) -> dict[str, Any]:
        """What a run that goes on has to have the same."""
        prompts = {f"prompts_{name}": value for name, value in self.prompts.settled().items()}
        return prompts | self.rollouts.settled() | {"on_policy": self.share}


def prompts_of(data: DataConfig, tokenizer: Tokenizer, train: TrainConfig, rollouts: RolloutConfig) -> Prompts:
    """The prompts that fit rows of `train.length` together with an answer. Raises as `open_prompts`."""
    longest = train.length + 1 - rollouts.max_new_tokens  # the last token of an answer is only a target
    if longest < 2:
        raise UsageError(
            f"answers of {rollouts.max_new_tokens} tokens leave no room for a prompt",
            f"a prompt and its answer may have {train.length} together",
            "make rows longer (--length), or answers shorter (--max-new-tokens)",
        )
    return open_prompts(data.sources, tokenizer, longest=longest, fold=data.fold_system, max_bad_rows=data.max_bad_rows)


def steps_of(prompts: Prompts, settings: OnPolicy) -> int:
    """Steps until the student has answered each prompt as often as there are epochs."""
    each = settings.rollouts.prompts_per_step * settings.share
    return math.ceil(len(prompts) * (settings.prompts.epochs or 1) / each)


def open_rollouts(
    model: Gemma2,
    tokenizer: Tokenizer,
    prompts: Prompts,
    train: TrainConfig,
    rollouts: RolloutConfig,
    *,
    shuffle: bool = True,
    ranks: Ranks = SINGLE,
) -> RolloutStream:
    """Batches of answers by a model in training to `prompts_of` the same settings. Raises as what it is made of."""
    sampler = Sampler(
        model,
        tokenizer.stop_ids | frozenset(model.config.eos_ids),
        rollouts,
        longest=min(prompts.longest + rollouts.max_new_tokens, model.config.max_position),
        precision=train.precision,
        ranks=ranks,
    )
    return RolloutStream(sampler, prompts, length=train.length, seed=train.seed, shuffle=shuffle, ranks=ranks)


class MixedStream:
    """A `Stream` that for each step draws, the same on all ranks, whether the student writes its batch.

    Args:
        written: batches that the student writes.
        given: batches of data, without end.
        share: of the batches that are written.
        seed: of the draws.
    """

    def __init__(self, written: RolloutStream, given: Stream, share: float, seed: int) -> None:
        self.written, self.given, self._share, self._seed = written, given, share, seed
        self._steps = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        written = random_state(self._seed, _SHARE, self._steps).random_sample() < self._share
        batch = next(self.written if written else self.given)
        self._steps += 1
        return batch

    def state(self) -> dict[str, Any]:
        """That of the data, which `merge_states` knows how to merge, with the little that is the same on all ranks."""
        return self.given.state() | {"written": self.written.state(), "steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises as both streams do."""
        self.given.restore(dict(state))
        self.written.restore(state["written"])
        self._steps = int(state["steps"])

    def empty(self) -> Batch:
        """A batch of nothing."""
        return self.given.empty()

    def remarks(self) -> list[str]:
        """Those of both."""
        return [*self.written.remarks(), *self.given.remarks()]


def by_batch(written: Objective, given: Objective) -> Objective:
    """One objective for batches that the student wrote, with what is to be told of them, and one for all others."""

    def loss(model: Gemma2, batch: Batch, count: float) -> Tensor | Measured:
        if not isinstance(batch, RolloutBatch):
            return given(model, batch, count)
        value = written(model, batch, count)
        assert isinstance(value, Tensor)
        weight = batch.num_targets / count  # so that parts and ranks add up to a mean
        told = {
            "answer_tokens": sum(len(one.answer.ids) for one in batch.rollouts) / len(batch.rollouts),
            "cut": sum(one.answer.cut for one in batch.rollouts) / len(batch.rollouts),
        }
        return Measured(value, {name: weight * number for name, number in told.items()})

    return loss
