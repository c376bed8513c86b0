"""Thinning out task vectors: which of their elements a method keeps, and by how much it scales them up again.

    magnitude   the largest, a share `density` of all (TIES)
    outliers    the same, after dropping the largest `gamma` of all (Breadcrumbs)
    random      each with probability `density` (DARE)
    by_rank     each with a probability that grows with its rank in its row (DELLA)

The first two look for exact cuts in whole tensors first; of equal magnitudes, the earlier counts as the larger, where
mergekit leaves that to the sort at hand. The other two draw from a stream of random numbers that belongs to the
tensor, the model and the seed, and in which every element has its place, so that blocks can be drawn in any order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from cabochon.base.errors import BadInput
from cabochon.merge.methods.blocks import MEASURED_BLOCK, Block, Whole, sums
from cabochon.merge.methods.method import Parameter, Settings
from cabochon.merge.methods.ranks import Cut, cuts, magnitude_keys
from cabochon.model.kernels.vectors import kept_where, magnitudes

# From rows of a task vector, float32 [r, C], and the index of their first element, to the same with zeros.
Thin = Callable[[Tensor, int], Tensor]
NO_SUM = 1e-7  # mergekit's: a smaller sum of magnitudes is not restored


@dataclass(frozen=True)
class Sparsifier:
    """`thins(whole, settings)` gives for each model the function that thins out its task vector.

    It raises `BadInput` for parameters that do not go together.
    """

    thins: Callable[[Whole, Settings], list[Thin]]
    parameters: tuple[Parameter, ...] = ()


def everything(values: Tensor, _: int) -> Tensor:
    return values


def nothing(values: Tensor, _: int) -> Tensor:
    return torch.zeros_like(values)


# Cuts by magnitude


def kept_count(density: float, numel: int) -> int:
    """How many elements a density keeps: rounded down, but one at least.

    mergekit's Breadcrumbs rounds down to none, and so loses the whole task vector of tensors with fewer than
    1/density elements; its TIES keeps one. Here both keep one.
    """
    return max(1, int(density * numel))


def largest(values: Tensor, start: int, cut: Cut) -> Tensor:
    """The values above a cut, and zeros."""
    if cut.value and cut.index >= start + values.numel() - 1:  # equal ones are kept throughout
        return hardshrink(values, float(np.nextafter(np.float32(cut.value), np.float32(0))))
    if cut.index < start or not cut.value:  # or dropped
        return hardshrink(values, cut.value)
    index = torch.arange(start, start + values.numel()).view(values.shape)
    size = values.abs()
    return values * ((size > cut.value) | ((size == cut.value) & (index <= cut.index)))


def _between(values: Tensor, start: int, outer: Cut | None, inner: Cut) -> Tensor:
    """The values above the inner cut but not above the outer one."""
    kept = largest(values, start, inner)
    return kept if outer is None else kept - largest(values, start, outer)


def _keys(block: Block) -> list[Tensor]:
    return [magnitude_keys(delta) for delta in block.deltas()]


def _kept(whole: Whole, settings: Settings, dropped: Sequence[float]) -> list[Thin]:
    """Keep a share `density` after dropping a share of the largest, less where density leaves no room for that."""
    densities = settings.per_model["density"]
    wanted: list[tuple[int, ...]] = []
    for density, gamma in zip(densities, dropped, strict=True):
        kept = kept_count(density, whole.numel)
        outer = min(int(gamma * whole.numel), whole.numel - kept)
        wanted.append((outer + kept, outer)[: 1 + (outer > 0)] if 0 < density < 1 else ())
    # Models that keep all or nothing are not counted.
    counted = [i for i, counts in enumerate(wanted) if counts]
    found = (
        cuts(whole, lambda block: [_keys(block)[i] for i in counted], [wanted[i] for i in counted]) if counted else []
    )
    thins: list[Thin] = [everything if density >= 1 else nothing for density in densities]
    for i, (inner, *outer_) in zip(counted, found, strict=True):
        thins[i] = partial(_between, outer=outer_[0] if outer_ else None, inner=inner)
    return thins


def _magnitude(whole: Whole, settings: Settings) -> list[Thin]:
    return _kept(whole, settings, [0.0] * settings.models)


def _outliers(whole: Whole, settings: Settings) -> list[Thin]:
    return _kept(whole, settings, settings.per_model["gamma"])


# Random choices


def random_bits(seed: int, model: int, start: int, count: int) -> Tensor:
    """Uniform int16 [count] for the elements of a tensor from `start`, four to each number of a PCG64 stream."""
    stream = np.random.PCG64(np.random.SeedSequence([seed, model])).advance(start // 4)
    words: np.ndarray = stream.random_raw((start % 4 + count + 3) // 4)
    return torch.from_numpy(words.view(np.int16)[start % 4 :][:count])


def by_chance(values: Tensor, start: int, seed: int, model: int, probability: float | Tensor) -> Tensor:
    """Elements of rows float32 [r, C] that are kept with a probability, one number or a tensor [r, C], and zeros.

    The probability is met to 1/65,536. What is not finite stays so, to be found.
    """
    bits = random_bits(seed, model, start, values.numel())
    if isinstance(probability, Tensor):
        uniform = bits.view(values.shape).float().add_(0.5 + 2**15).mul_(2.0**-16)
        return values * (uniform < probability)
    return kept_where(values.contiguous(), bits, round(probability * 2**16) - 2**15)


def _random(_: Whole, settings: Settings) -> list[Thin]:
    def thin(model: int, density: float) -> Thin:
        if density >= 1:
            return everything
        return partial(by_chance, seed=settings.seed, model=model, probability=density)

    return [thin(model, density) for model, density in enumerate(settings.per_model["density"])]


def keep_probabilities(values: Tensor, density: float, epsilon: float) -> Tensor:
    """For every element its probability float32 [r, C]: from density - epsilon to density + epsilon by rank in its row.

    A row of one element has no ranks: there it is the density. mergekit divides by zero and fails.
    """
    columns = values.shape[-1]
    if columns == 1:
        return torch.full_like(values, density)
    # Magnitude above, place below: numbers that are all different, which sort faster than an order of floats.
    keys = (magnitude_keys(values).long() << 32) | torch.arange(columns)
    order = torch.from_numpy(np.sort(keys.numpy(), axis=-1)).bitwise_and_(0xFFFFFFFF)
    steps = torch.arange(columns, dtype=torch.float32) / (columns - 1)
    steps = (density - epsilon) + steps * 2 * epsilon
    return torch.empty_like(values).scatter_(-1, order, steps.expand_as(values))


def _drop_by_rank(values: Tensor, start: int, seed: int, model: int, density: float, epsilon: float) -> Tensor:
    chances = keep_probabilities(values, density, epsilon)
    return by_chance(values, start, seed, model, chances)


def _by_rank(_: Whole, settings: Settings) -> list[Thin]:
    thins: list[Thin] = []
    for model, (density, epsilon) in enumerate(
        zip(settings.per_model["density"], settings.per_model["epsilon"], strict=True)
    ):
        if not 0 < density < 1:
            thins.append(everything if density >= 1 else nothing)
            continue
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise BadInput(
                f"{settings.method} cannot use density {density:g} with epsilon {epsilon:g}",
                "probabilities from density - epsilon to density + epsilon have to lie between 0 and 1",
                f"choose an epsilon below {min(density, 1 - density):g}",
            )
        thins.append(partial(_drop_by_rank, seed=settings.seed, model=model, density=density, epsilon=epsilon))
    return thins


# Scaling up again


def restored(whole: Whole, thins: Sequence[Thin]) -> list[float]:
    """For each model, the factor that gives the thinned task vector its old sum of magnitudes.

    As mergekit. DARE and DELLA divide by the probability of being kept instead, which is the same in expectation.
    """

    def before_and_after(block: Block) -> list[list[float]]:
        pairs = [(d, thin(d, block.start)) for d, thin in zip(block.deltas(), thins, strict=True)]
        return [[magnitudes(values.contiguous()) for values in pair] for pair in pairs]

    total = sums(replace(whole, block=MEASURED_BLOCK).map(before_and_after))
    return [before / after if min(before, after) >= NO_SUM else 1.0 for before, after in total.tolist()]


MAGNITUDE = Sparsifier(_magnitude)
OUTLIERS = Sparsifier(_outliers, (Parameter("gamma", default=0.01, per_model=True, low=0, high=1),))
RANDOM = Sparsifier(_random)
BY_RANK = Sparsifier(_by_rank, (Parameter("epsilon", default=0.15, per_model=True, low=0, high=1),))
