"""Policy optimisation: answers that were better than expected are made likelier, as REINFORCE, RLOO, GRPO and PPO do.

For a token with log-probability l, advantage A of its answer, l_old when it was drawn and l_ref by the reference:

    policy gradient   -A l                                           (Williams 1992; arXiv 2402.14740)
    clipped           -min(r A, clip(r, 1 - c, 1 + c) A), r = exp(l - l_old)       (arXiv 1707.06347, equation 7)
    KL in the loss    beta (exp(d) - d - 1), d = l_ref - l                         (arXiv 2402.03300, equation 4)
    KL in the reward  A is made from reward - beta (sum of l - l_ref over the answer)   (arXiv 2406.16768, section 3.1)

All are functions of l alone, so that the fused loss computes them without the logits of a batch. Of PPO there is the
clipped objective; there is no value network and no estimate of advantages from one.

Dimension letters: B rows, T positions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cabochon.data.pack import Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.losses.fused import likelihood
from cabochon.train.objectives import head_of, hidden_states
from cabochon.train.policy_config import PolicyConfig
from cabochon.train.step import Measured, Objective


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Answers with what they were worth.

    Args:
        advantages: float32 [B, T], of the answer that a target belongs to.
        old: float32 [B, T], log-probability of each target when it was drawn.
        reference: float32 [B, T], the same by the reference.
        shares: float32 [B, T], what each token's loss is multiplied by; see `PolicyConfig.over`.
        measures: means over the answers of all devices, to be logged.
    """

    advantages: Tensor
    old: Tensor
    reference: Tensor
    shares: Tensor
    measures: Mapping[str, float] = field(default_factory=dict)

    def split(self, rows: int) -> "Iterator[PolicyBatch]":
        """The batch in pieces of so many rows."""
        learned = self.advantages, self.old, self.reference, self.shares
        parts = zip(super().split(rows), *(tensor.split(rows) for tensor in learned), strict=True)
        return (
            PolicyBatch(part.ids, part.targets, part.documents, advantages, old, reference, shares, self.measures)
            for part, advantages, old, reference, shares in parts
        )


def policy_objective(config: PolicyConfig, temperature: float) -> Objective:
    """The loss of a `PolicyBatch`, whose count is that of targets.

    Args:
        config: which one.
        temperature: at which the answers were drawn: what is learned is the policy that drew them.
    """

    def loss(model: Gemma2, batch: Batch, count: float) -> Measured:
        assert isinstance(batch, PolicyBatch)
        hidden, targets = hidden_states(model, batch), batch.targets.flatten().to(model.device)
        parts = (batch.advantages, batch.old, batch.reference, batch.shares)
        advantages, old, reference, shares = (part.flatten().to(model.device) for part in parts)
        clipped = 0

        def of_tokens(logprobs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal clipped
            values, slopes, held = surrogate(config, logprobs, advantages[rows], old[rows])
            clipped += int(held.sum())
            if config.kl_is_in_loss:
                apart = reference[rows].to(logprobs.dtype) - logprobs
                values = values + config.beta * (apart.exp() - apart - 1)
                slopes = slopes + config.beta * (1 - apart.exp())
            return values, slopes

        value = likelihood(hidden, head_of(model), targets, of_tokens, shares, temperature)
        part = batch.num_targets / count
        measures = {name: mean * part for name, mean in batch.measures.items()}
        return Measured(value, measures | ({"clipped": clipped / count} if config.clip else {}))

    return loss


def surrogate(config: PolicyConfig, logprobs: Tensor, advantages: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of tokens with these log-probabilities, their slopes, and which were clipped (bool), all [C]."""
    advantages = advantages.to(logprobs.dtype)
    if not config.clip:
        return -advantages * logprobs, -advantages, torch.zeros_like(advantages, dtype=torch.bool)
    ratio = (logprobs - old.to(logprobs.dtype)).exp()
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
    clipped = bounded * advantages < ratio * advantages
    values = -torch.where(clipped, bounded, ratio) * advantages
    return values, torch.where(clipped, 0, -ratio * advantages), clipped
