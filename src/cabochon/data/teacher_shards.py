"""Shards of a stored teacher: written one after the other, read row by row. The format is in `teacher_format.py`."""

import contextlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.files import Unfinished, atomic_write, sha256
from cabochon.data.pack import Batch
from cabochon.data.teacher_format import (
    ENTRY_ARRAYS,
    INDEX,
    ROW_ARRAYS,
    Array,
    Said,
    counted,
    encode,
    high_bits,
    row_check,
)
from cabochon.data.teacher_index import Shard, TeacherFacts, TeacherIndex, Totals

OPEN_SHARDS = 256  # mapped at a time
_PROGRESS = "progress.json"


class ShardWriter:
    """Fills a folder with shards, and goes on behind the last one that an interrupted process has finished.

    Attributes:
        totals: of everything that was added.
        state: what `flush` was given with the last shard, None before the first.
        waiting: rows that are in no shard yet.
    """

    def __init__(self, work: Unfinished, facts: TeacherFacts) -> None:
        self._folder, self._note, self.facts = work.folder, work.notes / _PROGRESS, facts
        self.totals, self.waiting = Totals(), 0
        self.state: dict[str, Any] | None = None
        self._shards: list[Shard] = []
        self._parts: list[dict[str, Array]] = []
        self._take_up()

    def add(self, batch: Batch, said: Said, totals: Totals) -> None:
        """Take rows and what was said at their counted positions, row after row. Rows without any are left out."""
        rows = {name: getattr(batch, name).cpu().numpy().astype(np.int32) for name in ROW_ARRAYS}
        counts = counted(rows["targets"]).sum(1)
        kept = counts > 0
        rows = {name: values[kept] for name, values in rows.items()}
        self._parts.append(rows | encode(said, self.facts.vocab_size) | {"counts": counts[kept]})
        self.waiting += int(kept.sum())
        self.totals = self.totals.plus(totals).plus(Totals(rows=int(kept.sum())))

    def flush(self, state: dict[str, Any]) -> None:
        """Write what is waiting as a shard; from here on, work that is taken up again begins with `state`."""
        if self.waiting:
            self._shards.append(self._write(f"rows-{len(self._shards):05}.safetensors"))
        self._parts, self.waiting, self.state = [], 0, state
        shards = [asdict(shard) for shard in self._shards]
        _write_json(self._note, {"state": state, "totals": asdict(self.totals), "shards": shards})

    def finish(self) -> TeacherIndex:
        """Write the index of what was flushed. Raises `BadInput` when that is nothing."""
        if not self._shards:
            raise BadInput("there is nothing to store", "no position of the data is to be learned", "give other data")
        index = TeacherIndex(self.facts, self.totals, tuple(self._shards))
        _write_json(self._folder / INDEX, index.to_json())
        return index

    def _take_up(self) -> None:
        if self._note.exists():
            note = json.loads(self._note.read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in note["shards"]]
            if all(self._is_whole(shard) for shard in shards):
                self.state, self.totals, self._shards = note["state"], Totals(**note["totals"]), shards
        known = {shard.file for shard in self._shards}
        for file in self._folder.iterdir():
            if file.name not in known:  # of a process that ended before it was noted
                file.unlink()

    def _is_whole(self, shard: Shard) -> bool:
        path = self._folder / shard.file
        return path.is_file() and path.stat().st_size == shard.nbytes and sha256(path) == shard.sha256

    def _write(self, name: str) -> Shard:
        arrays = {part: np.concatenate([held[part] for held in self._parts]) for part in self._parts[0]}
        counts = arrays.pop("counts")
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        arrays["starts"] = starts
        arrays["checks"] = np.array([row_check(_row(arrays, starts, r)) for r in range(len(counts))], np.uint32)
        path = self._folder / name
        with atomic_write(path) as file:
            file.write(save(arrays))
        return Shard(name, len(counts), int(starts[-1]), path.stat().st_size, sha256(path))


class ShardReader:
    """Rows of a stored teacher by number, out of mapped files, each checked as it is read. For one thread."""

    def __init__(self, folder: Path, index: TeacherIndex) -> None:
        self._folder, self._index = folder, index
        self._ends = np.cumsum([shard.rows for shard in index.shards])
        self._open: OrderedDict[int, tuple[dict[str, Any], Array]] = OrderedDict()

    def row(self, number: int) -> dict[str, Array]:
        """A row's arrays: ids, targets and documents [T]; low, high and levels [m, ...] of its m counted positions.

        Raises `BadInput` when the file is damaged, `MissingResource` when it is gone.
        """
        which = int(np.searchsorted(self._ends, number, side="right"))
        path = self._folder / self._index.shards[which].file
        with _readable(path):
            slices, fixed = self._shard(which, path)
            at = number - int(self._ends[which - 1] if which else 0)
            begin, end = (int(start) for start in fixed[at : at + 2, 0])
            row = {name: slices[name][at] for name in ROW_ARRAYS}
            row |= {name: slices[name][begin:end] for name in ENTRY_ARRAYS}
            sound = row_check(row) == fixed[at, 1] and int(counted(row["targets"]).sum()) == end - begin
        if not sound:
            raise _damaged(path, f"row {at} is not what was written: its checksum differs")
        return row

    def close(self) -> None:
        """Let go of all files."""
        self._open.clear()

    def _shard(self, which: int, path: Path) -> tuple[dict[str, Any], Array]:
        """Slices of a shard's tensors; and int64 [R + 1, 2], where each row's entries begin and its checksum."""
        if which not in self._open:
            file: Any = safe_open(path, "np")
            slices = {name: file.get_slice(name) for name in (*ROW_ARRAYS, *ENTRY_ARRAYS)}
            starts, checks = file.get_tensor("starts"), file.get_tensor("checks")
            self._check_shapes(slices, (starts, checks), which, path)
            fixed = np.stack([starts, np.append(checks.astype(np.int64), 0)], axis=1)
            self._open[which] = slices, fixed
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(which)
        return self._open[which]

    def _check_shapes(self, slices: dict[str, Any], fixed: tuple[Array, Array], which: int, path: Path) -> None:
        facts, shard, (starts, checks) = self._index.facts, self._index.shards[which], fixed
        wanted = dict.fromkeys(ROW_ARRAYS, ("I32", [shard.rows, facts.length])) | {
            "low": ("U16", [shard.tokens, facts.k]),
            "high": ("U8", [shard.tokens, -(-facts.k * high_bits(facts.vocab_size) // 8)]),
            "levels": ("U16", [shard.tokens, facts.k + 1]),
        }
        found = {name: (slices[name].get_dtype(), slices[name].get_shape()) for name in wanted}
        sound = found == wanted and starts.shape == (shard.rows + 1,) and checks.shape == (shard.rows,)
        if not sound or starts[0] != 0 or starts[-1] != shard.tokens or (np.diff(starts) < 0).any():
            raise _damaged(path, f"its tensors are not those that {INDEX} tells of")


def _row(arrays: dict[str, Array], starts: Array, row: int) -> dict[str, Array]:
    part = slice(starts[row], starts[row + 1])
    return {name: arrays[name][row] for name in ROW_ARRAYS} | {name: arrays[name][part] for name in ENTRY_ARRAYS}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise MissingResource(
            f"{path} cannot be read", error.strerror or str(error), "copy the whole folder again"
        ) from None


def _damaged(path: Path, cause: str) -> BadInput:
    return BadInput(f"{path} cannot be used", cause, "the file is damaged: copy the folder again, or make it anew")
