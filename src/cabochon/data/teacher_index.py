"""The index of a stored teacher: what it is, what it came to, and which shards it is made of."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from cabochon.base.errors import BadInput, MissingResource
from cabochon.data.teacher_format import FORMAT, INDEX, Kind

SUMS = "left_out", "kl_lost", "variance", "entropy"


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """What is settled before the first row.

    Args:
        kind: "top-k": the k likeliest ids and the rest; "sampled": an unbiased sample of k ids.
        k: entries of a position.
        vocab_size: ids of the teacher's model.
        temperature: what its logits were divided by.
        length: positions of a row.
        teacher: how the teacher was named.
        tokenizer: `fingerprint` of its tokenizer.
        data: where the rows came from, `DataConfig.settled()`, for the reader's eyes.
    """

    kind: Kind
    k: int
    vocab_size: int
    temperature: float
    length: int
    teacher: str
    tokenizer: str
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The facts by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over what was stored; in nats, over counted positions.

    Args:
        rows, tokens: rows, and counted positions.
        left_out: probability of all that is no entry, or, when sampled, of what entries stand for by chance.
        kl_lost: KL divergence of the teacher from its k likeliest ids with the rest spread evenly over all others;
            0 when sampled: nothing is lost in expectation.
        variance: expected squared distance of sampled weights from the teacher's probabilities; 0 for the likeliest.
        entropy: of the teacher, which is what the cross-entropy with it cannot fall below.
    """

    rows: int = 0
    tokens: int = 0
    left_out: float = 0.0
    kl_lost: float = 0.0
    variance: float = 0.0
    entropy: float = 0.0

    def plus(self, other: "Totals") -> "Totals":
        """The sums of both."""
        return Totals(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Shard:
    """One file of an index: its rows, their counted positions, its size and SHA-256."""

    file: str
    rows: int
    tokens: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class TeacherIndex:
    """Everything that index.json says."""

    facts: TeacherFacts
    totals: Totals
    shards: tuple[Shard, ...]

    def per_token(self) -> dict[str, float]:
        """Means over counted positions: bytes, left_out, kl_lost, variance and entropy."""
        count = max(1, self.totals.tokens)
        nbytes = sum(shard.nbytes for shard in self.shards)
        sums = {name: getattr(self.totals, name) for name in SUMS}
        return {name: value / count for name, value in ({"bytes": nbytes} | sums).items()}

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "format": FORMAT,
            **self.facts.to_json(),
            "totals": asdict(self.totals),
            "per_token": self.per_token(),
            "shards": [asdict(shard) for shard in self.shards],
        }


def read_index(folder: Path) -> TeacherIndex:
    """The index of a stored teacher, whose shards are all there in their full size.

    Raises:
        MissingResource: the folder, its index or a shard is not there.
        BadInput: the index is damaged or of another version, or a shard is cut short.
    """
    path = folder / INDEX
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingResource(
            f"{folder} is no stored teacher",
            f"{INDEX}: {error.strerror or error}",
            "name a folder that `cabochon teacher-logits` has finished",
        ) from None
    try:
        document = json.loads(raw)
        index = _parsed(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _unusable(path, "it is not a whole index") from None
    if document["format"] != FORMAT:
        raise BadInput(
            f"{path} cannot be used",
            f"it is of format {document['format']}, this version reads {FORMAT}",
            "use the version of cabochon that wrote it",
        )
    _check_shards(folder, index)
    return index


def _parsed(document: Any) -> TeacherIndex:
    facts = TeacherFacts(**{field.name: document[field.name] for field in fields(TeacherFacts)})
    totals = Totals(**document["totals"])
    shards = tuple(Shard(**shard) for shard in document["shards"])
    whole = [document["format"], facts.k, facts.vocab_size, facts.length, totals.rows, totals.tokens]
    whole += [number for shard in shards for number in (shard.rows, shard.tokens, shard.nbytes)]
    sums = [facts.temperature, *(getattr(totals, name) for name in SUMS)]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError("counts have to be whole numbers")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in sums):
        raise ValueError("sums have to be numbers")
    if facts.kind not in get_args(Kind) or min(facts.k, facts.vocab_size, facts.length, totals.rows) < 1:
        raise ValueError("nothing could be read")
    if [sum(s.rows for s in shards), sum(s.tokens for s in shards)] != [totals.rows, totals.tokens]:
        raise ValueError("shards and totals differ")
    if not all(isinstance(shard.file, str) and Path(shard.file).name == shard.file for shard in shards):
        raise ValueError("shards lie beside the index")
    return TeacherIndex(facts, totals, shards)


def _check_shards(folder: Path, index: TeacherIndex) -> None:
    for shard in index.shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise MissingResource(
                f"{path} cannot be read", error.strerror or str(error), "copy the whole folder again"
            ) from None
        if size != shard.nbytes:
            raise _unusable(path, f"it has {size} bytes and {INDEX} says {shard.nbytes}")


def _unusable(path: Path, cause: str) -> BadInput:
    return BadInput(f"{path} cannot be used", cause, "the file is damaged: copy the folder again, or make it anew")
