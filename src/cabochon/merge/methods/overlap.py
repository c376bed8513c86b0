"""Methods that treat elements changed by one model unlike those changed by several: SCE, RAM and RAM+."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from cabochon.merge.methods.blocks import MEASURED_BLOCK, Block, Whole, sums
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.merge.methods.ranks import Cut, cuts, magnitude_keys
from cabochon.merge.methods.sparsify import largest

NO_WEIGHT = 1e-6  # mergekit's bound on the weights of elements that agree


# SCE: select, calculate, erase


@dataclass(frozen=True)
class Selected:
    """Which elements vary most between the models, and the weight of each model."""

    cut: Cut | None  # of the variances; None keeps all
    nothing: bool
    weights: tuple[float, ...]


def variance(block: Block) -> Tensor:
    """Variance between the task vectors, float32 [r, C]."""
    deltas = block.deltas()
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    squares = [(delta - mean).square_() for delta in deltas]
    return sum(squares[1:], squares[0]) / len(deltas)


def _selected(block: Block, cut: Cut | None) -> list[Tensor]:
    """Task vectors with zeros where the models vary less than the cut."""
    if cut is None:
        return block.deltas()
    mask = largest(variance(block), block.start, cut).sign_()
    return [delta * mask for delta in block.deltas()]


def _sce_measure(whole: Whole, settings: Settings) -> Selected:
    share = settings.shared["select_topk"]
    cut, count = None, 0
    if share < 1:
        vary = sum(whole.map(lambda block: int(np.count_nonzero(variance(block).numpy()))))
        count = int(vary * share)
        if not count:
            return Selected(None, True, (0.0,) * settings.models)
        cut = cuts(whole, lambda block: [magnitude_keys(variance(block))], [[count]])[0][0]

    def squares(block: Block) -> list[float]:
        return [delta.double().square().sum().item() for delta in _selected(block, cut)]

    total = sums(replace(whole, block=MEASURED_BLOCK).map(squares))
    every = total.sum()
    weights = total / every if every > 0 else torch.full_like(total, 1 / settings.models)
    return Selected(cut, False, tuple(weights.tolist()))


def _sce(_: Settings, selected: Selected) -> Apply:
    """Elements that vary most, weighted by the squares of the models' changes, erased where their sign loses.

    mergekit weights all models alike as soon as the mean squares of a tensor sum to less than 1e-6, as those of
    fine-tuned models do. The paper knows no such bound; here only changes of zero are weighted alike.
    """

    def apply(block: Block) -> Tensor:
        if selected.nothing:
            return block.origin
        deltas = _selected(block, selected.cut)
        sign = torch.copysign(torch.ones(()), sum(deltas, torch.zeros(())) + 0.0)
        total, shares = torch.zeros_like(block.origin), torch.zeros_like(block.origin)
        for delta, weight in zip(deltas, selected.weights, strict=True):
            agreeing = torch.relu(delta * sign)
            total.add_(agreeing, alpha=weight)
            shares.add_(agreeing.sign_(), alpha=weight)
        return total.mul_(sign).div_(shares.clamp_(min=NO_WEIGHT)).add_(block.origin)

    return apply


# RAM: shared changes are averaged, single ones kept


def _changes(block: Block, epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Task vectors with zeros for changes up to epsilon, and how many models change each place; float32 [r, C]."""
    deltas = [hardshrink(delta, epsilon) for delta in block.deltas()]
    return deltas, sum((delta.sign().abs_() for delta in deltas), torch.zeros_like(block.origin))


def _ram_apply(block: Block, epsilon: float, factors: tuple[float, ...] | None) -> Tensor:
    deltas, count = _changes(block, epsilon)
    mean = torch.reciprocal(count.clamp(min=1))
    single = torch.relu(2 - count) * count if factors else count  # 1 where one model changes, else 0
    total = block.origin.clone()
    for i, delta in enumerate(deltas):
        total.addcmul_(delta, torch.add(mean, single, alpha=factors[i] - 1) if factors else mean)
    return total


def _ram(settings: Settings, _: Any) -> Apply:
    """Places changed by several models get the mean of those, places changed by one get its change."""
    return partial(_ram_apply, epsilon=settings.shared["epsilon"], factors=None)


def _ram_plus_measure(whole: Whole, settings: Settings) -> tuple[float, ...]:
    """For each model the factor on changes that are its own alone."""
    r, alpha, epsilon = (settings.shared[name] for name in ("r", "alpha", "epsilon"))

    def counts(block: Block) -> list[list[float]]:
        deltas, count = _changes(block, epsilon)
        changed = [delta != 0 for delta in deltas]
        return [[(c & (count > 1)).sum().item(), (c & (count == 1)).sum().item()] for c in changed]

    total = sums(whole.map(counts)).tolist()
    return tuple(1 + r * min(max(shared / max(single, epsilon), 0.0), alpha) for shared, single in total)


def _ram_plus(settings: Settings, factors: tuple[float, ...]) -> Apply:
    """As `ram`, with a model's own changes made larger the more of its changes are shared; tensor by tensor."""
    return partial(_ram_apply, epsilon=settings.shared["epsilon"], factors=factors)


_RAM = "Reinforced Agent Merging, arXiv 2601.13572"
_EPSILON = Parameter("epsilon", default=1e-5, low=0)

SCE = Method(
    "sce",
    "SCE of FuseChat, arXiv 2408.07990",
    _sce,
    (Parameter("int8_mask", bool, False), Parameter("select_topk", default=1.0, low=0, high=1)),
    base="required",
    measure=_sce_measure,
)
RAM = Method("ram", _RAM, _ram, (_EPSILON,), base="required")
RAMPLUS_TL = Method(
    "ramplus_tl",
    _RAM,
    _ram_plus,
    (Parameter("r", default=0.1), Parameter("alpha", default=0.2, low=0), _EPSILON),
    base="required",
    measure=_ram_plus_measure,
)
