"""What a stored teacher looks like on the disk.

    FOLDER/index.json                   what it is: kind, k, vocabulary, temperature, tokenizer, totals, shards
    FOLDER/rows-00000.safetensors ...   packed rows, and what the teacher said at each counted position

A shard of R rows of T positions, M of which are counted (their target is not -100), in order, k entries for each:

    ids, targets, documents   int32 [R, T], as in a `Batch`
    starts                    int64 [R + 1]; entries of row r are those from starts[r] to starts[r + 1]
    low                       uint16 [M, k], the low 16 bits of the ids of the entries
    high                      uint8 [M, ceil(k h / 8)], the bits above, h for each entry, the first in the lowest bits;
                              h is 0 for up to 65,536 ids, 2 for up to 262,144, 4 for up to a million, else 8
    levels                    uint16 [M, k + 1], probabilities: exp(-level / 2048), and 0 for the level 65,535
    checks                    uint32 [R], CRC-32 of everything of a row, in this order

A probability is stored with a relative error of at most 1/4096 (0.025%); below exp(-31.9), 1e-14, it becomes that.
The last level of a position says, for kind "top-k", the probability of all other ids together; for kind "sampled"
the threshold that is explained in `train/teacher_sample.py`: entries below it stand for it.

With 64 entries and 256,000 ids a position takes 286 bytes: 128 + 16 for ids, 130 for levels, 12 for the text.
"""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED
from cabochon.text.tokenizer import Tokenizer

Kind = Literal["top-k", "sampled"]
Array: TypeAlias = NDArray[Any]

FORMAT = 1
INDEX = "index.json"
STEPS = 2048  # levels of a factor e
ZERO = 65_535  # the level of probability 0
ROW_ARRAYS, ENTRY_ARRAYS = ("ids", "targets", "documents"), ("low", "high", "levels")

_PROBABILITY = np.exp(np.arange(ZERO + 1) / -STEPS).astype(np.float32)
_PROBABILITY[ZERO] = 0


@dataclass(frozen=True)
class Said:
    """What a teacher said at M positions.

    Args:
        ids: int [M, k].
        probabilities: float32 [M, k].
        last: float32 [M], what else the kind needs: the rest of the probability, or the threshold.
    """

    ids: Array
    probabilities: Array
    last: Array


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all pieces in the order of their ids: equal where texts become the same ids."""
    digest = hashlib.sha256()
    for i in range(tokenizer.vocab_size):
        control = i in tokenizer.control_ids
        piece = tokenizer.decode([i], skip_control=False).encode() if control else tokenizer.token_bytes(i)
        digest.update(b"%d:%d:%s" % (control, len(piece), piece))
    return digest.hexdigest()


def high_bits(vocab_size: int) -> int:
    """Bits of an id that are stored apart from its low 16. Raises `UsageError` for more than 2^24 ids."""
    for bits in (0, 2, 4, 8):
        if vocab_size <= 2 ** (16 + bits):
            return bits
    raise UsageError(f"{vocab_size} ids cannot be stored", "an id has 24 bits at most", "use a smaller vocabulary")


def position_bytes(k: int, vocab_size: int) -> int:
    """Bytes of a counted position, with those of its text."""
    return 12 + 2 * k + -(-k * high_bits(vocab_size) // 8) + 2 * (k + 1)


def pack_ids(ids: Array, vocab_size: int) -> tuple[Array, Array]:
    """`low` and `high` of ids [M, k]."""
    bits = high_bits(vocab_size)
    low = (ids & 0xFFFF).astype(np.uint16)
    if not bits:
        return low, np.zeros((len(ids), 0), np.uint8)
    per_byte = 8 // bits
    above = np.pad((ids >> 16).astype(np.uint8), ((0, 0), (0, -ids.shape[1] % per_byte)))
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    grouped = above.reshape(len(ids), above.shape[1] // per_byte, per_byte) << shifts
    return low, np.bitwise_or.reduce(grouped, axis=2)


def unpack_ids(low: Array, high: Array, vocab_size: int) -> Array:
    """int32 [M, k]; the reverse of `pack_ids`."""
    ids: Array = low.astype(np.int32)
    bits = high_bits(vocab_size)
    for place in range(8 // bits if bits else 0):
        strided = ids[:, place :: 8 // bits]
        above = (high[:, : strided.shape[1]] >> (place * bits)) & (2**bits - 1)
        strided |= above.astype(np.int32) << 16
    return ids


def to_levels(probabilities: Array) -> Array:
    """uint16 levels of probabilities of any shape."""
    with np.errstate(divide="ignore"):
        steps = np.round(-STEPS * np.log(probabilities.astype(np.float64)))
    return np.where(probabilities > 0, np.clip(steps, 0, ZERO - 1), ZERO).astype(np.uint16)


def encode(said: Said, vocab_size: int) -> dict[str, Array]:
    """`low`, `high` and `levels` of what a teacher said."""
    low, high = pack_ids(said.ids, vocab_size)
    return {"low": low, "high": high, "levels": to_levels(np.column_stack([said.probabilities, said.last]))}


def decode(entries: dict[str, Array], kind: Kind, vocab_size: int) -> tuple[Array, Array, Array | None]:
    """ids int32, probabilities and, of the kind "sampled", weights float32, all [M, k].

    The rounding of levels is spread over all of a position's, so that probabilities with their rest, or weights,
    add up to 1.
    """
    ids = unpack_ids(entries["low"], entries["high"], vocab_size)
    values = _PROBABILITY[entries["levels"]]
    if kind == "top-k":
        values /= values.sum(1, keepdims=True)
        return ids, values[:, :-1], None
    weights = np.maximum(values[:, :-1], values[:, -1:])
    return ids, values[:, :-1], weights / weights.sum(1, keepdims=True)


def row_check(parts: dict[str, Array]) -> int:
    """CRC-32 of one row: its ids, targets and documents [T], its entries [m, ...]."""
    check = 0
    for name in (*ROW_ARRAYS, *ENTRY_ARRAYS):
        check = zlib.crc32(np.ascontiguousarray(parts[name]).data, check)
    return check


def counted(targets: Array) -> Array:
    """bool, where a loss counts."""
    where: Array = targets != IGNORED
    return where
