"""Rounding a matrix so that its products change least, instead of its values: GPTQ (arXiv 2210.17323).

Columns are rounded one after the other, and what rounding one has changed is made up for in those that follow. What
making up is worth follows from the inputs that the matrix meets, summed up in their products X^T X, the Hessian of the
squared error of the outputs.

Three choices beside the paper: the columns with the largest inputs go first; the scale of every group is fixed
before (so that the groups stay where the kernels want them, whatever the order); and it is the one that leaves the
smallest error among several that clip the largest weights.

Dimension letters: N output channels, K input channels, G = K / group.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.model.linear import Quantized, int4_grid

BLOCK = 128  # columns that are made up for at once
DAMPING = 0.01  # of the mean of the diagonal, added to it: inputs never seen must not be trusted to stay away
CLIPS = tuple(1 - i / 50 for i in range(20))  # shares of a group's range that its grid may span


def gptq(weight: Tensor, hessian: Tensor, group: int) -> Quantized:
    """A matrix [N, K] to 4 bits, given the sum of products of its inputs float32 [K, K]."""
    more = -weight.shape[1] % group
    weight, hessian = pad(weight.float(), (0, more)), pad(hessian, (0, more, 0, more))
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp_min(1e-6))
    scale, zero = best_grid(weight.unflatten(1, (-1, group)), hessian.diagonal().view(-1, group))
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    steps, zeros = scale.float().t().contiguous(), zero.float().t().contiguous()  # [G, N]
    columns = weight.t()[order]  # [K, N], changed on the way
    q = torch.empty_like(columns, dtype=torch.uint8)
    group_of = (order // group).tolist()
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            step, middle = steps[group_of[i]], zeros[group_of[i]]
            rounded = (torch.round(columns[i] / step) + middle).clamp_(0, 15)
            q[i] = rounded.to(torch.uint8)
            error = (columns[i] - (rounded - middle) * step) / factor[i, i]
            columns[i:end].addr_(factor[i, i:end], error, alpha=-1)
            errors[i - start] = error
        columns[end:] -= factor[start:end, end:].t() @ errors
    return Quantized(q[order.argsort()].t().contiguous(), scale, zero, group)


def nearest(weight: Tensor, group: int) -> Quantized:
    """A matrix [N, K] to the nearest 4-bit values on the grids that suit its groups best."""
    groups = pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    scale, zero = best_grid(groups)
    return Quantized(_on_grid(groups, scale, zero).to(torch.uint8).flatten(1), scale, zero, group)


def best_grid(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale float16 and zero point uint8 [N, G] of groups [N, G, group] that leave the smallest squared error.

    Args:
        importance: [G, group], what an error in each column counts; None: all the same.
    """
    ends = torch.stack([groups.amin(-1), groups.amax(-1)], dim=-1)
    least = torch.full_like(groups[..., 0], float("inf"))
    scale, zero = int4_grid(ends)
    for clip in CLIPS:
        grid = int4_grid(ends * clip)
        back = (_on_grid(groups, *grid) - grid[1].float()[..., None]) * grid[0].float()[..., None]
        errors = (back - groups).square_()
        error = (errors if importance is None else errors * importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, grid[0], scale), torch.where(better, grid[1], zero)
    return scale, zero


def _on_grid(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.round(groups / scale.float()[..., None]) + zero.float()[..., None]).clamp_(0, 15)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U of H^-1 = U^T U.

    Turned around, the Cholesky factor of H is an upper triangular R with H = R R^T, and U is its inverse.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    while failed:  # float32 has lost what the damping gave
        hessian.diagonal().mul_(1 + DAMPING)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    upper = lower.flip(0, 1)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), device=upper.device), upper=True)
    return inverse
