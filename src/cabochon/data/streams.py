"""Rows that arrive from front to back: standard input, and data sets of the Hugging Face Hub."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from cabochon.base.errors import CabochonError, MissingResource, UsageError
from cabochon.data.records import LOOK, Record, cut


class Arriving(Protocol):
    """Rows in the one order in which they come."""

    repeats: bool  # whether they can be read again

    def rows(self, skip: int) -> Iterator[Record]:
        """All rows but the first `skip`."""
        ...


class StandardInput:
    """JSON lines, when the first character is a brace; otherwise one running text, in pieces of about `piece` bytes."""

    repeats = False

    def __init__(self, source: BinaryIO, piece: int) -> None:
        self._source, self._piece = source, piece

    def rows(self, skip: int) -> Iterator[Record]:
        first, line = self._source.readline(self._piece), 1
        while first and not first.strip():
            first, line = self._source.readline(self._piece), line + 1
        is_json = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
        records = _json_lines(self._source, first, line) if is_json else _pieces(self._source, first, self._piece)
        return itertools.islice(records, skip, None)


class HubDataset:
    """`hf:NAME[:config][:split]`, streamed: nothing of it is kept on the disk.

    NAME may be a local folder as well, which the same library reads. Raises `MissingResource` when the library or
    the data set is not there, `UsageError` when the name cannot be one.
    """

    repeats = True

    def __init__(self, source: str) -> None:
        name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
        if not name or any(rest):
            raise UsageError(
                f"{source} is not a data set", "it is written hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT",
                "for a split without a configuration write hf:NAME::SPLIT",
            )  # fmt: skip
        self._source = source
        library = _datasets(source)
        self._data = self._guard(
            lambda: library.load_dataset(name, config or None, split=split or "train", streaming=True)
        )

    def rows(self, skip: int) -> Iterator[Record]:
        rows = iter(self._guard(lambda: self._data.skip(skip)))
        for number in itertools.count(skip):
            row = self._guard(lambda: next(rows, None))
            if row is None:
                return
            yield Record(f"{self._source} row {number + 1}", number, row, "row")

    def _guard(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CabochonError:
            raise
        except Exception as error:  # the library raises what its many parts raise
            cause = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise MissingResource(
                f"{self._source} cannot be read",
                cause[:300],
                "check the name, the configuration, the split and the network (and HF_TOKEN for a private one)",
            ) from None


class Looked:
    """Rows that arrive, of which the first can be looked at beforehand."""

    def __init__(self, arriving: Arriving) -> None:
        self._arriving, self.repeats = arriving, arriving.repeats
        self._rest: Iterator[Record] | None = arriving.rows(0)
        self._seen: list[Record] = []

    def first(self) -> Iterator[Record]:
        """The rows from the beginning; as many are kept as are taken from this."""
        for number in itertools.count():
            if number == len(self._seen) and self._rest is not None:
                self._seen += itertools.islice(self._rest, 1)
            if number == len(self._seen):
                return
            yield self._seen[number]

    def rows(self, skip: int) -> Iterator[Record]:
        """All rows but the first `skip`. Raises `UsageError` when they are asked for twice and come but once."""
        if self.repeats:
            return self._arriving.rows(skip)
        if self._rest is None:
            raise UsageError("the data cannot be read again", "standard input comes only once", "save it to a file")
        rows, self._rest = itertools.chain(self._seen, self._rest), None
        return itertools.islice(rows, skip, None)


def open_standard_input(piece: int) -> StandardInput:
    """This process's standard input. Raises `UsageError` when that is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no data to train on", "standard input is a terminal", "pipe rows into the command")
    # A reader of our own: Python cannot end while a thread waits in its one.
    return StandardInput(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), piece)


def _json_lines(source: BinaryIO, first: bytes, start: int) -> Iterator[Record]:
    first += b"" if first.endswith(b"\n") else source.readline()
    number = 0
    for line, content in enumerate(itertools.chain([first], source), start=start):
        content = content.rstrip(b"\r\n")
        if content:
            yield Record(f"standard input:{line}", number, content, "json")
            number += 1


def _pieces(source: BinaryIO, first: bytes, size: int) -> Iterator[Record]:
    text, at = first, 0  # at: bytes before `text`
    for number in itertools.count():
        while len(text) <= size + LOOK and (more := source.read(size)):
            text += more
        last = len(text) <= size + LOOK
        end = len(text) if last else size + cut(text[size : size + LOOK])
        if end:
            place = f"standard input, byte {at + 1}"
            yield Record(place, number, text[:end], "text", begins=at == 0, ends=last)
        if last:
            return
        text, at = text[end:], at + end


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingResource(
            f"{source} cannot be read",
            "data sets of the Hub need the datasets library, which is not installed",
            "run: pip install 'cabochon[data]'",
        ) from None
    return datasets
