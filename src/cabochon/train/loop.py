"""The loop of every kind of training: steps, and between them reports, evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import token_losses
from cabochon.train.config import TrainConfig
from cabochon.train.objectives import hidden_states, next_tokens
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.shards import let_go
from cabochon.train.step import StepReport, Stopped, Trainer, precision


class Halted(BadInput):
    """What a stream raises when the run cannot go on from where it is; the run is saved first."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: mean over the steps since the last report, tokens per second over the same stretch."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # that went through the model
    tokens_per_second: float
    seconds_per_step: float
    skipped: int  # steps
    measures: Mapping[str, float] = field(default_factory=dict)  # beside the loss, as the objective names them


@dataclass(frozen=True)
class Hooks:
    """What is to happen between steps. `evaluate` and `save` get the steps done; `evaluate` says whether it came to its
    end."""

    report: Callable[[Progress], None] = lambda _: None
    evaluate: Callable[[int], bool] = lambda _: True
    save: Callable[[int], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False


def train(
    model: Gemma2,
    batches: Iterator[Batch],
    config: TrainConfig,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Train in place on next tokens, with reports and nothing else. Errors are those of `train_steps`."""
    train_steps(Trainer(model, config, next_tokens(config)), batches, Hooks(report=report))


def train_steps(trainer: Trainer, batches: Iterator[Batch], hooks: Hooks = Hooks()) -> bool:
    """Go on until `config.steps` steps are done.

    True: they are, and evaluated. False: `hooks.stop` ended the run, which was saved.

    Raises:
        UsageError: the data ended early.
        BadInput: the loss is no number any more, or the data says that the run has to end.
    """
    config, since = trainer.config, _Since()
    saved, whole = trainer.step_number, True  # a run that goes on comes out of a checkpoint
    while trainer.step_number < config.steps:
        if hooks.stop():
            if saved != trainer.step_number or not saved:
                hooks.save(trainer.step_number)
            return False
        try:
            batch = next(batches, None)
        except Halted:
            hooks.save(trainer.step_number)
            raise
        if batch is None:
            step = trainer.step_number
            raise UsageError("training stopped early", f"the data ended at step {step}", "lower steps or add data")
        try:
            since.add(trainer.step(batch, hooks.stop))
        except Stopped:
            continue  # to the top, where the run is saved; `batch` is drawn again when it goes on
        step = trainer.step_number
        last = step == config.steps
        if last or step % config.log_every == 0:
            hooks.report(since.progress())
            since = _Since()
        if last or (config.eval_every and step % config.eval_every == 0):
            whole = hooks.evaluate(step)
        if last or (config.save_every and step % config.save_every == 0):
            hooks.save(step)
            saved = step
    trainer.model.eval()
    return whole


@dataclass
class _Since:
    """Steps since the last report."""

    steps: list[StepReport] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, step: StepReport) -> None:
        self.steps.append(step)

    def progress(self) -> Progress:
        kept = [step for step in self.steps if not step.skipped] or self.steps
        tokens, seconds = sum(step.positions for step in self.steps), time.perf_counter() - self.started
        return Progress(
            step=self.steps[-1].step,
            loss=sum(step.loss for step in kept) / len(kept),
            grad_norm=sum(step.grad_norm for step in kept) / len(kept),
            learning_rate=self.steps[-1].learning_rate,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            seconds_per_step=seconds / len(self.steps),
            skipped=sum(step.skipped for step in self.steps),
            measures=_means([step.measures for step in kept]),
        )


def _means(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each over the steps that have it: not every step of a mixture measures the same."""
    names = {name: None for each in measures for name in each}
    return {name: fmean(each[name] for each in measures if name in each) for name in names}


def next_batch(batches: Iterator[Batch], ranks: Ranks) -> Batch | None:
    """The next batch, or an empty one while other ranks have some; None when all are at their end."""
    batch = next(batches, None)
    if ranks.world == 1 or not ranks.most(batch is not None):
        return batch
    return batches.empty() if batch is None else batch  # type: ignore[attr-defined]


# What a part of held-out data comes to: how much is counted, and sums over it by name.
Measure = Callable[[Gemma2, Batch], tuple[int, Mapping[str, float]]]


def next_token_loss(model: Gemma2, batch: Batch) -> tuple[int, Mapping[str, float]]:
    """Cross-entropy in nats over all targets, without label smoothing or other terms."""
    hidden, targets = hidden_states(model, batch), batch.targets.flatten().to(model.device)
    counted = targets != IGNORED
    losses = token_losses(model.head, hidden[counted], targets[counted], model.config.vocab_size)
    return len(losses), {"loss": float(losses.double().sum())}


@torch.no_grad()
def evaluate(
    model: Gemma2,
    batches: Iterator[Batch],
    config: TrainConfig,
    ranks: Ranks = SINGLE,
    stop: Callable[[], bool] = lambda: False,
    measure: Measure = next_token_loss,
) -> dict[str, float] | None:
    """Means over all that `measure` counts in the batches, by name; "loss" is among them.

    With several ranks each has its part of every batch, as `open_eval` gives it. `stop` is asked between batches; None
    when it says so.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    count, stopped = 0, False
    while not (stopped := stop()) and (batch := next_batch(batches, ranks)) is not None:
        for part in batch.split(config.micro_rows or len(batch.ids)):
            with precision(model, config):
                counted, found = measure(model, part)
            count += counted
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
    let_go(model)
    model.train(was_training)
    if stopped:
        return None
    count = int(ranks.total(count))
    if count == 0:
        raise UsageError("nothing was evaluated", "the held-out data has no target", "give more of it")
    return {name: ranks.total(value) / count for name, value in sums.items()}
