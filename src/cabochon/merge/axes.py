"""What a sweep goes through: the values of one or two parameters of a merge, as they are typed."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cabochon.base.errors import UsageError, nearest
from cabochon.merge.config import MergeConfig, Parameters, Source
from cabochon.merge.methods import METHODS

MOST_POINTS = 1000


@dataclass(frozen=True)
class Axis:
    """The values that a parameter takes. `model`: for this model alone, as the file names it."""

    name: str
    values: tuple[float, ...]
    model: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.model}" if self.model else self.name


def parse_axis(text: str) -> Axis:
    """Read `t=0:1:5` (five values from 0 to 1), `eta=0.1,0.3` or `weight@MODEL=0:1:3`. Raises `UsageError`."""
    name, equals, given = text.rpartition("=")
    name, _, model = name.partition("@")
    try:
        if not name or not equals:
            raise ValueError
        values = _range(given) if ":" in given else tuple(float(part) for part in given.split(","))
    except ValueError:
        raise UsageError(
            f"{text!r} is not a sweep", "it says not which values a parameter takes", "write t=0:1:5, or t=0,0.3,1"
        ) from None
    if not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise UsageError(f"{text!r} is not a sweep", "a value is there twice or is no number", "give different numbers")
    return Axis(name, values, model or None)


def _range(text: str) -> tuple[float, ...]:
    first, last, count = text.split(":")
    ends, steps = (float(first), float(last)), int(count) - 1
    if not 1 <= steps < MOST_POINTS:
        raise ValueError
    # To 12 digits, so that they are written as a person would.
    return tuple(float(f"{ends[0] + (ends[1] - ends[0]) * i / steps:.12g}") for i in range(steps + 1))


def at(config: MergeConfig, axes: Sequence[Axis], values: Sequence[float]) -> MergeConfig:
    """A configuration with one value of each axis, which counts instead of every other that the file has.

    Raises `UsageError`: the method has no such parameter, or the merge no such model.
    """
    for axis, value in zip(axes, values, strict=True):
        _check(config, axis)
        config = _with(config, axis, value)
    return config


def grid(axes: Sequence[Axis]) -> list[tuple[float, ...]]:
    """All points of a sweep. Raises `UsageError`: there are too many of them, or of axes, or one is there twice."""
    if not 1 <= len(axes) <= 2 or len({str(axis) for axis in axes}) < len(axes):
        raise UsageError("this is no sweep", "it takes one or two different parameters", "give --sweep once or twice")
    points = list(itertools.product(*(axis.values for axis in axes)))
    if len(points) > MOST_POINTS:
        raise UsageError(f"{len(points)} points are too many", f"{MOST_POINTS} are possible", "give fewer values")
    return points


def _check(config: MergeConfig, axis: Axis) -> None:
    method = METHODS.get(config.method)
    if method is None:
        return  # `plan` says so
    known = {p.name: p for p in method.parameters}
    if axis.name not in known:
        close = nearest(axis.name, known)
        hint = f"did you mean {close}?" if close else "merge with a method that has it"
        raise UsageError(
            f"there is nothing to sweep in {axis}", f"{method.name} has {', '.join(known) or 'no parameters'}", hint
        )
    if axis.model is None:
        return
    if not known[axis.name].per_model:
        raise UsageError(
            f"there is nothing to sweep in {axis}", f"{axis.name} is one value for all models", f"write {axis.name}=..."
        )
    base = config.base if method.base != "none" else None
    models = {str(source.model) for part in config.slices for source in part.sources if source.model != base}
    if axis.model not in models:
        close = nearest(axis.model, models)
        cause = "it is the base, whose parameters say nothing" if axis.model == str(base) else "no model has that name"
        raise UsageError(
            f"there is nothing to sweep in {axis}",
            cause,
            f"did you mean {axis.name}@{close}?" if close else f"there are {', '.join(sorted(models))}",
        )


def _with(config: MergeConfig, axis: Axis, value: float) -> MergeConfig:
    def without(parameters: Parameters) -> Parameters:
        return {name: setting for name, setting in parameters.items() if name != axis.name}

    def changed(source: Source) -> Source:
        if axis.model is None:
            return replace(source, parameters=without(source.parameters))
        own = str(source.model) == axis.model
        return replace(source, parameters={**source.parameters, axis.name: value}) if own else source

    slices = tuple(replace(part, sources=tuple(map(changed, part.sources))) for part in config.slices)
    if axis.model is not None:
        return replace(config, slices=slices)
    return replace(
        config,
        slices=tuple(replace(part, parameters=without(part.parameters)) for part in slices),
        module_parameters=without(config.module_parameters),
        parameters={**config.parameters, axis.name: value},
    )
