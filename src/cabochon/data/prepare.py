"""A data configuration to lanes that are ready to go, with every error that can be found before training starts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.config import DataConfig, Shape
from cabochon.data.format import check_shape, detect_shape
from cabochon.data.lane import QUOTED, Encoded, Lane, Tally, encode, too_many
from cabochon.data.order import held_out
from cabochon.data.records import BadRow, Joined, Numbers, Record, Rows
from cabochon.data.sources import open_source
from cabochon.data.streams import Looked
from cabochon.data.supply import Passing, Shuffled, Supply
from cabochon.text.tokenizer import Tokenizer

LOOKED_AT = 32  # rows of a source that are tried beforehand


@dataclass(frozen=True)
class Part:
    """Rows that are shuffled as one, the shapes of what they were joined from, and which of them are used."""

    rows: Joined | Looked
    shapes: tuple[Shape, ...]
    numbers: Numbers | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that makes the lanes of a stream. `lengths_only`: rows of the right lengths, to be counted, not learned."""

    config: DataConfig
    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    rows: int
    length: int
    lengths_only: bool = False

    def lanes(self, own: Sequence[int], tally: Tally) -> list[Lane]:
        """The lanes with these numbers, at their beginning."""
        supplies = [self._supply(number, part, own) for number, part in enumerate(self.parts)]
        encoders = [self.encoder(part) for part in self.parts]
        if self.lengths_only:
            encoders = [_remembering(encoder) for encoder in encoders]
        weights = self.config.weights or None
        settings: dict[str, Any] = {"length": self.length, "packing": self.config.packing}
        return [Lane(number, supplies, weights, encoders, tally, **settings) for number in own]

    def encoder(self, part: Part) -> Callable[[Record], Encoded]:
        """What makes documents of the rows of a part."""

        def apply(record: Record) -> Encoded:
            shape = part.shapes[record.part]
            return encode(self.tokenizer, record, shape, fold=self.config.fold_system, length=self.length)

        return apply

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on in its data."""
        names = ("seed", "shuffle", "packing", "fold_system", "held_out")
        sizes = [None if isinstance(part.rows, Looked) else _size(part) for part in self.parts]
        return {
            **{name: getattr(self.config, name) for name in names},
            "weights": list(self.config.weights),
            "shapes": [sorted(set(part.shapes)) for part in self.parts],
            "rows": self.rows,
            "length": self.length,
            "documents and bytes": sizes,
        }

    def check(self, identity: dict[str, Any]) -> None:
        """Raise `UsageError` when a run was made with another identity."""
        for name, now in self.identity().items():
            if identity.get(name) != now:
                raise UsageError(
                    "the run cannot go on in its data",
                    f"{name} was {identity.get(name)} when it was saved, and is {now}",
                    "give it the data and settings that it had, or start a new run",
                )

    def check_countable(self) -> None:
        """Raise `UsageError` when there is no number of batches, or none that can be known beforehand."""
        if self.config.epochs is None or any(isinstance(part.rows, Looked) for part in self.parts):
            raise UsageError(
                "the number of batches is not known",
                "the data goes on without an end" if self.config.epochs is None else "it is not there yet",
                "say how many steps to train (--steps)",
            )

    def _supply(self, number: int, part: Part, own: Sequence[int]) -> Supply:
        settings: dict[str, Any] = {
            "lanes": self.rows,
            "seeds": (self.config.seed, number),
            "shuffle": self.config.shuffle,
            "epochs": self.config.epochs,
        }
        if isinstance(part.rows, Looked):
            return Passing(part.rows, own=own, **settings)
        assert part.numbers is not None
        return Shuffled(part.rows, part.numbers, **settings)


def plan_training(config: DataConfig, tokenizer: Tokenizer, *, rows: int, length: int, world: int) -> Plan:
    """Everything but what is held out. Raises as `open_stream`."""
    _check_arriving(config, world)
    parts = []
    for part in _open(config, length):
        if isinstance(part.rows, Joined):
            count = len(part.rows.sizes)
            used = np.setdiff1d(np.arange(count), held_out(count, config.held_out, config.seed), assume_unique=True)
            if not len(used):
                raise BadInput(
                    "there is no data to train on",
                    f"all {count} documents are held out",
                    "lower the share (--held-out)",
                )
            part = replace(part, numbers=used)
        parts.append(part)
    plan = Plan(config=config, tokenizer=tokenizer, parts=tuple(parts), rows=rows, length=length)
    _try(plan)
    return plan


def plan_eval(config: DataConfig, tokenizer: Tokenizer, *, rows: int, length: int, world: int) -> Plan | None:
    """What is held out, or comes from elsewhere; None when there is neither. Raises as `open_stream`."""
    once = replace(config, epochs=1, weights=(), shuffle=False)
    if config.eval_sources:
        once = replace(once, sources=config.eval_sources, eval_sources=())
        return plan_training(once, tokenizer, rows=rows, length=length, world=world)
    if not config.held_out:
        return None
    parts = []
    for part in _open(config, length):
        assert isinstance(part.rows, Joined)  # plan_training has refused to hold out of what arrives
        parts.append(replace(part, numbers=held_out(len(part.rows.sizes), config.held_out, config.seed)))
    return Plan(config=once, tokenizer=tokenizer, parts=tuple(parts), rows=rows, length=length)


def _open(config: DataConfig, length: int) -> Iterator[Part]:
    """The sources, joined unless they have weights."""
    opened = [open_source(source, length) for source in config.sources]
    files: list[Rows] = []
    for source, found in zip(config.sources, opened, strict=True):
        if not isinstance(found, list):
            looked = Looked(found)
            yield Part(looked, (_shape(config, looked.first(), source),), None)
        elif config.weights:
            yield _joined(config, found)
        else:
            files += found
    if files:
        yield _joined(config, files)


def _joined(config: DataConfig, files: Sequence[Rows]) -> Part:
    shapes = tuple(_shape(config, _first(rows), "") for rows in files)
    return Part(Joined(files), shapes, None)


def _shape(config: DataConfig, records: Iterable[Record], source: str) -> Shape:
    """The stated shape, or that of the first row that can be read."""
    quoted, hint = [], ""
    for record in itertools.islice(records, LOOKED_AT):
        try:
            keys = record.row()
        except BadRow as error:
            quoted.append(f"{record.place}: {error}")
            hint = error.hint
            continue
        return detect_shape(keys, record.place) if config.shape == "auto" else config.shape
    if not quoted:
        raise BadInput(f"there is no data in {source}", "it has no rows", "name a source with at least one row")
    raise _none_usable(quoted, hint)


def _first(rows: Rows) -> Iterator[Record]:
    return (rows.read(number) for number in range(len(rows.sizes)))


def _try(plan: Plan) -> None:
    """Make documents of the first rows, so that data that does not fit at all is seen at once."""
    shapes = {shape for part in plan.parts for shape in part.shapes}
    for shape in shapes:
        check_shape(plan.tokenizer, shape)
    if "preference" in shapes and len(shapes) > 1:
        raise UsageError(
            "the sources do not go together", "some hold preferences and some do not", "train on the one or the other"
        )
    for part in plan.parts:
        arriving = isinstance(part.rows, Looked)
        records = part.rows.first() if isinstance(part.rows, Looked) else part.rows.beginnings(LOOKED_AT)
        quoted, tried = [], 0
        for record in itertools.islice(records, LOOKED_AT):
            tried += 1
            try:
                plan.encoder(part)(record)
            except BadRow as error:
                quoted.append(f"{record.place}: {error}")
                hint = error.hint
            else:
                if arriving:  # what comes next may not be there yet
                    break
        if len(quoted) == tried:
            raise _none_usable(quoted, hint)
        if len(quoted) > plan.config.max_bad_rows:
            raise too_many(len(quoted), quoted[:QUOTED], plan.config.max_bad_rows, hint)


def _check_arriving(config: DataConfig, world: int) -> None:
    """Raise `UsageError` when rows that come once, in one order, are to be used in a way that this does not allow."""
    arriving = [source for source in config.sources if source == "-" or source.startswith("hf:")]
    problem = None
    if not arriving:
        return
    if len(config.sources) > 1 and not config.weights:
        problem = f"{arriving[0]} is not read as a whole, so its share has to be said", "give weights (--data-weights)"
    elif config.held_out:
        problem = (
            f"nothing can be held out of {arriving[0]}, which is not read as a whole",
            "name --eval-data instead",
        )
    elif "-" in arriving and config.weights:
        problem = "a mixture with weights repeats its sources, and standard input comes once", "save it to a file"
    elif "-" in arriving and (config.epochs or 1) > 1:
        problem = "standard input comes once", "leave out epochs, or save it to a file"
    elif "-" in arriving and world > 1:
        problem = "standard input belongs to one process", "save it to a file"
    if problem:
        raise UsageError("the data cannot be used like this", *problem)


def _none_usable(quoted: Sequence[str], hint: str) -> BadInput:
    hint = hint or "correct the rows, or name the shape that they have (--shape)"
    return BadInput("no row of the data can be used", "; ".join(quoted[:QUOTED]), hint)


def _size(part: Part) -> list[int]:
    assert isinstance(part.rows, Joined)
    return [len(part.numbers if part.numbers is not None else ()), int(part.rows.sizes.sum())]


def _remembering(encoder: Callable[[Record], Encoded]) -> Callable[[Record], Encoded]:
    """Documents of zeros, as long as those that were made of the same row before."""
    known: dict[int, tuple[list[int], bool, bool]] = {}

    def apply(record: Record) -> Encoded:
        if record.number not in known:
            made = encoder(record)
            known[record.number] = [pairs.shape[1] for pairs in made.documents], made.split, made.truncated
        lengths, split, truncated = known[record.number]
        return Encoded(tuple(np.zeros((2, n), np.int64) for n in lengths), split, truncated)

    return apply
