"""Looking at models before they are merged: how long their task vectors are, what angles they make, where signs clash.

A task vector is what training added to a tensor of the base. Long ones carry much; at 90 degrees two of them have
learned different things, at 0 the same; where their signs clash, TIES (arXiv 2306.01708) drops what loses the vote.
WARP (arXiv 2406.16768) found task vectors at about 90 degrees and whole weights collinear, which is why it interpolates
the former. All sums are in float64, made block by block; M is the number of models.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import MEASURED_BLOCK, Block, Whole, refuse_unless_finite
from cabochon.merge.methods.method import bind
from cabochon.merge.methods.sparsify import MAGNITUDE, Thin, everything

Products = tuple[tuple[float, ...], ...]  # inner products between some vectors
NO_LENGTH = 1e-30  # of the square of a vector that is none
_LAYER = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Measured:
    """Sums over one tensor, or over several: they add up with `+`.

    Attributes:
        elements: how many there are.
        weights: inner products [M + 1, M + 1] between whole tensors, the base first.
        deltas: inner products [M, M] between task vectors.
        touched: elements that any task vector changes, after trimming.
        clashing: those of them that two task vectors move in opposite directions.
        mass: sum of the magnitudes of all task vectors, after trimming.
        outvoted: the part of it whose sign is not the one that TIES elects.
    """

    elements: int
    weights: Products
    deltas: Products
    touched: int
    clashing: int
    mass: float
    outvoted: float

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.elements + other.elements,
            _sum(self.weights, other.weights),
            _sum(self.deltas, other.deltas),
            self.touched + other.touched,
            self.clashing + other.clashing,
            self.mass + other.mass,
            self.outvoted + other.outvoted,
        )

    @property
    def base_norm(self) -> float:
        """Length of the base's tensor."""
        return math.sqrt(self.weights[0][0])

    @property
    def norms(self) -> tuple[float, ...]:
        """Length of each task vector."""
        return tuple(math.sqrt(row[i]) for i, row in enumerate(self.deltas))

    @property
    def relative_norms(self) -> tuple[float | None, ...]:
        """Length of each task vector as a share of the base's; None where the base is zero."""
        return tuple(norm / self.base_norm if self.weights[0][0] > NO_LENGTH else None for norm in self.norms)

    @property
    def angles(self) -> tuple[float | None, ...]:
        """Degrees between task vectors, pair by pair (0 1, 0 2, ..., 1 2, ...); None where one of them is zero."""
        return tuple(_angle(self.deltas, i, j) for i, j in combinations(range(len(self.deltas)), 2))

    @property
    def weight_angles(self) -> tuple[float | None, ...]:
        """Degrees between the models' whole weights, pair by pair."""
        return tuple(_angle(self.weights, i, j) for i, j in combinations(range(1, len(self.weights)), 2))

    @property
    def clash_share(self) -> float:
        """Of the elements that change, the share on which task vectors disagree about the sign."""
        return self.clashing / self.touched if self.touched else 0.0

    @property
    def outvoted_share(self) -> float:
        """Of the magnitude of all task vectors, the share that TIES drops because it lost the vote."""
        return self.outvoted / self.mass if self.mass else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything that can be shown, as plain values."""
        return {
            "elements": self.elements,
            "base_norm": self.base_norm,
            "norms": list(self.norms),
            "relative_norms": list(self.relative_norms),
            "angles": list(self.angles),
            "weight_angles": list(self.weight_angles),
            "clash_share": self.clash_share,
            "outvoted_share": self.outvoted_share,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` has found. `tensors` by name, in the order of the base; `density` is what TIES would keep."""

    models: tuple[str, ...]
    density: float
    tensors: Mapping[str, Measured]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of models that angles are between, in their order."""
        return list(combinations(self.models, 2))

    @property
    def total(self) -> Measured:
        """All tensors together."""
        return _total(self.tensors.values())

    @property
    def layers(self) -> dict[int, Measured]:
        """The tensors of each decoder layer together."""
        numbers = sorted({layer for layer, _ in map(place, self.tensors) if layer is not None})
        return {n: _total(m for name, m in self.tensors.items() if place(name)[0] == n) for n in numbers}

    @property
    def kinds(self) -> dict[str, Measured]:
        """The tensors of each kind together, those of all layers."""
        kinds = dict.fromkeys(place(name)[1] for name in self.tensors)
        return {kind: _total(m for name, m in self.tensors.items() if place(name)[1] == kind) for kind in kinds}

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, for `json.dumps`."""
        groups = {"layers": {str(n): m for n, m in self.layers.items()}, "kinds": self.kinds, "tensors": self.tensors}
        return {
            "models": list(self.models),
            "pairs": [list(pair) for pair in self.pairs],
            "density": self.density,
            "total": self.total.to_json(),
            **{name: {key: m.to_json() for key, m in group.items()} for name, group in groups.items()},
        }


