"""Rows of data, each with the place it came from: JSON lines and running text in files of any size.

A source is either kept in files, whose rows are read in any order (`Rows`), or arrives once from front to back
(`streams.py`). Lines are found once and read when they are needed, so that no file is ever held in memory.
"""

import gzip
import itertools
import json
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cabochon.base.errors import BadInput, MissingResource

Numbers = npt.NDArray[np.int64]

MIN_PIECE = 1 << 14  # bytes of running text that are read as one
LOOK = 1 << 12  # bytes in which a place to cut is looked for
_CHUNK = 1 << 26  # bytes in which line ends are looked for at a time
_LINE_ENDS = re.compile(rb"\n+")


class BadRow(Exception):
    """Why one row cannot be used, and what could be done. The row is skipped, the reason quoted with its place."""

    def __init__(self, reason: str, *, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it was read.

    `place` is for people: a file and a line. `number` is its place among all rows, `part` which of several joined
    sources it is from. Running text of a long file comes in pieces: one `begins`, one `ends` the document.
    """

    place: str
    number: int
    content: bytes | Mapping[str, Any]
    kind: Literal["json", "text", "row"]
    begins: bool = True
    ends: bool = True
    part: int = 0

    def row(self) -> Mapping[str, Any]:
        """The row's keys and values. Raises `BadRow` when its bytes are not what they should be."""
        if not isinstance(self.content, bytes):
            return self.content
        try:
            text = self.content.decode("utf-8-sig" if self.begins else "utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(f"byte {error.start + 1} (0x{self.content[error.start]:02x}) is not UTF-8") from None
        if self.kind == "text":
            return {"text": text}
        try:
            value = json.loads(text)
        except RecursionError:
            raise BadRow("not JSON that can be read: nested too deeply") from None
        except ValueError as error:
            raise BadRow(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadRow(f"a row is an object with keys, this is {_kind(value)}")
        return value


class Rows(Protocol):
    """Rows that can be read in any order."""

    sizes: Numbers  # of each row in bytes, or what that is on average
    groups: Numbers  # lengths of the stretches of rows that are read together; their sum is the number of rows

    def read(self, number: int) -> Record:
        """The row of this number. Threads may read at the same time."""
        ...


class Content(Protocol):
    """The bytes of a file."""

    size: int

    def read(self, start: int, end: int) -> bytes:
        """Those from `start` to before `end`. Raises `BadInput` when the file is no longer what it was."""
        ...


class JsonLines:
    """A file with a JSON object on each line; empty lines are passed over."""

    def __init__(self, name: str, content: Content) -> None:
        self._name, self._content = name, content
        starts, ends = _lines(content)
        kept = ends > starts
        self._numbers = None if kept.all() else np.flatnonzero(kept)
        self._starts, self._ends = starts[kept], ends[kept]
        self.sizes = self._ends - self._starts
        self.groups = np.ones(len(self.sizes), np.int64)

    def read(self, number: int) -> Record:
        line = number if self._numbers is None else int(self._numbers[number])
        content = self._content.read(int(self._starts[number]), int(self._ends[number]))
        return Record(f"{self._name}:{line + 1}", number, content, "json")


class TextFiles:
    """Files that are a document each; long ones are read in pieces of about `piece` bytes, cut where a line ends.

    Without pieces a long file would be learned from its beginning by one row of a batch alone.
    """

    def __init__(self, files: Sequence[tuple[str, Content]], piece: int) -> None:
        self._files = files
        cuts = [_cuts(content, piece) for _, content in files]
        self._file = np.repeat(np.arange(len(files)), [len(c) - 1 for c in cuts])
        self._starts = np.concatenate([c[:-1] for c in cuts])
        self._ends = np.concatenate([c[1:] for c in cuts])
        self._lengths = np.array([c[-1] for c in cuts])
        self.sizes = self._ends - self._starts
        self.groups = np.ones(len(self.sizes), np.int64)

    def read(self, number: int) -> Record:
        file, start, end = (int(a[number]) for a in (self._file, self._starts, self._ends))
        name, content = self._files[file]
        begins, ends = start == 0, end == self._lengths[file]
        place = name if begins else f"{name}, byte {start + 1}"
        return Record(place, number, content.read(start, end), "text", begins, bool(ends))


class Joined:
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part.sizes) for part in parts)])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.groups = np.concatenate([part.groups for part in parts])

    def read(self, number: int) -> Record:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        record = self._parts[part].read(number - int(self._starts[part]))
        return replace(record, number=number, part=part)

    def beginnings(self, count: int) -> Iterator[Record]:
        """About `count` rows, from the beginnings of the parts."""
        each = max(1, count // len(self._parts))
        for start, end in itertools.pairwise(self._starts[: count + 1].tolist()):
            yield from map(self.read, range(start, min(start + each, end)))


class File:
    """A file as it was when this was made. It is opened for each read, so there is no limit to how many there are.

    It is not mapped: a mapped file that someone shortens ends the process, with all that was trained.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb"):
                self._state = _state(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        self.size, _ = self._state

    def read(self, start: int, end: int) -> bytes:
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(start)
                content = file.read(end - start)
                if _state(self._path) == self._state and len(content) == end - start:
                    return content
        except OSError as error:
            raise _unreadable(self._path, error) from None
        raise BadInput(f"{self._path} cannot be read on", "it was changed while it was in use", "start again")


class Unpacked:
    """A .gz file, unpacked once into a temporary file that vanishes with the process, however that ends.

    Raises `MissingResource` when it cannot be read or there is no room, `BadInput` when it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is needed as long as this is
        self._lock = threading.Lock()
        try:
            with path.open("rb") as packed, gzip.open(packed) as content:
                shutil.copyfileobj(content, self._file, 1 << 20)
            self.size = self._file.tell()
            self._file.flush()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadInput(f"{path} cannot be unpacked", str(error), "fetch or write the file again") from None
        except OSError as error:
            raise MissingResource(
                f"{path} cannot be unpacked",
                error.strerror or str(error),
                f"check that it can be read, and make room in {tempfile.gettempdir()} or in another TMPDIR",
            ) from None

    def read(self, start: int, end: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(end - start)


def open_content(path: Path) -> Content:
    """The bytes of a file, unpacked if its name ends with .gz. Raises as `File` and `Unpacked`."""
    return Unpacked(path) if path.suffix == ".gz" else File(path)


def _lines(content: Content) -> tuple[Numbers, Numbers]:
    """Where each line starts and ends, its end left out."""
    last, ends, returns = 0, [], []
    for at in range(0, content.size, _CHUNK):
        block = np.frombuffer(content.read(at, min(at + _CHUNK, content.size)), np.uint8)
        found = np.flatnonzero(block == ord("\n"))
        ends.append(found + at)
        returns.append(np.where(found > 0, block[found - 1], last) == ord("\r"))
        last = int(block[-1])
    line_ends = np.concatenate([*ends, np.array([content.size])])
    starts = np.concatenate([np.zeros(1, np.int64), line_ends[:-1] + 1])
    carriage_returns = np.concatenate([*returns, np.array([last == ord("\r")])])
    return starts, line_ends - (carriage_returns & (line_ends > starts))


def cut(window: bytes) -> int:
    """Where to cut a text in the `LOOK` bytes from a wanted place: after a line, before a space, or at a character."""
    line_end = _LINE_ENDS.search(window)
    if line_end and line_end.end() < len(window):
        return line_end.end()
    space = window.find(b" ")
    if space >= 0:
        return space
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def _cuts(content: Content, piece: int) -> Numbers:
    """Where the pieces of a text begin, and where the last one ends."""
    cuts = [0]
    while content.size - cuts[-1] > piece + LOOK:
        wanted = cuts[-1] + piece
        cuts.append(wanted + cut(content.read(wanted, wanted + LOOK)))
    return np.array([*cuts, content.size], np.int64)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")


def _state(path: Path) -> tuple[int, int]:
    """Size, and when it was last written."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> MissingResource:
    cause = error.strerror or str(error)
    return MissingResource(f"{path} cannot be read", cause, "check the name and who may read the file")
