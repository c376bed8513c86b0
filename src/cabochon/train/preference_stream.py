"""Online preference optimisation: pairs of the trained model's own answers, ranked by a reward (arXiv 2402.04792).

Of the answers to a prompt the best and the worst become a pair, where their rewards differ. As with all rollouts, what
comes out is a function of the seed, the step and the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Self

from cabochon.base.errors import BadInput
from cabochon.data.pack import Batch, as_batch
from cabochon.text.tokenizer import Tokenizer
from cabochon.train.loop import Halted
from cabochon.train.policy_stream import sample_of
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.rollout import Rollout, RolloutStream, shared_out
from cabochon.train.scoring import Rewards, Scored, check_failures

PATIENCE = 16  # steps in a row without any pair, on any device

Pair = tuple[Rollout, Rollout]  # the better answer and the worse one


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs as `Batch` has them, with means over all answers that they were chosen from, to be logged."""

    measures: Mapping[str, float] = field(default_factory=dict)

    def split(self, rows: int) -> "Iterator[PairBatch]":
        """The batch in pieces of so many rows."""
        return (PairBatch(p.ids, p.targets, p.documents, self.measures) for p in super().split(rows))


def pack_pairs(pairs: Sequence[Pair], length: int, ranks: Ranks = SINGLE) -> Batch:
    """Pairs in as few rows as they fit, as documents 2k and 2k + 1. No two answers may be longer than `length`."""
    rows, tables = shared_out([better.length + worse.length for better, worse in pairs], length, ranks)
    for places, table in zip(rows, tables, strict=True):
        for place in places:
            for rollout in pairs[place]:
                table.add(rollout.pairs())
    return as_batch(tables)


def chosen_pairs(scored: Sequence[tuple[Rollout, float]]) -> list[Pair]:
    """The best and the worst answer to each prompt, if they differ in reward; of equal ones the first drawn."""
    found = []
    for _, group in groupby(scored, key=lambda one: one[0].group):
        answers = list(group)
        best, worst = (choose(answers, key=lambda one: one[1]) for choose in (max, min))
        if best[1] > worst[1]:
            found.append((best[0], worst[0]))
    return found


class PairStream:
    """A `Stream` without end.

    Args:
        rollouts: answers of the trained model.
        rewards: of the answers.
        most_failures: answers without one, over the whole run, before it stops.
        tokenizer: for the text of answers.
        length: positions of a row at most; two answers with their prompts have to fit.
        ranks: of the run.
    """

    def __init__(
        self,
        rollouts: RolloutStream,
        rewards: Rewards,
        most_failures: int,
        tokenizer: Tokenizer,
        *,
        length: int,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.rollouts, self.rewards, self.tokenizer = rollouts, rewards, tokenizer
        self._length, self._ranks, self._most_failures = length, ranks, most_failures
        self.failed = 0  # answers without a reward

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PairBatch:
        """Raises `Halted` for too many answers without a reward, and when no answers differ any more."""
        before = self.state()
        try:
            return self._next()
        except Halted:
            self.restore(before)
            raise

    def _next(self) -> PairBatch:
        drawn: list[tuple[Rollout, Scored]] = []
        prompts = 0
        for _ in range(PATIENCE):
            new = self._drawn()
            drawn += new
            prompts += len({rollout.group for rollout, _ in new})
            pairs = chosen_pairs([(rollout, one.total) for rollout, one in new if one.total is not None])
            if self._ranks.most(len(pairs)):
                batch = pack_pairs(pairs, self._length, self._ranks)
                measures = self._measures(drawn) | {"decided": self._mean([len(pairs)], prompts)}
                return PairBatch(batch.ids, batch.targets, batch.documents, measures)
        raise Halted(
            "no pair of answers was found",
            f"the answers to each prompt were worth the same, {PATIENCE} steps in a row",
            "ask what the model can neither always nor never do, or raise --samples or --sample-temperature",
        )

    def _drawn(self) -> list[tuple[Rollout, Scored]]:
        rollouts, stops = self.rollouts.rollouts(), self.rollouts.sampler.engine.stop_ids
        scored = self.rewards([sample_of(rollout, self.tokenizer, stops) for rollout in rollouts])
        reasons = [one.reason for one in scored if one.total is None]
        self.failed += int(self._ranks.total(len(reasons)))
        try:
            check_failures(self.failed, self._most_failures, reasons[-1] if reasons else "on another process")
        except BadInput as error:
            raise Halted(error.what, error.cause, error.hint) from None
        return list(zip(rollouts, scored, strict=True))

    def _measures(self, drawn: Sequence[tuple[Rollout, Scored]]) -> dict[str, float]:
        totals = [one.total for _, one in drawn if one.total is not None]
        return {
            "reward": self._mean(totals, len(totals)),
            "length": self._mean([len(rollout.answer.ids) for rollout, _ in drawn], len(drawn)),
            "cut": self._mean([rollout.answer.cut for rollout, _ in drawn], len(drawn)),
            "failed": self._mean([one.total is None for _, one in drawn], len(drawn)),
        }

    def _mean(self, values: Sequence[float], count: int) -> float:
        """Over all ranks; at least one has found a pair, so that none of these is empty."""
        return self._ranks.total(float(sum(values))) / self._ranks.total(count)

    def state(self) -> dict[str, Any]:
        """JSON-able: what comes next."""
        return self.rollouts.state() | {"failed": self.failed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises as the rollouts do."""
        self.rollouts.restore(state)
        self.failed = int(state["failed"])

    def empty(self) -> PairBatch:
        """A batch without pairs."""
        batch = self.rollouts.empty()
        return PairBatch(batch.ids, batch.targets, batch.documents)

    def remarks(self) -> list[str]:
        """Those of the rollouts, and how many answers had no reward."""
        failed = [f"{self.failed} answers got no reward and were left out"] if self.failed else []
        return [*self.rollouts.remarks(), *failed]
