"""Model Stock: how far to go from the base towards the mean of the models, by the angles between their task vectors.

arXiv 2403.19522, equation 5 for any number of models.
"""

from itertools import combinations

import torch
from torch import Tensor

from cabochon.merge.methods.average import combine
from cabochon.merge.methods.blocks import Block, Whole
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.merge.methods.sphere import gram

SHORT = 1e-6  # mergekit's bounds: on a product of lengths, and on the divisor
SINGULAR = 1e-6


def share(cosine: Tensor, models: int) -> Tensor:
    """The share of the mean of the models, from the mean cosine between task vectors.

    Task vectors that cancel have no finite share. There, as in mergekit, the base is kept.
    """
    divisor = 1 + (models - 1) * cosine
    singular = divisor.abs() < SINGULAR
    return torch.where(singular, 0, models * cosine / divisor.masked_fill(singular, 1))


def _mean_cosine(products: Tensor) -> Tensor:
    """Mean over pairs of the cosines, from inner products [M, M, ...]."""
    lengths = [products[i, i].sqrt() for i in range(len(products))]
    pairs = combinations(range(len(products)), 2)
    cosines = [(products[i, j] / (lengths[i] * lengths[j]).clamp(min=SHORT)).clamp(-1, 1) for i, j in pairs]
    return torch.stack(cosines).mean(0)


def _measure(whole: Whole, settings: Settings) -> Tensor | None:
    return None if settings.shared["filter_wise"] else gram(whole)


def _by_row(block: Block) -> Tensor:
    """One share for each row, which is what the paper calls a filter."""
    deltas = torch.stack(block.deltas()).double()
    products = torch.einsum("irc,jrc->ijr", deltas, deltas)
    shares = share(_mean_cosine(products), len(deltas)).float().unsqueeze(-1)
    mean = torch.stack(block.tensors).mean(0)
    return shares * mean + (1 - shares) * block.origin


def _model_stock(settings: Settings, products: Tensor | None) -> Apply:
    if products is None:
        return _by_row
    t = share(_mean_cosine(products), settings.models).item()
    return combine([t / settings.models] * settings.models, 1 - t)


MODEL_STOCK = Method(
    "model_stock",
    "Model Stock, arXiv 2403.19522",
    _model_stock,
    (Parameter("filter_wise", bool, False),),
    base="required",
    models=(2, None),
    measure=_measure,
)
