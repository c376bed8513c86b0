"""The plain training loop: next-token cross-entropy, bf16 products over float32 weights, Muon and AdamW."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from cabochon.base.errors import UsageError
from cabochon.data.pack import Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.losses.fused import cross_entropy
from cabochon.train.losses.teachers import Head


@dataclass(frozen=True)
class Progress:
    """Where a run stands: mean loss in nats since the last report, tokens per second over the same stretch."""

    step: int
    loss: float
    tokens_per_second: float


def train(
    model: Gemma2,
    batches: Iterator[Batch],
    config: TrainConfig,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Train in place for `config.steps` batches.

    Raises:
        UsageError: the model's soft cap is off, the data ended early, or the loss stopped being a number.
    """
    if model.config.attn_softcap is None or model.config.final_softcap is None:
        raise UsageError(
            "this model cannot be trained",
            "its soft cap is turned off, and a Gemma 2 model trained without it is another model when it is used",
            "load it with its soft caps on",
        )
    model.train()
    optimizers = make_optimizers(model, config)
    loss_sum, tokens, since = 0.0, 0, time.perf_counter()
    for step in range(config.steps):
        batch = next(batches, None)
        if batch is None:
            raise UsageError("training stopped early", f"the data ended at step {step}", "lower steps or add data")
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm, error_if_nonfinite=False)
        for optimizer in optimizers:
            set_learning_rate(optimizer, schedule(step, config))
            optimizer.step()
            optimizer.zero_grad()
        loss_sum, tokens = loss_sum + loss.item(), tokens + batch.ids.numel()
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            count = (step % config.log_every) + 1
            now = time.perf_counter()
            report(Progress(step + 1, loss_sum / count, tokens / (now - since)))
            loss_sum, tokens, since = 0.0, 0, now
    model.eval()


def batch_loss(model: Gemma2, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the targets of a batch."""
    device = model.embedding.weight.device
    head = Head(model.embedding.weight, model.config.final_softcap)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.hidden(batch.ids.to(device), documents=batch.documents.to(device))
        return cross_entropy(hidden.flatten(0, 1), head, batch.targets.flatten().to(device), batch.num_targets)


def make_optimizers(model: Gemma2, config: TrainConfig) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding (also the head) and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.weight"]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or name == "embedding.weight"]
    muon = Muon(matrices, lr=config.matrix_learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    adam = AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def set_learning_rate(optimizer: Optimizer, share: float) -> None:
    """Set every group to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, flat, then linear decay."""
    warm = (step + 1) / max(1, config.warmup_steps)
    start = (1 - config.decay_share) * config.steps
    gone = max(0.0, (step + 1 - start) / max(1.0, config.steps - start))
    return min(1.0, warm) * (1 - gone * (1 - config.final_share))
