"""Any loss that is a function of the log-probability of one target id for each token.

With l = log q_y = z_y - log Z, and a loss f(l), the gradient with respect to the logits is

    df/dz_j = f'(l) ([j = y] - q_j)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cabochon.train.losses.logits import LogitTransform, log_normaliser, picked, write_gradient

# Log-probabilities [C] of the targets of tokens int64 [C] -> their losses f(l) [C] and slopes f'(l) [C].
TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def of_likelihood(
    raw: Tensor, targets: Tensor, rows: Tensor, weights: Tensor, transform: LogitTransform, loss: TokenLoss
) -> Tensor:
    """Losses [C] of raw logits [C, V], which are replaced by their gradient.

    Args:
        targets: int64 [C], every one an id.
        rows: int64 [C], which tokens of the batch these are; for `loss`.
        weights: [C], what each token's loss and gradient are multiplied by.
        transform: soft cap and temperature.
        loss: see `TokenLoss`.
    """
    at = targets[:, None]
    normaliser, hit = log_normaliser(raw, transform), picked(raw, at, transform)[:, 0]
    values, slopes = loss(hit - normaliser, rows)
    multiple = -weights * slopes.to(weights.dtype)
    at_target = multiple * torch.expm1(hit - normaliser)
    write_gradient(raw, transform, (normaliser, multiple, torch.zeros_like(multiple)), at, at_target[:, None])
    return weights * values
