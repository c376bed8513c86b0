"""Batches from sources, in an order that neither ranks nor threads change, and that can be taken up anywhere.

A batch has as many lanes as rows. Each document belongs to one lane (`order.py`), which packs it into its own row of
each batch (`lane.py`). Rank r makes lanes r, r + world, ...; its threads share them out once more. What a lane does
depends on nothing but its own documents, so whoever makes it, it makes the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.ahead import Ahead
from cabochon.data.config import DataConfig, Shape
from cabochon.data.lane import Lane, Tally
from cabochon.data.pack import Batch, Row, as_batch
from cabochon.data.prepare import Plan, plan_eval, plan_training
from cabochon.text.tokenizer import Tokenizer

Made = list[tuple[int, Row | None, dict[str, Any]]]  # lane, its next row, and where it then stands


class BatchStream:
    """An iterator of this rank's part of each batch, int64 [rows / world, length]. Use it in a `with` block.

    With `epochs`, ranks come to their end at different steps. A rank that is done gives `empty()` batches until all
    are: sum `num_targets` over the ranks, as the loss needs it anyway, and stop when it is 0.
    """

    def __init__(self, plan: Plan, rank: int, world: int) -> None:
        self._plan, self._rank, self._world = plan, rank, world
        self._numbers = range(rank, plan.rows, world)
        self._identity = plan.identity()
        self._makers: list[Ahead[Made]] | None = None
        self._begin({})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises `StopIteration` after the last epoch, `BadInput` when there are too many bad rows."""
        if self._makers is None:
            shares = [self._lanes[i :: self._plan.config.workers] for i in range(self._plan.config.workers)]
            self._makers = [Ahead(partial(_make, lanes), self._plan.config.prefetch) for lanes in shares if lanes]
        made = [lane for maker in self._makers for lane in maker.get()]  # all or, with an error, none
        rows = {number: row for number, row, _ in made}
        self._states = {number: state for number, _, state in made}
        if not any(rows.values()):
            raise StopIteration
        self._batches += 1
        return as_batch([rows[number] or Row(self._plan.length) for number in self._numbers])

    def state(self) -> dict[str, Any]:
        """JSON-able: where this rank stands after the batch last handed out. See `merge_states`."""
        lanes = {str(number): state for number, state in self._states.items()}
        return {"data": self._identity, "batches": self._batches, "lanes": lanes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, from the merged states of all ranks, however many those were.

        Raises `UsageError` when the data or how it is packed is not what it was then.
        """
        self._plan.check(state["data"])
        missing = [number for number in self._numbers if str(number) not in state["lanes"]]
        if missing:
            raise BadInput(
                "the run's place in its data cannot be found",
                f"the checkpoint lacks rows {', '.join(map(str, missing[:8]))}",
                "its states have to be those of all ranks, merged",
            )
        self._begin({number: state["lanes"][str(number)] for number in self._numbers}, int(state["batches"]))

    def again(self) -> Self:
        """Another stream from the beginning, without looking through the sources once more."""
        return type(self)(self._plan, self._rank, self._world)

    def count(self) -> int:
        """How many batches there are from the beginning to the end: every document is tokenised, and packed on paper.

        Raises as `open_stream`, and `UsageError` when the data has no end or cannot be read beforehand.
        """
        self._plan.check_countable()
        with type(self)(replace(self._plan, lengths_only=True), 0, 1) as stream:
            return sum(1 for _ in stream)

    def empty(self) -> Batch:
        """A batch of nothing but filler, counted like the others: for a step of other ranks after this one's end."""
        self._batches += 1
        return as_batch([Row(self._plan.length) for _ in self._numbers])

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        for maker in self._makers or ():
            maker.close()

    @property
    def shapes(self) -> frozenset[Shape]:
        """Those of its rows."""
        return frozenset(shape for part in self._plan.parts for shape in part.shapes)

    @property
    def real_tokens(self) -> int:
        """Tokens that are no filler in the batches handed out so far, those before `restore` included."""
        return self._sum("tokens")

    @property
    def padded_tokens(self) -> int:
        """Filler in those batches."""
        return self._batches * len(self._numbers) * self._plan.length - self.real_tokens

    @property
    def documents(self) -> int:
        """Documents that were begun in them."""
        waiting = [document for state in self._states.values() for document in state["waiting"]]
        return self._sum("documents") - sum(1 for *_, offset in waiting if offset == 0)

    @property
    def truncated(self) -> int:
        """Documents read so far that were longer than a row and lost their end."""
        return self._sum("truncated")

    @property
    def bad_rows(self) -> int:
        """Rows read so far that were skipped, each counted once."""
        return self._sum("bad")

    @property
    def complaints(self) -> Sequence[str]:
        """The first few of them with file, line and reason, as far as they were met since `restore`."""
        return tuple(self._tally.quoted)

    def remarks(self) -> list[str]:
        """What whoever started the run should know of its data so far, in sentences; nothing when all is well."""
        found = []
        if self.bad_rows:
            quoted = f": {'; '.join(self.complaints)}" if self.complaints else ""
            found.append(f"{self.bad_rows} bad row{'s' * (self.bad_rows != 1)} skipped{quoted}")
        if self.truncated:
            total = self._sum("documents")
            found.append(f"{self.truncated} of {total} documents were longer than {self._plan.length} tokens and cut")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, states: Mapping[int, Mapping[str, Any]], batches: int = 0) -> None:
        self.close()
        self._makers = None
        self._batches = batches
        self._tally = Tally(self._plan.config.max_bad_rows, sum(int(state["bad"]) for state in states.values()))
        self._lanes = self._plan.lanes(self._numbers, self._tally)
        for lane in self._lanes if states else ():
            lane.seek(states[lane.number])
        for lane in self._lanes if states else ():
            lane.restore(states[lane.number])
        self._states = {lane.number: lane.state() for lane in self._lanes}

    def _sum(self, name: str) -> int:
        return sum(int(state[name]) for state in self._states.values())


