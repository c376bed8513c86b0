"""On-policy batches: answers that the model in training writes to prompts, at the moment when a step asks for them.

What comes out is a function of the seed, the step and the weights. So a run that goes on from a checkpoint writes what
it would have written, and where the stream stands is one number.

Dimension letters: B rows, T positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.data.order import random_state
from cabochon.data.pack import IGNORED, Batch, Ids, Row, as_batch
from cabochon.data.prompts import Prompt, Prompts
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.sampler import Answer, Sampler

_ROUND = 32  # positions of rows are a multiple of this: fewer shapes, for kernels that are made for one
_ORDER, _DRAWS = 0x4F52444C, 0x44524157  # what random numbers are for


@dataclass(frozen=True)
class Rollout:
    """A prompt and one answer to it. `group` tells the prompts of a step apart, on this rank."""

    prompt: Prompt
    answer: Answer
    group: int

    @property
    def length(self) -> int:
        """Positions that it takes in a row: the last token is only a target."""
        return len(self.prompt.ids) + len(self.answer.ids) - 1

    def pairs(self) -> Ids:
        """(input, target) pairs [2, N], a target only where the answer is next."""
        ids = np.array(self.prompt.ids + self.answer.ids, np.int64)
        targets = ids[1:].copy()
        targets[: len(self.prompt.ids) - 1] = IGNORED
        return np.stack([ids[:-1], targets])


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """A batch whose documents are prompts with answers, and whose targets are the answers alone.

    Args:
        logprobs: float32 [B, T], of each target when it was drawn, at temperature 1; 0 elsewhere.
        answers: int64 [B, T], of each target, its place in `rollouts`; -1 elsewhere.
        rollouts: of all rows, also of those that are not in this part.
    """

    logprobs: Tensor
    answers: Tensor
    rollouts: tuple[Rollout, ...]

    def split(self, rows: int) -> "Iterator[RolloutBatch]":
        """The batch in pieces of so many rows."""
        parts = super().split(rows), self.logprobs.split(rows), self.answers.split(rows)
        for part, logprobs, answers in zip(*parts, strict=True):
            yield RolloutBatch(part.ids, part.targets, part.documents, logprobs, answers, self.rollouts)


def pack_rollouts(rollouts: Sequence[Rollout], length: int, ranks: Ranks = SINGLE) -> RolloutBatch:
    """Rollouts in as few rows of at most `length` positions as they fit, none of them split, the rows alike.

    All ranks call it together and get as many rows as each other. None of the rollouts may be longer than `length`.
    """
    rows, tables = shared_out([rollout.length for rollout in rollouts], length, ranks)
    count, width = len(tables), tables[0].table.shape[1]
    logprobs, answers = torch.zeros(count, width), torch.full((count, width), -1)
    for number, (row, table) in enumerate(zip(rows, tables, strict=True)):
        for place in row:
            rollout = rollouts[place]
            end, written = table.used + rollout.length, len(rollout.answer.ids)
            table.add(rollout.pairs())
            logprobs[number, end - written : end] = torch.tensor(rollout.answer.logprobs)
            answers[number, end - written : end] = place
    batch = as_batch(tables)
    return RolloutBatch(batch.ids, batch.targets, batch.documents, logprobs, answers, tuple(rollouts))


def shared_out(lengths: Sequence[int], length: int, ranks: Ranks = SINGLE) -> tuple[list[list[int]], list[Row]]:
    """As few rows of at most `length` positions as documents of these lengths fit, and which of them go into each.

    All ranks call it together and get as many rows as each other, at least one; the rows of a rank are alike.
    """
    sizes = np.array(lengths, np.int64)
    rows = _shared_out(sizes, ranks.most(_rows_needed(sizes, length)))
    longest = max((int(sizes[row].sum()) for row in rows), default=0)
    width = min(length, -(-max(1, longest) // _ROUND) * _ROUND)
    return rows, [Row(width) for _ in rows]


def _rows_needed(sizes: Ids, length: int) -> int:
    count = max(1, -(-int(sizes.sum()) // length))
    while any(sizes[row].sum() > length for row in _shared_out(sizes, count)):
        count += 1
    return count


def _shared_out(sizes: Ids, count: int) -> list[list[int]]:
    """Places of documents for so many rows: the longest first, each into the row that has least."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = np.zeros(count, np.int64)
    for place in np.argsort(-sizes, kind="stable"):
        least = int(loads.argmin())
        rows[least].append(int(place))
        loads[least] += sizes[place]
    return rows


