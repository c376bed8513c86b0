"""The name of a source to its rows."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from cabochon.base.errors import BadInput, MissingResource, UsageError, nearest
from cabochon.data.format import COLUMNS
from cabochon.data.parquet import Parquet
from cabochon.data.records import MIN_PIECE, JsonLines, Rows, TextFiles, open_content
from cabochon.data.streams import Arriving, HubDataset, open_standard_input

JSON, TEXT, TABLE = (".jsonl", ".ndjson", ".json"), (".txt", ".md"), (".parquet",)


def open_source(source: str, length: int) -> list[Rows] | Arriving:
    """The rows of a file, of the files in a folder, of `-` or of `hf:NAME`, for rows of `length` tokens.

    Raises:
        MissingResource: it is not there or cannot be read, or the `data` extra is needed.
        BadInput: a file is damaged, or there is nothing in it.
        UsageError: it is of a kind that cannot be read.
    """
    piece = max(MIN_PIECE, 16 * length)  # a few rows of text
    if source == "-":
        return open_standard_input(piece)
    if source.startswith("hf:"):
        return HubDataset(source)
    path = Path(source)
    if not path.exists():
        raise _missing(path)
    files = _files(path) if path.is_dir() else [path]
    parts = [part for kind, group in itertools.groupby(files, _kind) for part in _open(kind, list(group), piece)]
    parts = [part for part in parts if len(part.sizes)]
    if not parts:
        raise _empty(source, "it has no rows")
    return parts


def _files(folder: Path) -> list[Path]:
    """What can be read of a folder, at any depth, by name; names that begin with a dot are left out."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _known(path)]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise _empty(str(folder), f"no file in it ends with {', '.join((*JSON, *TEXT, *TABLE))} (or .gz after it)")
    return visible


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _known(path: Path) -> bool:
    kind = _kind(path)
    return kind in JSON or kind in TEXT or (kind in TABLE and path.suffix != ".gz")


def _open(kind: str, files: list[Path], piece: int) -> Iterator[Rows]:
    if not all(map(_known, files)):
        raise UsageError(
            f"{files[0]} cannot be read",
            f"rows come from files whose names end with {', '.join((*JSON, *TEXT, *TABLE))} (or .gz after it)",
            "write one JSON object on each line of a .jsonl file",
        )
    if kind in TEXT:
        yield TextFiles([(str(path), open_content(path)) for path in files], piece)
    elif kind in TABLE:
        yield Parquet(files, COLUMNS)
    else:
        yield from map(_json_lines, files)


def _json_lines(path: Path) -> JsonLines:
    content = open_content(path)
    if content.read(0, min(64, content.size)).lstrip().startswith(b"["):
        raise BadInput(
            f"{path} cannot be read row by row",
            "it is one JSON list, and has to be one JSON object on each line",
            f"convert it: jq -c '.[]' {path} > {path.with_name(path.stem + '-rows.jsonl')}",
        )
    return JsonLines(str(path), content)


def _missing(path: Path) -> MissingResource:
    parent = path.parent
    close = nearest(path.name, (p.name for p in parent.iterdir())) if parent.is_dir() else None
    hint = f"did you mean {parent / close}?" if close else "check the name; a data set of the Hub is written hf:NAME"
    return MissingResource(f"{path} cannot be read", "there is no such file or folder", hint)


def _empty(source: str, cause: str) -> BadInput:
    return BadInput(f"there is no data in {source}", cause, "name a file or folder with at least one row")
