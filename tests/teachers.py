"""What tests of stored teachers share: rows without a meaning, and folders of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cabochon.base.files import Unfinished, resumable_folder
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher_format import Said, counted
from cabochon.data.teacher_index import TeacherFacts, TeacherIndex, Totals
from cabochon.data.teacher_shards import ShardWriter

VOCAB, LENGTH = 211, 12


def facts(**changed: Any) -> TeacherFacts:
    usual = dict(
        kind="top-k", k=5, vocab_size=VOCAB, temperature=1.0, length=LENGTH, teacher="t", tokenizer="f", data={}
    )
    return TeacherFacts(**usual | changed)


def batch(number: int, rows: int = 3, length: int = LENGTH, vocab: int = VOCAB) -> Batch:
    """Each batch of a number is the same; a third of its targets does not count, and row 1 of every fourth none."""
    draw = torch.Generator().manual_seed(number)
    ids, targets = torch.randint(vocab, (2, rows, length), generator=draw)
    targets[torch.rand(rows, length, generator=draw) < 1 / 3] = IGNORED
    if number % 4 == 3:
        targets[1] = IGNORED
    return Batch(ids, targets, torch.arange(length).expand(rows, length) // 5)


def said(one: Batch, known: TeacherFacts, seed: int = 0) -> Said:
    """Falling probabilities that leave something over, for the counted positions of a batch."""
    draw = np.random.default_rng(seed)
    count = int(counted(one.targets.numpy()).sum())
    shares = -np.sort(-draw.dirichlet(np.full(known.k + 1, 0.3), count), axis=1)
    ids = draw.random((count, known.vocab_size)).argsort(axis=1)[:, : known.k]
    return Said(ids, shares[:, :-1].astype(np.float32), shares[:, -1].astype(np.float32))


def write(folder: Path, known: TeacherFacts, batches: int = 6, every: int = 2) -> tuple[TeacherIndex, list[Batch]]:
    """A stored teacher of some batches, `every` of them in a shard."""
    made = [batch(number, length=known.length, vocab=known.vocab_size) for number in range(batches)]
    with resumable_folder(folder, "key") as work:
        return fill(work, known, made, every), made


def fill(work: Unfinished, known: TeacherFacts, batches: list[Batch], every: int) -> TeacherIndex:
    writer = ShardWriter(work, known)
    first = 0 if writer.state is None else writer.state["batches"]
    for number, one in enumerate(batches[first:], start=first):
        sums = Totals(tokens=int(counted(one.targets.numpy()).sum()), kl_lost=0.1 * number, entropy=1.0)
        writer.add(one, said(one, known, seed=number), sums)
        if (number + 1) % every == 0:
            writer.flush({"batches": number + 1})
    writer.flush({"batches": len(batches)})
    return writer.finish()


class Batches:
    """A stream of batches by number, as far as the writer of a teacher needs one."""

    def __init__(self, made: list[Batch]) -> None:
        self.made, self.place = made, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.place == len(self.made):
            raise StopIteration
        self.place += 1
        return self.made[self.place - 1]

    def state(self) -> dict[str, Any]:
        return {"place": self.place}

    def restore(self, state: Mapping[str, Any], /) -> None:
        self.place = state["place"]
