"""What a run can be told about its data. Standard library only."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from cabochon.base.errors import UsageError

Shape = Literal["auto", "text", "completion", "messages", "preference"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become batches. Raises `UsageError` for values that make no sense.

    A source is a file (.jsonl, .jsonl.gz, .parquet, .txt, .md), a folder with such files, `-` for standard input, or
    `hf:NAME[:config][:split]` for a data set of the Hugging Face Hub.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()  # share of the tokens that each source gives, endlessly; none: each document once
    shape: Shape = "auto"  # of the rows; auto: from the keys of each source's first row
    fold_system: bool = False  # put a system message before the first user message; otherwise its row is a bad one
    max_bad_rows: int = 10  # so many rows may be skipped, on each rank; one more stops the run

    epochs: int | None = None  # None: endless
    shuffle: bool = True
    seed: int = 0
    packing: bool = True  # several documents in a row; otherwise each begins a row of its own

    held_out: float = 0.0  # share of the documents that is kept for evaluation
    eval_sources: tuple[str, ...] = ()  # or what to evaluate on, from elsewhere

    workers: int = 1  # threads that tokenise
    prefetch: int = 4  # batches made ahead; 0: each when it is asked for

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("there is no data to train on", "no source is given", "name a file or a folder")
        if self.weights and len(self.weights) != len(self.sources):
            raise _refused("weights", self.weights, f"there are {len(self.sources)} sources", "give one for each")
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise _refused("weights", self.weights, "each has to be above 0", "leave out a source that is not wanted")
        if self.weights and self.epochs is not None:
            raise _refused(
                "epochs", self.epochs, "a mixture with weights repeats its smaller sources and has no end",
                "leave out epochs and say how many steps to train, or leave out the weights",
            )  # fmt: skip
        least = {"max_bad_rows": 0, "epochs": 1, "held_out": 0, "workers": 1, "prefetch": 0, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and not given >= value:  # NaN is refused as well
                raise _refused(name, given, f"it has to be at least {value}", "give another value, or leave it out")
        if not self.held_out < 1:
            raise _refused("held_out", self.held_out, "nothing is left to train on", "give a share, for example 0.01")
        if self.held_out and self.eval_sources:
            raise _refused("held_out", self.held_out, "eval_sources are named as well", "leave out one of the two")

    def settled(self) -> dict[str, Any]:
        """The fields that decide which batches come out; a run that goes on must have the same."""
        free = {"max_bad_rows", "eval_sources", "workers", "prefetch"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in free}


def _refused(name: str, value: object, why: str, hint: str) -> UsageError:
    return UsageError(f"{name} of the data cannot be {value}", why, hint)