class RolloutStream:
    """A `Stream` without end. Every step answers the next prompts, of which rank r has r, r + world, ...

    Args:
        sampler: writes the answers. It has to take prompts and answers of `length` + 1 tokens.
        prompts: what is asked, in another order in each epoch.
        length: positions of a row at most.
        seed: of the order and of the draws.
        shuffle: otherwise prompts come in their order.

    Raises `UsageError` when ranks cannot have the same number of prompts.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Prompts,
        *,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.sampler, self.prompts, self.config = sampler, prompts, sampler.config
        self._length, self._seed, self._shuffle, self._ranks = length, seed, shuffle, ranks
        self._identity = {"prompts": prompts.identity(), "seed": seed, "shuffle": shuffle}
        self._batches, self._order = 0, (-1, np.zeros(0, np.int64))
        self._tally = {"answers": 0, "cut": 0, "empty": 0}
        if self.config.prompts_per_step % ranks.parts:
            raise UsageError(
                f"{self.config.prompts_per_step} prompts cannot be shared by {ranks.parts} processes",
                "each has to answer the same number of them",
                f"set --prompts-per-step to a multiple of {ranks.parts}",
            )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RolloutBatch:
        return pack_rollouts(self.rollouts(), self._length, self._ranks)

    def rollouts(self) -> list[Rollout]:
        """The answers of the next step on this rank, those to one prompt next to each other."""
        step, each = self._batches, self.config.prompts_per_step
        mine = range(self._ranks.part, each, self._ranks.parts)
        asked = [self.prompts[self._number(step * each + place)] for place in mine]
        seeds = [int(random_state(self._seed, _DRAWS, step, place).randint(2**31)) for place in mine]
        # A process that goes on here knows no prompts, and reading some together with others changes last bits.
        self.sampler.forget()
        answers = self.sampler.sample([prompt.ids for prompt in asked], seeds)
        self._batches += 1
        found = [
            Rollout(prompt, answer, group)
            for group, (prompt, several) in enumerate(zip(asked, answers, strict=True))
            for answer in several
        ]
        self._count(found)
        return found

    def _number(self, place: int) -> int:
        """Of the prompt at a place of the endless sequence of them."""
        epoch, within = divmod(place, len(self.prompts))
        if not self._shuffle:
            return within
        if self._order[0] != epoch:
            self._order = epoch, random_state(self._seed, _ORDER, epoch).permutation(len(self.prompts))
        return int(self._order[1][within])

    def _count(self, rollouts: Sequence[Rollout]) -> None:
        stops = self.sampler.engine.stop_ids
        self._tally["answers"] += len(rollouts)
        self._tally["cut"] += sum(rollout.answer.cut for rollout in rollouts)
        self._tally["empty"] += sum(rollout.answer.ids[0] in stops for rollout in rollouts)

    def state(self) -> dict[str, Any]:
        """JSON-able: what comes next."""
        return {"data": self._identity, "batches": self._batches}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises `UsageError` when the prompts or their order are others."""
        if state["data"] != self._identity:
            raise UsageError(
                "the run cannot go on with these prompts",
                "they are not those that it began with",
                "give the same --prompts, or name a new folder with --out",
            )
        self._batches = int(state["batches"])

    def empty(self) -> RolloutBatch:
        """A batch without rollouts."""
        self._batches += 1
        return pack_rollouts([], self._length, self._ranks)

    def remarks(self) -> list[str]:
        """What whoever started the run should know of prompts and answers since then, in sentences."""
        found, tally = self.prompts.remarks(), self._tally
        if tally["cut"]:
            found.append(f"{tally['cut']} of {tally['answers']} answers came to --max-new-tokens and were cut")
        if tally["empty"]:
            found.append(f"{tally['empty']} of {tally['answers']} answers were empty: only their end was learnt")
        return found
