"""Tensors out of a memory-mapped file, without a second copy.

Why a private, writable map. Where the stored dtype is the wanted one and the device is the CPU, a parameter is the
map itself: nothing is copied, several processes share one copy in the page cache, and the system can drop pages
under pressure and read them again. Being private, a page that training writes to becomes a copy of this process
alone; the file never changes. (A read-only map would end the first in-place update with a crash, and reading into
fresh memory would double the start-up time for nothing.) In every other case pieces of a few MiB are converted into
the new tensor and their pages are let go at once, so that the peak is the new tensor and one piece.

A file must not be changed in place while it is mapped. Writers that rename, as ours do, leave the old file to those
who still map it.
"""

import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cabochon.weights.header import Stored

PIECE = 2**22  # elements converted at once: large enough to be fast, and small against any model


class MappedFile:
    """A file's bytes in memory; they stay there as long as a tensor made of them lives."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, stored: Stored, dtype: torch.dtype) -> "MappedTensor":
        """One tensor of the file; `stored` has been checked against the file's size."""
        count = stored.nbytes // dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=stored.start)
        return MappedTensor(self._map, stored, flat)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that lies in a file."""

    _map: mmap.mmap
    _stored: Stored
    _flat: Tensor  # [elements], shares memory with the map

    def load(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
        """The tensor in a dtype on a device, and whether all its values are finite. One pass over the data."""
        self.announce()
        aligned = self._stored.start % dtype.itemsize == 0  # files that others wrote need not be
        if device.type == "cpu" and dtype == self._flat.dtype and aligned:
            finite = all(is_finite(piece) for piece in self._flat.split(PIECE))
            return self._flat.view(self._stored.shape), finite
        out, finite, done = torch.empty(len(self._flat), dtype=dtype, device=device), True, 0
        for piece in self._flat.split(PIECE):
            converted = piece.to(dtype)  # what is not finite stays so; a large float32 can become so in bfloat16
            finite &= is_finite(converted)
            out[done : done + len(piece)] = converted
            done += len(piece)
            self.let_go(done)
        return out.view(self._stored.shape), finite

    def view(self) -> Tensor:
        """The tensor as stored, in place. Read it only, and call `let_go` when done, to keep memory free."""
        return self._flat.view(self._stored.shape)

    def rows(self, count: int) -> Iterator[Tensor]:
        """The tensor as stored, `count` rows at a time. What was given last is let go: copy what is to stay."""
        self.announce()
        done = 0
        for piece in self._flat.view(self._stored.shape).split(count):
            yield piece
            done += piece.numel()
            self.let_go(done)

    def equals(self, other: "MappedTensor") -> bool:
        """Whether two tensors hold the same values, whatever dtypes they are stored in."""
        pairs = zip(self._flat.split(PIECE), other._flat.split(PIECE), strict=True)
        return all(torch.equal(a.float(), b.float()) for a, b in pairs)

    def announce(self) -> None:
        """Have the whole tensor read from the disk ahead, in large requests, instead of page by page."""
        if sys.platform != "win32":
            start = self._stored.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, self._stored.start + self._stored.nbytes - start)

    def let_go(self, elements: int | None = None) -> None:
        """Give back the pages of the first elements (None: all). They are clean copies of the file: nothing is lost."""
        elements = len(self._flat) if elements is None else elements
        if sys.platform != "win32":
            start = -(-self._stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = self._stored.start + elements * self._flat.itemsize - start
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, start, length // mmap.PAGESIZE * mmap.PAGESIZE)


def is_finite(values: Tensor) -> bool:
    """One pass without a temporary: the extremes are not finite when any value is not. Whole numbers are not read."""
    return (
        values.numel() == 0
        or not values.dtype.is_floating_point
        or all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())
    )
