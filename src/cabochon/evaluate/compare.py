"""Two runs over the same items: how much better one is, and how sure that is.

The differences of single items are drawn again and again with replacement, the same items of both runs: a paired
bootstrap. Items are matched by their content, so that runs over different data are not compared by accident.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.base.errors import BadInput
from cabochon.evaluate.results import Item, Result, read_items, read_report

DRAWS = 10_000
# Over (log-probability, size) pairs: how one number is made of the two sums.
_OF_SUMS: dict[str, Callable[[float, float], float]] = {
    "bits_per_byte": lambda nats, size: -nats / size / math.log(2),
    "byte_perplexity": lambda nats, size: math.exp(-nats / size),
    "word_perplexity": lambda nats, size: math.exp(-nats / size),
}


@dataclass(frozen=True)
class Difference:
    """Of one metric of one task, second run minus first, with the ends of its 95% interval.

    `share`: of the draws, those in which the second is not better.
    """

    task: str
    metric: str
    items: int
    first: float
    second: float
    low: float
    high: float
    share: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def compare(first: Path, second: Path, *, seed: int = 0) -> list[Difference]:
    """The differences of all tasks that both runs have items of.

    Raises `MissingResource` and `BadInput` as `read_report`; `BadInput` when no item is in both.
    """
    ours, theirs = read_report(first), read_report(second)
    there = {(result.task, result.metric) for result in theirs.results}
    pairs = [result for result in ours.results if result.counts and (result.task, result.metric) in there]
    found = [_difference(result, first, second, np.random.default_rng(seed)) for result in pairs]
    known = [difference for difference in found if difference]
    if not known:
        raise BadInput(
            f"{first} and {second} cannot be compared",
            "no task has the same items in both",
            "run the same tasks with both models, each with --out",
        )
    return known


def _difference(result: Result, first: Path, second: Path, draw: np.random.Generator) -> Difference | None:
    metric, _, kind = result.metric.partition(",")
    one, other = (_scores(read_items(folder, result.task), metric, kind) for folder in (first, second))
    keys = [key for key in one if key in other]
    if len(keys) < 2:
        return None
    a, b = (np.array([scores[key] for key in keys], dtype=float) for scores in (one, other))
    values = _values(metric, a), _values(metric, b)
    drawn = _bootstrap(metric, a, b, draw)
    better = drawn > 0 if result.higher_is_better else drawn < 0
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Difference(result.label, result.metric, len(keys), *values, low, high, 1 - float(better.mean()))


def _scores(items: Sequence[Item], metric: str, kind: str) -> dict[str, list[float]]:
    """By content, what an item scored: a number, or for perplexities a log-probability and a size."""
    found: dict[str, list[float]] = {}
    for item in items:
        value: Any = item["scores"].get(metric) if item["filter"] == kind else None
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, int | float) and math.isfinite(part) for part in parts):
            found[f"{item['key']} {item['id']}"] = [float(part) for part in parts]
    sizes = {len(parts) for parts in found.values()}
    return found if sizes == ({2} if metric in _OF_SUMS else {1}) else {}


def _values(metric: str, scores: "np.ndarray[Any, Any]") -> float:
    of_sums = _OF_SUMS.get(metric)
    return of_sums(*scores.sum(0).tolist()) if of_sums else float(scores.mean())


def _bootstrap(
    metric: str, a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]", draw: np.random.Generator
) -> "np.ndarray[Any, Any]":
    """`DRAWS` differences, each of so many items drawn with replacement, the same ones of both runs."""
    drawn = np.empty(DRAWS)
    for number in range(DRAWS):
        chosen = draw.integers(0, len(a), len(a))
        drawn[number] = _values(metric, b[chosen]) - _values(metric, a[chosen])
    return drawn
