"""One merge for each value of a parameter, or of two: merged into memory, handed to an evaluation, and forgotten.

Nothing of a point is ever written but its scores, a line of JSON each, so that a sweep that was interrupted goes on
where it stopped. What is measured is the caller's affair.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.machine import free_memory
from cabochon.merge.axes import Axis, at, grid
from cabochon.merge.run import Merge
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2

GIB = 2**30
Scores = Mapping[str, float]
Evaluate = Callable[[Gemma2], Scores]


@dataclass(frozen=True)
class Point:
    """What the merge scored with one value of each axis. `key` names everything that the scores depend on."""

    values: tuple[float, ...]
    scores: Scores
    key: str


def sweep(
    work: Merge,
    axes: Sequence[Axis],
    evaluate: Evaluate,
    *,
    measure: str,
    known: Iterable[Point] = (),
    threads: int = 0,
    device: str = "cpu",
) -> Iterator[Point]:
    """Merge and measure point after point.

    Args:
        work: the merge, prepared.
        axes: see `grid` for how many.
        evaluate: called with each merged model, whose tensors the next point takes over.
        measure: what the scores depend on beside the model, as one word.
        known: points from before. Those of this sweep are given as they are.
        threads: for merging.
        device: where models are handed over.

    Raises as `grid`, `at`, `plan` and `execute_in_memory`; `MissingResource` when a model does not fit the memory.
    """
    points = grid(axes)
    for values in points:  # all that can be wrong is said before anything is read
        _changed(work, axes, values)
    before = {point.key: point for point in known}
    memory = _Memory(work, device)
    for values in points:
        merge = _changed(work, axes, values)
        key = merge.key(measure)[:16]
        if key not in before:
            with _told(axes, values):
                before[key] = Point(values, dict(evaluate(memory.model(merge, threads))), key)
        yield before[key]


def _changed(work: Merge, axes: Sequence[Axis], values: Sequence[float]) -> Merge:
    with _told(axes, values):
        return work.changed(at(work.config, axes, values))


class _Memory:
    """One model's tensors, for all points in turn."""

    def __init__(self, work: Merge, device: str) -> None:
        self._work, self._device, self._tensors = work, device, dict[str, Tensor]()

    def model(self, merge: Merge, threads: int) -> Gemma2:
        if not self._tensors:
            self._tensors = self._allocated()
        merge.into(self._tensors, threads=threads)
        return _model(merge.plan.shape, {name: t.to(self._device) for name, t in self._tensors.items()})

    def _allocated(self) -> dict[str, Tensor]:
        plan = self._work.plan
        # No processor computes in float16 without loss, and no Gemma 2 is meant to.
        dtype = torch.float32 if plan.dtype == torch.float16 else plan.dtype
        need = plan.nbytes // plan.dtype.itemsize * dtype.itemsize
        free = free_memory("cpu")
        if 0 < free < need:
            raise MissingResource(
                "the merged model does not fit the memory",
                f"its weights take {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free",
                "sweep on a larger machine, or merge smaller models of the same training",
            )
        return {job.name: torch.empty(job.shape, dtype=dtype) for job in plan.jobs}


def _model(config: Gemma2Config, tensors: Mapping[str, Tensor]) -> Gemma2:
    with torch.device("meta"):
        model = Gemma2(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@contextmanager
def _told(axes: Sequence[Axis], values: Sequence[float]) -> Iterator[None]:
    """Errors say at which point they came up."""
    try:
        yield
    except BadInput as error:
        where = ", ".join(f"{axis} = {value:g}" for axis, value in zip(axes, values, strict=True))
        raise BadInput(f"at {where}: {error.what}", error.cause, error.hint) from None


# Points on the disk


def read_points(path: Path) -> list[Point]:
    """The points that `append_point` has written; what is not a whole line of them is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [point for line in lines if (point := _point(line))]


def append_point(path: Path, point: Point) -> None:
    """Put a point on the disk. Raises `OSError`."""
    line = json.dumps({"key": point.key, "values": list(point.values), "scores": dict(point.scores)})
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last line was cut off
                line = "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _point(line: bytes) -> Point | None:
    try:
        found: Any = json.loads(line)
        scores = {str(name): float(value) for name, value in found["scores"].items()}
        return Point(tuple(float(v) for v in found["values"]), scores, str(found["key"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
