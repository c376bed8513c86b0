"""Store what a teacher says: its distribution at every counted position of a stream of batches, a few entries each.

The teacher runs without gradients, and its head walks over chunks of positions: no logits of a whole batch. What is
written is noted shard by shard, with the place in the data, so that a process that was killed is gone on from there.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.base.files import resumable_folder
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher_format import Said, position_bytes
from cabochon.data.teacher_index import TeacherFacts, TeacherIndex, Totals
from cabochon.data.teacher_shards import ShardWriter
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import logit_chunks
from cabochon.train.objectives import hidden_states
from cabochon.train.teacher_check import check_capped
from cabochon.train.teacher_sample import entries

SHARD_BYTES = 2**26  # about; a shard is what is lost at most when the process dies


class Rows(Protocol):
    """What of a `BatchStream` is needed here."""

    def __next__(self) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Stored:
    """How much is done: batches, those of earlier processes included, and the sums over what they held."""

    batches: int
    totals: Totals


def store_teacher(
    teacher: Gemma2,
    stream: Rows,
    out: Path,
    facts: TeacherFacts,
    *,
    key: Mapping[str, Any],
    batches: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[Stored], None] = lambda _: None,
    overwrite: bool = False,
) -> TeacherIndex:
    """Write a folder for `open_teacher`, whole or not at all; the next call goes on where this one was stopped.

    Args:
        teacher: on the device where it is to run.
        stream: its rows; it is closed by the caller.
        out: new or empty, unless `overwrite`.
        facts: what is asked for; its `length` is that of the stream.
        key: whatever else decides the result. Work is gone on with only if it was begun with the same.
        batches: how many to take; None: until the stream ends.
        seed: of what is drawn, for the kind "sampled".
        report: called before the first batch and after each.

    Raises:
        UsageError: the folder is in use, or the facts are not those of the teacher.
        BadInput: as the stream does; what is written by then is kept.
        MissingResource: the disk is full or cannot be written. What is written is kept, too.
    """
    _check(facts, teacher.config)
    begun_with = json.dumps({"facts": facts.to_json(), "seed": seed, "shard": shard_bytes, **key}, sort_keys=True)
    try:
        with resumable_folder(out, begun_with, overwrite=overwrite) as work:
            writer = ShardWriter(work, facts)
            try:
                _store(teacher, stream, writer, (batches, seed, shard_bytes), report)
            except BadInput as error:  # which would throw away hours: other settings may get over a bad row
                raise _Kept(error) from None
            return writer.finish()
    except _Kept as kept:
        raise kept.error from None
    except OSError as error:
        raise MissingResource(
            f"{out} was not written",
            error.strerror or str(error),
            "free some space and give the same command again: it goes on where it stopped",
        ) from None


class _Kept(Exception):
    """An error that leaves the work as it is."""

    def __init__(self, error: BadInput) -> None:
        self.error = error


def _check(facts: TeacherFacts, teacher: Gemma2Config) -> None:
    what = "this teacher cannot be stored"
    check_capped(teacher, what)
    if not 1 <= facts.k <= facts.vocab_size:
        raise UsageError(what, f"it has {facts.vocab_size} ids, so k cannot be {facts.k}", "64 is a good choice")
    if not 0 < facts.temperature < float("inf"):
        raise UsageError(what, f"temperature {facts.temperature} is not positive", "1 leaves it as it is")
    if facts.length > teacher.max_position:
        raise UsageError(
            what,
            f"rows of {facts.length} positions exceed its context of {teacher.max_position}",
            f"use --length {teacher.max_position}, or less",
        )
    assert facts.vocab_size == teacher.vocab_size


def _store(
    teacher: Gemma2,
    stream: Rows,
    writer: ShardWriter,
    settings: tuple[int | None, int, int],
    report: Callable[[Stored], None],
) -> None:
    batches, seed, shard_bytes = settings
    facts = writer.facts
    enough = max(1, shard_bytes // (facts.length * position_bytes(facts.k, facts.vocab_size)))
    done = 0
    if writer.state is not None:
        stream.restore(writer.state["data"])
        done = writer.state["batches"]
    report(Stored(done, writer.totals))
    while batches is None or done < batches:
        batch = next(stream, None)
        if batch is None:
            break
        writer.add(batch, *say(teacher, batch, facts, seed=(seed, done)))
        done += 1
        if writer.waiting >= enough:
            writer.flush({"data": stream.state(), "batches": done})
        report(Stored(done, writer.totals))
    if writer.waiting:
        writer.flush({"data": stream.state(), "batches": done})


@torch.no_grad()
def say(teacher: Gemma2, batch: Batch, facts: TeacherFacts, *, seed: tuple[int, int]) -> tuple[Said, Totals]:
    """What a teacher says at the counted positions of a batch, row after row. Raises as `entries`."""
    counted = batch.targets.flatten() != IGNORED
    count, totals = int(counted.sum()), Totals()
    if count == 0:
        return Said(np.zeros((0, facts.k), int), np.zeros((0, facts.k)), np.zeros(0)), totals
    hidden = hidden_states(teacher, batch)
    hidden = hidden[counted.to(hidden.device)]
    uniforms = _uniforms(count, seed) if facts.kind == "sampled" else None
    parts, at = [], 0
    for logits in logit_chunks(teacher.head, hidden, facts.vocab_size):
        drawn = None if uniforms is None else uniforms[at : at + len(logits)]
        said, sums = entries(logits, facts.k, facts.temperature, drawn)
        parts.append(said)
        totals = totals.plus(sums)
        at += len(logits)
    arrays = ([getattr(said, name) for said in parts] for name in ("ids", "probabilities", "last"))
    return Said(*(np.concatenate(part) for part in arrays)), totals


def _uniforms(count: int, seed: tuple[int, int]) -> Tensor:
    """float64 [count], the same in every version of numpy, of which only the old generator promises that."""
    draw = np.random.RandomState([number & 0xFFFFFFFF for number in seed])
    return torch.from_numpy(draw.random_sample(count))
