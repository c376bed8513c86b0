"""From the rewards of a step's answers to what each of them is weighed with: how much better it was than expected.

    reinforce   r - b, with b the moving mean of earlier steps' rewards, which is no function of these answers
                (Williams, Machine Learning 8, 1992)
    rloo        r - mean of the rewards of the other answers to the same prompt (arXiv 2402.14740, section 2.3)
    grpo        r - mean over the answers to the prompt, divided by their standard deviation (arXiv 2402.03300, section
                4.1.2). Without the division it is (G - 1) / G times rloo, G answers a prompt (arXiv 2503.20783).

The first two, and grpo without division up to that factor, leave the gradient of the expected reward unbiased.

Dimension letters: N answers.
"""

import math

import torch
from torch import Tensor

from cabochon.train.policy_config import Estimator, Scale
from cabochon.train.ranks import SINGLE, Ranks

EPSILON = 1e-4  # added to a standard deviation, as in TRL and the papers' code


def advantages(
    estimator: Estimator, rewards: Tensor, groups: Tensor, baseline: float, scale: Scale, ranks: Ranks = SINGLE
) -> Tensor:
    """Advantages float64 [N] of rewards float64 [N].

    Args:
        estimator: see above.
        rewards: of the answers, penalties taken off.
        groups: int64 [N], which prompt each answer is to, from 0.
        baseline: of reinforce: what was to be expected.
        scale: what advantages are divided by: the standard deviation of rewards in their group, or in the batch. auto:
            group for grpo, none for the others.
        ranks: over which the batch is spread. A group is whole on one of them.

    An answer that is the only one to its prompt has advantage 0 for rloo and grpo: there is nothing to compare it with.
    """
    if scale == "auto":
        scale = "group" if estimator == "grpo" else "none"
    sizes = _sums(torch.ones_like(rewards), groups)
    if estimator == "reinforce":
        found = rewards - baseline
    else:
        found = rewards - _sums(rewards, groups) / sizes
        if estimator == "rloo":
            found = found * sizes / (sizes - 1).clamp_min(1)
    if scale == "group":
        means = _sums(rewards, groups) / sizes
        variance = _sums((rewards - means).square(), groups) / (sizes - 1).clamp_min(1)
        found = found / (variance.sqrt() + EPSILON)
    elif scale == "batch":
        found = found / _unit(rewards, ranks)
    return found


def _unit(rewards: Tensor, ranks: Ranks) -> float:
    """The standard deviation over all ranks, which call this together; 1 for a reward that is alone."""
    count = ranks.total(len(rewards))
    if count < 2:
        return 1.0
    mean = ranks.total(float(rewards.sum())) / count
    return math.sqrt(ranks.total(float((rewards - mean).square().sum())) / (count - 1)) + EPSILON


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """For each answer the sum over its group."""
    count = int(groups.max()) + 1 if len(groups) else 0
    return torch.zeros(count, dtype=values.dtype).index_add_(0, groups, values)[groups]