def open_stream(
    config: DataConfig, tokenizer: Tokenizer, *, rows: int, length: int, rank: int = 0, world: int = 1
) -> BatchStream:
    """Training batches; `rows` is those of all ranks together, of which rank r has rows r, r + world, ...

    Raises:
        MissingResource: a source is not there, or the `data` extra is needed.
        BadInput: a source has no rows, its first rows cannot be used, or the tokenizer cannot write what they hold.
        UsageError: rows cannot be shared evenly, or the sources do not go together.
    """
    _check_ranks(rows, world)
    return BatchStream(plan_training(config, tokenizer, rows=rows, length=length, world=world), rank, world)


def open_eval(
    config: DataConfig, tokenizer: Tokenizer, *, rows: int, length: int, rank: int = 0, world: int = 1
) -> BatchStream | None:
    """What is held out or comes from `eval_sources`: every document once, in order. None when there is neither.

    Raises as `open_stream`.
    """
    _check_ranks(rows, world)
    plan = plan_eval(config, tokenizer, rows=rows, length=length, world=world)
    return None if plan is None else BatchStream(plan, rank, world)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks after the same step as one, to be kept in a checkpoint.

    Raises `ValueError` when they are not of the same step.
    """
    first = states[0]
    if any(state["batches"] != first["batches"] or state["data"] != first["data"] for state in states):
        raise ValueError("the states of the ranks are from different steps")
    lanes = {number: lane for state in states for number, lane in state["lanes"].items()}
    return {**first, "lanes": dict(sorted(lanes.items(), key=lambda lane: int(lane[0])))}


def _make(lanes: Sequence[Lane]) -> Made:
    return [(lane.number, lane.next_row(), lane.state()) for lane in lanes]


def _check_ranks(rows: int, world: int) -> None:
    if rows % world:
        raise UsageError(
            f"{rows} rows cannot be shared by {world} processes",
            "each has to get the same number of rows of a batch",
            f"set rows to a multiple of {world} (--rows {-(-rows // world) * world})",
        )
