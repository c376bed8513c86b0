"""Rows of Parquet files: the columns that matter, a row group at a time."""

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.base.errors import BadInput, MissingResource
from cabochon.data.order import WINDOW
from cabochon.data.records import Record


class Parquet:
    """Parquet files one after the other; the row groups of about two shuffled stretches are in memory.

    Raises `MissingResource` without pyarrow or a file, `BadInput` when one is damaged.
    """

    def __init__(self, paths: Sequence[Path], columns: frozenset[str]) -> None:
        self._paths, self._columns = paths, columns
        self._library = _pyarrow(paths[0])
        metas = [self._guard(path, functools.partial(self._library.read_metadata, path)) for path in paths]
        groups = [(file, i, meta.row_group(i)) for file, meta in enumerate(metas) for i in range(meta.num_row_groups)]
        self._groups = [(file, i) for file, i, _ in groups]
        self.groups = np.array([group.num_rows for _, _, group in groups], np.int64)
        bytes_each = [max(1, group.total_byte_size // max(1, group.num_rows)) for _, _, group in groups]
        self.sizes = np.repeat(np.array(bytes_each, np.int64), self.groups)
        self._starts = np.cumsum([0, *self.groups])
        self._first = np.cumsum([0, *(meta.num_rows for meta in metas)])  # row of each file
        self._lock = threading.Lock()
        kept = 2 + 2 * WINDOW * len(groups) // max(1, len(self.sizes))
        self._group = functools.lru_cache(maxsize=kept)(self._read_group)

    def read(self, number: int) -> Record:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:  # or two threads would unpack the same group
            table = self._group(group)
        row = table.slice(number - int(self._starts[group]), 1).to_pylist()[0]
        file, _ = self._groups[group]
        return Record(f"{self._paths[file]} row {number - int(self._first[file]) + 1}", number, row, "row")

    def _read_group(self, group: int) -> Any:
        number, index = self._groups[group]
        path = self._paths[number]

        def read() -> Any:
            # Opened anew: a thousand open files are more than a process may have.
            with self._library.ParquetFile(path) as file:
                columns = [name for name in file.schema_arrow.names if name in self._columns]
                return file.read_row_group(index, columns=columns or None)  # None: all, to say what is there instead

        return self._guard(path, read)

    def _guard(self, path: Path, read: Callable[[], Any]) -> Any:
        import pyarrow

        try:
            return read()
        except (pyarrow.ArrowException, OSError) as error:
            cause = next(iter(str(error).splitlines()), "")[:200]
            raise BadInput(f"{path} is not a sound Parquet file", cause, "fetch or write it again") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingResource(
            f"{path} cannot be read",
            "Parquet files need the pyarrow library, which is not installed",
            "run: pip install 'cabochon[data]'",
        ) from None
    return pyarrow.parquet
