"""Cross-entropy with one target id for each token, with label smoothing and z-loss.

    loss = -(1 - s) log q_y - s mean_j log q_j + zeta (log Z)^2

Label smoothing s: arXiv 1512.00567, section 7, with the uniform distribution over the vocabulary. z-loss zeta:
arXiv 2204.02311, section 5, which pulls the normaliser log Z towards 0. With log q_j = z_j - log Z the gradient is

    dloss/dz_j = (1 + 2 zeta log Z) q_j - s / V - (1 - s) [j = y]
"""

from dataclasses import dataclass

from torch import Tensor

from cabochon.train.losses.logits import LogitTransform, log_normaliser, mean_logit, picked, write_gradient


@dataclass(frozen=True)
class CrossEntropy:
    """The two settings; 0 turns each off."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def value_and_logit_gradient(
        self, raw: Tensor, targets: Tensor, weights: Tensor, transform: LogitTransform
    ) -> Tensor:
        """Losses [C] of raw logits [C, V], which are replaced by their gradient.

        Args:
            raw: the head's product, before soft cap and temperature.
            targets: int64 [C], every one an id.
            weights: [C], what each token's loss and gradient are multiplied by.
            transform: soft cap and temperature.
        """
        at = targets[:, None]
        normaliser, hit = log_normaliser(raw, transform), picked(raw, at, transform)[:, 0]
        losses = normaliser - (1 - self.label_smoothing) * hit + self.z_loss * normaliser.square()
        if self.label_smoothing:
            losses -= self.label_smoothing * mean_logit(raw, transform)
        multiple = weights * (1 + 2 * self.z_loss * normaliser)
        constant = weights * (-self.label_smoothing / raw.shape[1])
        at_target = multiple * (hit - normaliser).exp() + constant - (1 - self.label_smoothing) * weights
        write_gradient(raw, transform, (normaliser, multiple, constant), at, at_target[:, None])
        return weights * losses