def diagnose(
    base: Mapping[str, Tensor],
    models: Mapping[str, Mapping[str, Tensor]],
    *,
    density: float = 1.0,
    run: Callable[..., Iterable[object]] = map,
    done: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Compare models with the base that they were trained from, tensor by tensor.

    Args:
        base: its tensors by name, such as views of mapped files. They are asked for one by one.
        models: those of the models, by what to call these.
        density: the share of each task vector that TIES would keep before it counts signs.
        run: who computes the blocks, as for `Whole`.
        done: called with the name of each tensor that is not needed any more.

    Raises `BadInput`: there is no model, tensors are missing, differ in shape or are not finite.
    """
    if not models or not base:
        raise BadInput(
            "there is nothing to compare", "there is no model beside the base, or no tensor", "name one or more"
        )
    for model, tensors in models.items():
        missing = [name for name in base if name not in tensors]
        if missing:
            raise BadInput(
                f"{model} cannot be compared with the base",
                f"it has no {missing[0]} and lacks {len(missing)} tensors in all",
                "compare models of one architecture",
            )
    found = {}
    for name, origin in base.items():
        names = (*(f"{name} of {model}" for model in models), f"{name} of the base")
        whole = Whole(tuple(tensors[name] for tensors in models.values()), origin, run=run, names=names)
        found[name] = measure(whole, density)
        done(name)
    return Diagnosis(tuple(models), density, found)


def measure(whole: Whole, density: float = 1.0) -> Measured:
    """Measure one tensor of all models. Raises `BadInput` for values that are not finite."""
    settings = bind(METHODS["ties"], {}, [{"weight": 1.0, "density": density}] * len(whole.tensors))
    thins = MAGNITUDE.thins(whole, settings) if density < 1 else [everything] * len(whole.tensors)
    # Sums depend on where they are cut: always in the same places.
    parts = replace(whole, block=MEASURED_BLOCK).map(lambda block: _measured(block, thins, whole.names))
    return _total(parts)


def place(name: str) -> tuple[int | None, str]:
    """The decoder layer of a tensor, if any, and its kind: (3, "mlp.up") for layers.3.mlp.up.weight."""
    found = _LAYER.fullmatch(name.removesuffix(".weight"))
    return (int(found[1]), found[2]) if found else (None, name.removesuffix(".weight"))


def _measured(block: Block, thins: Sequence[Thin], names: Sequence[str]) -> Measured:
    vectors = [tensor.double().view(-1) for tensor in (block.origin, *block.tensors)]
    weights = _products(vectors)
    if not all(math.isfinite(row[i]) for i, row in enumerate(weights)):
        for tensor, name in zip((*block.tensors, block.origin), names, strict=True):
            refuse_unless_finite(tensor, name)
    deltas = _products([vector - vectors[0] for vector in vectors[1:]])
    kept = [thin(delta, block.start) for thin, delta in zip(thins, block.deltas(), strict=True)]
    total = kept[0].clone()
    for values in kept[1:]:
        total += values
    sign = torch.copysign(torch.ones(()), total)
    up, down, outvoted, mass = (
        torch.zeros_like(total, dtype=torch.bool),
        torch.zeros_like(total, dtype=torch.bool),
        0.0,
        0.0,
    )
    for values in kept:
        up |= values > 0
        down |= values < 0
        mass += float(values.abs().sum(dtype=torch.float64))
        outvoted += float((values * sign).clamp(max=0).sum(dtype=torch.float64).neg())
    touched, clashing = int((up | down).sum()), int((up & down).sum())
    return Measured(total.numel(), weights, deltas, touched, clashing, mass, outvoted)


def _products(vectors: Sequence[Tensor]) -> Products:
    size = len(vectors)
    lower = {(i, j): float(torch.dot(vectors[i], vectors[j])) for i in range(size) for j in range(i + 1)}
    return tuple(tuple(lower[max(i, j), min(i, j)] for j in range(size)) for i in range(size))


def _sum(first: Products, second: Products) -> Products:
    return tuple(
        tuple(a + b for a, b in zip(left, right, strict=True)) for left, right in zip(first, second, strict=True)
    )


def _total(parts: Iterable[Measured]) -> Measured:
    first, *others = parts
    for other in others:
        first = first + other
    return first


def _angle(products: Products, i: int, j: int) -> float | None:
    """Degrees between two vectors."""
    if min(products[i][i], products[j][j]) <= NO_LENGTH:
        return None
    cosine = products[i][j] / math.sqrt(products[i][i]) / math.sqrt(products[j][j])
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
