"""What tests of streams share: all ranks at once, and documents read out of batches again."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, stack

from cabochon.data.config import DataConfig
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.stream import BatchStream, merge_states, open_stream
from cabochon.text.tokenizer import Tokenizer

Pairs = list[tuple[int, int]]
Writer = Callable[[str, Iterable[Any]], Path]


class Ranks:
    """The streams of all ranks, and the rows of each global batch [rows, 3, length] in order."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, rows: int, length: int, world: int = 1) -> None:
        opened = (
            open_stream(config, tokenizer, rows=rows, length=length, rank=rank, world=world) for rank in range(world)
        )
        self.streams: list[BatchStream] = list(opened)
        self.rows = rows

    def batches(self, count: int | None = None) -> list[Tensor]:
        """The next `count` batches, or all that are left."""
        found: list[Tensor] = []
        while count is None or len(found) < count:
            parts = [next(stream, None) for stream in self.streams]
            if not any(parts):
                break
            ended = zip(parts, self.streams, strict=True)
            tables = [_table(part or stream.empty()) for part, stream in ended]
            # Rank r has rows r, r + world, ...
            found.append(stack(tables, dim=1).flatten(0, 1))
        return found

    def state(self) -> Any:
        """As a checkpoint would hold it."""
        return json.loads(json.dumps(merge_states([stream.state() for stream in self.streams])))

    def restore(self, state: Any) -> None:
        for stream in self.streams:
            stream.restore(state)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _table(batch: Batch) -> Tensor:
    assert batch.ids.shape == batch.targets.shape == batch.documents.shape
    return stack([batch.ids, batch.targets, batch.documents], dim=1)


def segments(row: Tensor) -> Iterator[Pairs]:
    """(input, target) pairs of each document number in a row, its filler left out."""
    ids, targets, documents = row.tolist()
    for number in sorted(set(documents)):
        here = [i for i, d in enumerate(documents) if d == number]
        assert here == list(range(here[0], here[-1] + 1))  # a document is one stretch
        pairs = [(ids[i], targets[i]) for i in here]
        if any(pair != (0, IGNORED) for pair in pairs):
            yield pairs


def documents(batches: list[Tensor], bos: int) -> list[Pairs]:
    """Whole documents: those that go on in the same row of the next batch are put together again."""
    found: list[Pairs] = []
    for lane in range(len(batches[0]) if batches else 0):
        for batch in batches:
            for pairs in segments(batch[lane]):
                if pairs[0][0] == bos:
                    found.append(pairs)
                else:
                    found[-1] = found[-1] + pairs
    return found


def expected(ids: list[int], learned: list[bool]) -> Pairs:
    """What a document of these ids teaches, spelled out."""
    return [(ids[i], ids[i + 1] if learned[i + 1] else IGNORED) for i in range(len(ids) - 1)]
