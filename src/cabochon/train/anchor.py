"""What a policy is compared with: a frozen model, the weights beneath its adapters, or a moving average of itself.

Dimension letters: M positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cabochon.data.pack import IGNORED, Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import chunk_size
from cabochon.model.kernels import losses
from cabochon.model.lora import without_adapters
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.objectives import hidden_states
from cabochon.train.optim import Average


@dataclass(frozen=True)
class View:
    """A model as a comparison sees it: a batch to final hidden states [M, D], and those to raw logits [M, V]."""

    hidden: Callable[[Batch], Tensor]
    raw: Callable[[Tensor], Tensor]


def of_model(model: Gemma2) -> View:
    """The model as it is at that moment."""
    return View(partial(hidden_states, model), model.embedding.project)


def beneath_adapters(model: Gemma2) -> View:
    """The model without its adapters, which is where their training started."""

    def hidden(batch: Batch) -> Tensor:
        with without_adapters(model):
            return hidden_states(model, batch)

    return View(hidden, model.embedding.project)


def of_average(model: Gemma2, average: Average) -> View:
    """The model with the averages of its trained weights in their place. Nothing is copied."""
    called, tensors = _Called(model), {f"model.{name}": tensor for name, tensor in average.tensors.items()}
    return View(
        lambda batch: functional_call(called, tensors, (hidden_states, batch)),
        lambda hidden: functional_call(called, tensors, (_raw, hidden)),
    )


def _raw(model: Gemma2, hidden: Tensor) -> Tensor:
    return model.embedding.project(hidden)


class _Called(nn.Module):
    def __init__(self, model: Gemma2) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(self.model, *arguments)


@dataclass(frozen=True)
class Seen:
    """What policy and reference say at the targets of a batch, float32 [B, T] in nats; 0 where there is none.

    Args:
        logprobs: of the targets, by the policy.
        reference: the same by the reference.
        entropy: of the policy's distribution.
        kl: divergence of the policy from the reference, over the whole vocabulary and not only the token drawn.
    """

    logprobs: Tensor
    reference: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def look(policy: View, reference: View, batch: Batch, transform: LogitTransform, vocab_size: int) -> Seen:
    """Both models on a batch, with soft cap and temperature. Logits of few tokens at a time are in memory."""
    counted = (batch.targets != IGNORED).flatten()
    hidden, theirs = policy.hidden(batch), reference.hidden(batch)
    where = counted.to(hidden.device)
    targets = batch.targets.to(hidden.device).flatten()[where]
    size = max(1, chunk_size(vocab_size) // 2)
    parts = [
        _compared(policy.raw(ours), reference.raw(others), wanted, transform)
        for ours, others, wanted in zip(
            hidden[where].split(size), theirs[where].split(size), targets.split(size), strict=True
        )
    ]
    found = torch.zeros(4, counted.numel())
    found[:, counted] = torch.cat(parts, dim=1).cpu()
    return Seen(*found.view(4, *batch.targets.shape))


def _compared(ours: Tensor, theirs: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """The rows of `Seen` [4, C] for raw logits [C, V]."""
    done = losses.compared(ours, theirs, targets, transform.soft_cap, transform.temperature)
    if done is not None:
        return done
    log_p, log_q = (transform.apply(raw).log_softmax(-1) for raw in (ours, theirs))
    p, at = log_p.exp(), targets[:, None]
    entropy = -(p * log_p).sum(-1)
    kl = (p * log_p.sub(log_q)).sum(-1)
    return torch.stack([log_p.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0], entropy, kl]).float()
