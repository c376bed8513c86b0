"""Where merged tensors go: the shards of a folder, and the notes of which tensors in them are done.

Threads put blocks into segments of a shard that lie in memory. A segment that is full goes to the disk in one request,
past the page cache where the system can do that: what is written once needs no second copy in memory, and the inputs
stay cached. One thread writes. Now and then it forces what it has written to the disk, and notes the tensors in it.
"""

import errno
import json
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Semaphore

import torch
from torch import Tensor

from cabochon.base.files import Unfinished
from cabochon.merge.methods.blocks import Sink, fitting
from cabochon.merge.plan import Plan
from cabochon.weights.names import to_hf
from cabochon.weights.save import Entry, file_header, shards

SEGMENT = 1 << 23  # bytes; a multiple of what a disk writes at least
COMMIT_BYTES = 1 << 28  # written between two notes of what is done: a second's work
QUEUED = 8  # full segments that may wait for the disk
_DONE = "done"  # the notes: a line of JSON names each time
_force_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the second


class Output:
    """The output of one merge. Made by `opened`."""

    def __init__(self, work: Unfinished, plan: Plan, shard_bytes: int, writer: ThreadPoolExecutor) -> None:
        entries = {job.name: Entry(to_hf(job.name), job.shape, tuple) for job in plan.jobs}
        self.placed = shards(entries.values(), plan.dtype, shard_bytes)
        self._dtype, self._writer, self._slots = plan.dtype, writer, Semaphore(QUEUED)
        self._pool: list[_Segment] = []
        self._error: OSError | None = None
        self._pending: deque[str] = deque()  # merged, and not noted yet
        self._since = 0  # bytes written since the last note
        self._shards = []
        self._places: dict[str, tuple[_Shard, int, int]] = {}  # our name: shard, first byte, the one behind the last
        ours = {entry.name: name for name, entry in entries.items()}
        for file, held in self.placed.items():
            header = file_header(held, plan.dtype)
            size = len(header) + sum(entry.nbytes(plan.dtype) for entry in held)
            shard = _Shard(work.folder / file, header, size)
            self._shards.append(shard)
            offset = len(header)
            for entry in held:
                end = offset + entry.nbytes(plan.dtype)
                self._places[ours[entry.name]] = (shard, offset, end)
                offset = end
        self._notes = os.open(work.notes / _DONE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if any(shard.fresh for shard in self._shards):
            os.ftruncate(self._notes, 0)
        self.done = _read_notes(work.notes / _DONE)
        for name in self.done:
            shard, start, end = self._places[name]
            shard.kept.append((start, end))

    def sink(self, name: str) -> Sink:
        """Where the blocks of a tensor go. It may be called from several threads; raises `OSError` of earlier ones."""
        shard, offset, _ = self._places[name]
        size = self._dtype.itemsize

        def put(start: int, values: Tensor) -> None:
            if self._error:
                raise self._error
            # Of the types only float16 can be too small; the others are converted on the way into the segment.
            flat = (fitting(values, self._dtype) if self._dtype == torch.float16 else values).reshape(-1)
            place = offset + start * size
            while len(flat):
                number, inside = divmod(place, SEGMENT)
                segment = shard.segment(number, self._pool)
                part = flat[: (SEGMENT - inside) // size]
                nbytes = len(part) * size
                segment.bytes[inside : inside + nbytes].view(self._dtype).copy_(part)
                if shard.filled(number, nbytes):
                    self._slots.acquire()
                    self._writer.submit(self._store, shard, number)
                flat, place = flat[len(part) :], place + nbytes

        return put

    def finished(self, name: str) -> None:
        """A tensor is all there; it is noted once it is on the disk."""
        self._pending.append(name)

    def commit(self) -> None:
        """Wait until all that is finished is on the disk and noted. Raises `OSError` when it cannot be."""
        self._writer.submit(self._note).result()
        if self._error:
            raise self._error
        assert not self._pending, "a tensor was finished without all of its blocks"

    def close(self) -> None:
        """Keep what is finished, also if not everything is. No thread may put anything any more."""
        self._writer.submit(int).result()  # what waits is written, and no longer open
        for shard in self._shards:
            for number in list(shard.open):
                self._slots.acquire()
                self._writer.submit(self._store, shard, number)
        self._writer.submit(self._note).result()
        for shard in self._shards:
            shard.close()
        os.close(self._notes)

    # In the writing thread. What goes wrong there is raised in the others.

    def _store(self, shard: "_Shard", number: int) -> None:
        try:
            if self._error is None:
                self._since += shard.write(number)
        except OSError as error:
            self._error = error
        finally:
            self._pool.append(shard.open.pop(number))
            self._slots.release()
        if self._since >= COMMIT_BYTES:
            self._note()

    def _note(self) -> None:
        """Note the tensors that are on the disk as a whole. After an error nothing more can be called done: the system
        tells only once that data was lost.
        """
        ready = [name for name in list(self._pending) if self._is_written(name)]
        if self._error or not ready:
            return
        try:
            for shard in {self._places[name][0] for name in ready}:
                shard.force()
            os.write(self._notes, json.dumps(ready).encode() + b"\n")
            _force_data(self._notes)
        except OSError as error:
            self._error = error
            return
        self._since = 0
        for name in ready:
            self._pending.remove(name)

    def _is_written(self, name: str) -> bool:
        shard, start, end = self._places[name]
        return not any(number in shard.open for number in range(start // SEGMENT, -(-end // SEGMENT)))


@contextmanager
def opened(work: Unfinished, plan: Plan, shard_bytes: int) -> Iterator[Output]:
    """The output of a merge, with what an earlier try has done. Raises `OSError`."""
    with ThreadPoolExecutor(1) as writer:
        output = Output(work, plan, shard_bytes, writer)
        try:
            yield output
        finally:
            output.close()


class _Segment:
    """Some bytes of a shard in memory; `missing` of them are still to come."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SEGMENT)  # begins where a page does
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.missing = 0


class _Shard:
    """One file. `fresh`: it was not there as it has to be; `kept`: byte ranges that are right on the disk; `open`: the
    segments that are in memory.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.size, self.open, self._lock = size, dict[int, _Segment](), Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._direct = -1
        with suppress(AttributeError, OSError):  # not every system can, nor every file system
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.fresh = os.fstat(self._descriptor).st_size != size or os.pread(self._descriptor, len(header), 0) != header
        if self.fresh:
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, size)
            _write_at(self._descriptor, memoryview(header), 0)
        self.kept = [(0, len(header))]

    def segment(self, number: int, pool: list[_Segment]) -> _Segment:
        """A segment; a new one holds what is on the disk already."""
        with self._lock:
            if number not in self.open:
                self.open[number] = self._new(number, _taken(pool))
            return self.open[number]

    def _new(self, number: int, segment: _Segment) -> _Segment:
        start, end = self._range(number)
        there = sum(max(0, min(end, stop) - max(start, first)) for first, stop in self.kept)
        if there:
            os.preadv(self._descriptor, [memoryview(segment.memory)[: end - start]], start)
        segment.missing = end - start - there
        return segment

    def filled(self, number: int, nbytes: int) -> bool:
        """Count bytes that were put; whether the segment is full now."""
        with self._lock:
            segment = self.open[number]
            segment.missing -= nbytes
            return segment.missing == 0

    def write(self, number: int) -> int:
        """Write a segment, and give its bytes."""
        start, end = self._range(number)
        data = memoryview(self.open[number].memory)[: end - start]
        if self._direct >= 0 and len(data) == SEGMENT:
            try:
                _write_at(self._direct, data, start)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a disk that wants it otherwise
                    raise
                os.close(self._direct)
                self._direct = -1
            else:
                return len(data)
        _write_at(self._descriptor, data, start)
        return len(data)

    def force(self) -> None:
        _force_data(self._descriptor)

    def close(self) -> None:
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def _range(self, number: int) -> tuple[int, int]:
        return number * SEGMENT, min(self.size, (number + 1) * SEGMENT)


def _taken(pool: list[_Segment]) -> _Segment:
    try:
        return pool.pop()
    except IndexError:
        return _Segment()


def _read_notes(path: Path) -> set[str]:
    """The names in the notes; a last line that was cut off says nothing."""
    names: set[str] = set()
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            names.update(json.loads(line))
    return names


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
