"""One optimizer step: the parts of a batch forward and backward, then clipping, then the optimizers.

A part's loss is a sum over its tokens divided by the tokens of the whole step, over all devices. So the gradient is
the mean over tokens however the batch was cut: parts with few targets do not weigh more than parts with many.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cabochon.base.errors import UsageError
from cabochon.data.pack import Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.lookups import lookups_in_place
from cabochon.train.optim import Average, make_optimizers, set_learning_rate, trainable
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.schedule import schedule
from cabochon.train.shards import clip, is_sharded
from cabochon.train.spikes import SpikeWatch


class Measured(NamedTuple):
    """A loss, and what is to be logged beside it by name: sums over the part, divided by the same count."""

    loss: Tensor
    measures: Mapping[str, float]


# The loss of a part of a step, divided by what the step counts: model, part, count -> scalar.
Objective = Callable[[Gemma2, Batch, float], Tensor | Measured]


def targets_of(batch: Batch) -> int:
    """What most losses are a mean over."""
    return batch.num_targets


@dataclass(frozen=True)
class StepReport:
    """What one step came to, over all devices: loss in nats per target, length of the gradient before clipping.

    `tokens` are the targets (or whatever else the trainer counts) that the loss is a mean over, `positions` all that
    went through the model, `measures` the means of what the objective measured.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    positions: int
    skipped: bool
    measures: Mapping[str, float] = field(default_factory=dict)


class Stopped(Exception):
    """A step was given up before it changed anything, because the run is to end."""


class Trainer:
    """What changes from step to step: weights, optimizers, the average of weights, the watch for spikes."""

    def __init__(
        self,
        model: Gemma2,
        config: TrainConfig,
        objective: Objective,
        ranks: Ranks = SINGLE,
        *,
        counted: Callable[[Batch], int] = targets_of,
    ) -> None:
        """Args: the model, sharded already when there are several ranks; see `Objective` and `Ranks`.

        `counted` says how much of a batch the loss is a mean over: targets, or answers, or pairs of them.

        Raises `UsageError` when the model's soft cap is off or nothing of it is trained.
        """
        _check(model)
        self.model, self.config, self.objective, self.ranks = model, config, objective, ranks
        self.counted = counted
        model.recompute = config.recompute
        self.optimizers = make_optimizers(model, config, ranks)
        self.average = Average(model, config.ema) if config.ema else None
        self.spikes = SpikeWatch(config)
        self.step_number = 0  # steps done

    def step(self, batch: Batch, stop: Callable[[], bool] = lambda: False) -> StepReport:
        """Learn from a batch.

        Args:
            batch: the rows of this device.
            stop: asked between parts; when it says so, the step is given up and nothing has changed.

        Raises:
            Stopped: it said so.
            Diverged: the loss was no number for too many steps in a row.
        """
        self.model.train()
        loss, count, measures = self.gradients(batch, stop)
        norm = clip(trainable(self.model).values(), self.config.max_grad_norm)
        share = schedule(self.step_number, self.config)
        skipped = self.spikes.leave_out(loss, norm)
        if not skipped:
            set_learning_rate(self.optimizers, share)
            for optimizer in self.optimizers:
                optimizer.step()
            # Fused optimizers do not say that they have written, and a sampler wants to know.
            increment_version([p for p in trainable(self.model).values() if not is_sharded(p)])
            if self.average:
                self.average.update(self.model)
        self.model.zero_grad()
        self.step_number += 1
        rate = share * self.config.learning_rate
        positions = batch.ids.numel() * self.ranks.parts
        return StepReport(self.step_number, loss, norm, rate, count, positions, skipped, measures)

    def gradients(self, batch: Batch, stop: Callable[[], bool] = lambda: False) -> tuple[float, int, dict[str, float]]:
        """Fill the gradients; the mean loss over the batch, how much it counts, and other means, on all devices."""
        count, total = int(self.ranks.total(self.counted(batch))), 0.0
        sums: dict[str, float] = {}
        for part in batch.split(self.config.micro_rows or len(batch.ids)):
            if stop():
                self.model.zero_grad()
                raise Stopped
            with lookups_in_place(self.model):
                with precision(self.model, self.config):
                    found = self.objective(self.model, part, max(1, count))
                loss, measures = found if isinstance(found, Measured) else (found, {})
                loss.backward()
            total += float(loss.detach())
            for name, value in measures.items():
                sums[name] = sums.get(name, 0.0) + value
        return self.ranks.total(total), count, {name: self.ranks.total(value) for name, value in sums.items()}


def precision(model: Gemma2, config: TrainConfig) -> torch.autocast:
    """Products in bfloat16 over float32 weights, or everything as the weights are."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _check(model: Gemma2) -> None:
    what = "this model cannot be trained"
    if model.config.attn_softcap is None or model.config.final_softcap is None:
        raise UsageError(
            what,
            "its soft cap is turned off, and a Gemma 2 model trained without it is another model when it is used",
            "load it with its soft caps on",
        )
    parameters = trainable(model)
    if not parameters:
        raise UsageError(what, "none of its weights has a gradient", "load float weights, or attach an adapter")
    half = {str(p.dtype).removeprefix("torch.") for p in parameters.values()} - {"float32", "float64"}
    if half:
        raise UsageError(
            what,
            f"its weights are {', '.join(sorted(half))}, in which small steps are rounded away",
            "load it in float32; products can be bfloat16 all the same",
        )
