"""The three merges of WARP, weight averaged rewarded policies (arXiv 2406.16768), and all of it at once.

The names are the paper's: theta_init is the base, where M policies started; theta_m are the models; the task vectors
are their differences; eta, mu and lambda as there. What happens between the merges, reinforcement learning, is not
here. mergekit has none of these.
"""

import math
from typing import Any

from torch import Tensor

from cabochon.merge.methods.average import around, combine
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.merge.methods.sphere import arc, cosine, gram

# Below this sine, two task vectors are parallel for all that float32 can hold, and the arc is a straight line.
STRAIGHT_SINE = 1e-6


def _ema(settings: Settings, _: Any) -> Apply:
    """Exponential moving average over the models in their order: theta_ema <- (1 - mu) theta_ema + mu theta.

    Section 3.1. It starts from the base, or from the first model when there is none.
    """
    mu, count = settings.shared["mu"], settings.models
    coefficients = [mu * (1 - mu) ** (count - 1 - i) for i in range(count)]
    first = [coefficients[0] + (1 - mu) ** count, *coefficients[1:]]
    with_base, without = around(coefficients), combine(first)
    return lambda block: without(block) if block.base is None else with_base(block)


def arcs(products: Tensor) -> list[float]:
    """Coefficients of M task vectors under iterated SLERP with weights 1/M, from their inner products [M, M].

    Section 3.2 and appendix: for more than two, model m is merged into the first m - 1 at lambda = 1/m. The result so
    far is a sum of task vectors, so its angle with the next one follows from the inner products as well. Parallel,
    opposite and zero task vectors are interpolated linearly.
    """
    count = len(products)
    merged = products.new_zeros(count)
    merged[0] = 1
    for m in range(1, count):
        pair = products.new_zeros(2, count)
        pair[0], pair[1, m] = merged, 1
        cos = cosine(pair @ products @ pair.T, 0, 1)
        straight = math.sqrt(1 - cos * cos) < STRAIGHT_SINE
        first, second = arc(cos, 1 / (m + 1), straight)
        merged = first * merged
        merged[m] += second
    result: list[float] = merged.tolist()
    return result


def _warp_slerp(_: Settings, products: Tensor) -> Apply:
    """Spherical interpolation of task vectors: theta_slerp = theta_init + SLERP(theta_1 - theta_init, ...)."""
    return around(arcs(products))


def _warp(settings: Settings, products: Tensor) -> Apply:
    """Spherical interpolation of task vectors, then back towards the base: both merges that end an iteration."""
    eta = settings.shared["eta"]
    return around([eta * coefficient for coefficient in arcs(products)])


def _liti(settings: Settings, _: Any) -> Apply:
    """Linear interpolation towards initialisation: (1 - eta) theta_init + eta theta, section 3.3."""
    return around([settings.shared["eta"]])


_ETA = Parameter("eta", default=0.3)  # what the paper trains with

EMA = Method(
    "ema",
    "WARP, arXiv 2406.16768, section 3.1",
    _ema,
    (Parameter("mu", default=0.01, low=0, high=1),),
    base="optional",
)
LITI = Method("liti", "WARP, arXiv 2406.16768, section 3.3", _liti, (_ETA,), base="required", models=(1, 1))
WARP_SLERP = Method(
    "warp_slerp",
    "WARP, arXiv 2406.16768, section 3.2",
    _warp_slerp,
    base="required",
    measure=lambda whole, _: gram(whole),
    per_layer=True,
)
WARP = Method(
    "warp",
    "WARP, arXiv 2406.16768, algorithm 1",
    _warp,
    (_ETA,),
    base="required",
    measure=lambda whole, _: gram(whole),
    per_layer=True,
)
