"""The header of a safetensors file, checked before a byte of its data is used.

The file is: 8 bytes, the header's length N as a little-endian integer; N bytes of JSON; the tensors' bytes.
The JSON maps a tensor's name to its dtype, its shape and the begin and end of its bytes, counted from the end of
the header. Here every tensor has to lie inside the file, as long as its shape says, and together they have to
fill the file: no overlap, no hole, nothing behind the last one. (Source: the format's own description in the
safetensors repository.)
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cabochon.base.errors import BadInput, MissingResource

MAX_HEADER = 100_000_000  # the limit of the reference implementation, too
MAX_AXES = 8
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `start` is counted from the beginning of the file, in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises `BadInput` when the header is not sound or lies about the file, `MissingResource` when the file cannot
    be opened.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _header_bytes(file, path, size)
    except OSError as error:
        raise MissingResource(
            f"{path} cannot be read",
            error.strerror or str(error),
            "check the folder, or fetch the model again",
        ) from None
    document = parse_json(raw, path)
    document.pop("__metadata__", None)
    start = 8 + len(raw)
    tensors = {name: _stored(path, name, entry, start) for name, entry in document.items()}
    _check_coverage(path, tensors, start, size)
    return tensors


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises `BadInput` for anything else, and for a key that is there twice."""
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = str(error) if isinstance(error, _RepeatedKey) else "it is not sound JSON"
        raise broken(path, reason) from None
    if not isinstance(document, dict):
        raise broken(path, "it is not a JSON object")
    return document


def broken(path: Path, cause: str) -> BadInput:
    """The error for a file whose content cannot be used."""
    return BadInput(f"{path} cannot be used", cause, "the file is damaged or incomplete: copy or fetch it again")


class _RepeatedKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        again = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RepeatedKey(f"{again!r} is in it twice")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size < 10:
        raise broken(path, f"it has {size} bytes, too few for a safetensors file")
    if length > min(MAX_HEADER, size - 8):
        raise broken(path, f"its header claims {length} bytes; the file has {size}, a header at most {MAX_HEADER}")
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise broken(path, "it does not begin like a safetensors file")
    return raw


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"the header's entry for {name!r} is not a dtype, a shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise broken(path, f"{name!r} has an unknown dtype")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise broken(path, f"the shape of {name!r} is not a short list of whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise broken(path, f"the offsets of {name!r} are not two whole numbers")
    bits, nbytes = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise broken(path, f"{name!r} is {dtype} {shape}, {bits // 8} bytes, and its offsets span {nbytes}")
    return Stored(path, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _check_coverage(path: Path, tensors: dict[str, Stored], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            kind = "overlaps another tensor" if tensor.start < end else "leaves a hole before it"
            raise broken(path, f"{name!r} {kind}")
        end += tensor.nbytes
    if end != size:
        raise broken(path, f"its header describes {end} bytes and the file has {size}")
