"""Preference optimisation: of two answers to a prompt, the better one is made likelier than it was beside the other.

    h       the log-probability that an answer gained since the reference, of the chosen minus of the rejected
    DPO     -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)     arXiv 2305.18290, equation 7; s is the share of
                                                                      pairs that is taken to be labelled the wrong way
    IPO     (h - 1 / (2 beta))^2                                      arXiv 2310.12036, equation 17; here an answer's
                                                                      log-probability is a mean over its tokens, or long
                                                                      ones would decide everything

The loss of a pair depends on two sums of log-probabilities, so its gradient is that of a cross-entropy whose tokens
weigh as much as the loss falls with the sum that they are in. That is what the fused loss is given, which never holds
the logits of a batch.

Dimension letters: M positions of a batch, K those that are counted, P pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cabochon.data.pack import IGNORED, Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import token_losses
from cabochon.model.lora import without_adapters
from cabochon.train.loop import Measure
from cabochon.train.losses.fused import cross_entropy
from cabochon.train.objectives import head_of, hidden_states
from cabochon.train.preference_config import PreferenceConfig
from cabochon.train.preference_stream import PairBatch
from cabochon.train.step import Measured, Objective


@dataclass(frozen=True)
class Pairs:
    """Whose the counted positions of a batch are.

    Args:
        counted: bool [M].
        answers: int64 [K], 2 p for the chosen answer of pair p, 2 p + 1 for the rejected one.
        lengths: int64 [P, 2], tokens of each answer.
    """

    counted: Tensor
    answers: Tensor
    lengths: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Values [K] added up by answer, float64 [P, 2]."""
        out = torch.zeros(self.lengths.numel(), dtype=torch.float64, device=values.device)
        return out.index_add_(0, self.answers, values.double()).view(-1, 2)


def pairs_of(batch: Batch) -> Pairs:
    """The pairs of a batch, whose documents 2k and 2k + 1 of a row are the chosen and the rejected answer."""
    counted = batch.targets != IGNORED
    most = int(batch.documents.max()) // 2 * 2 + 2
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    documents = (rows * most + batch.documents)[counted]
    lengths = torch.bincount(documents, minlength=len(batch.ids) * most).view(-1, 2)
    there = lengths[:, 0] > 0  # not so where a row has fewer pairs than another
    number = there.cumsum(0) - 1
    return Pairs(counted.flatten(), 2 * number[documents // 2] + documents % 2, lengths[there])


def pair_count(batch: Batch) -> int:
    """How many pairs there are in a batch: what the loss is a mean over."""
    return len(pairs_of(batch).lengths)


def pair_losses(config: PreferenceConfig, gained: Tensor, lengths: Tensor) -> Tensor:
    """The loss of each pair, float64 [P].

    Args:
        config: which loss.
        gained: log-probability beyond the reference's, of the chosen and the rejected answer, float64 [P, 2].
        lengths: tokens of these [P, 2].
    """
    if config.loss == "ipo":
        per_token = gained / lengths
        return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * config.beta)).square()
    scaled, smoothing = config.beta * (gained[:, 0] - gained[:, 1]), config.label_smoothing
    return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)


def preference(config: PreferenceConfig, reference: Gemma2 | None) -> Objective:
    """The objective. Its count is that of pairs, `pair_count`.

    Args:
        reference: a frozen model on the same device; None: the trained model without its adapters.
    """

    def loss(model: Gemma2, batch: Batch, count: float) -> Measured:
        hidden, pairs = hidden_states(model, batch), pairs_of(batch)
        gained = _gained(model, reference, batch, hidden, pairs).requires_grad_()
        losses = pair_losses(config, gained, pairs.lengths.to(gained.device))
        (slopes,) = torch.autograd.grad(losses.sum(), gained)
        targets = batch.targets.flatten().to(model.device)
        weights = torch.zeros(len(targets), dtype=torch.float64, device=model.device)
        weights[pairs.counted.to(model.device)] = -slopes.flatten()[pairs.answers.to(model.device)]
        weighted = cross_entropy(hidden, head_of(model), targets, count, weights=weights)
        # The value of the one with the gradient of the other.
        value = weighted - weighted.detach() + losses.detach().sum().to(weighted.dtype) / count
        told = {name: total / count for name, total in _rewards(config, gained).items()}
        if isinstance(batch, PairBatch):  # what is a mean already has to be one after all parts are added up
            told |= {name: mean * len(losses) / count for name, mean in batch.measures.items()}
        return Measured(value, told)

    return loss


def preference_measure(config: PreferenceConfig, reference: Gemma2 | None) -> Measure:
    """The loss without label smoothing and the rewards, for held-out pairs."""
    config = replace(config, label_smoothing=0.0)

    def measure(model: Gemma2, batch: Batch) -> tuple[int, Mapping[str, float]]:
        pairs = pairs_of(batch)
        gained = _gained(model, reference, batch, hidden_states(model, batch), pairs)
        losses = pair_losses(config, gained, pairs.lengths.to(gained.device))
        return len(losses), {"loss": float(losses.sum())} | _rewards(config, gained)

    return measure


@torch.no_grad()
def _gained(model: Gemma2, reference: Gemma2 | None, batch: Batch, hidden: Tensor, pairs: Pairs) -> Tensor:
    """Log-probability of each answer beyond the reference's, float64 [P, 2]; `hidden` is the model's."""
    pairs = replace(pairs, answers=pairs.answers.to(model.device))
    counted, targets = pairs.counted.to(model.device), batch.targets.flatten().to(model.device)

    def sums(one: Gemma2, states: Tensor) -> Tensor:
        return pairs.sums(-token_losses(one.head, states[counted], targets[counted], one.config.vocab_size))

    now = sums(model, hidden)
    if reference is not None:
        return now - sums(reference, hidden_states(reference, batch))
    with without_adapters(model):
        return now - sums(model, hidden_states(model, batch))


def _rewards(config: PreferenceConfig, gained: Tensor) -> dict[str, float]:
    """Sums over pairs: rewards beta log(pi / pi_ref), as DPO implies them, and how often the chosen one's is larger."""
    chosen, rejected = (config.beta * gained.detach()).unbind(1)
    return {
        "accuracy": float((chosen > rejected).sum()),
        "margin": float((chosen - rejected).sum()),
        "chosen_reward": float(chosen.sum()),
        "rejected_reward": float(rejected.sum()),
    }
