"""Training on a GPU: losses and gradients against float64 on the CPU, a step against the CPU's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon.data.pack import IGNORED, Batch
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.losses.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from cabochon.train.losses.fused import Walk, cross_entropy, distill
from cabochon.train.losses.teachers import Head, LiveTeacher, SampledTeacher, TopKTeacher
from cabochon.train.objectives import next_tokens
from cabochon.train.step import Trainer

TOKENS, SIZE, VOCAB = 96, 64, 5000
DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(0.3), TotalVariation()]


def loss_of(kind: Any, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of hidden states and of the head, from the same numbers on any device."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, theirs, head = (
        torch.randn(n, SIZE, generator=draw, dtype=torch.float64).to(device, dtype)
        for n in (TOKENS, VOCAB, TOKENS, VOCAB)
    )
    ids = torch.randint(VOCAB, (TOKENS,), generator=draw).to(device)
    few = torch.stack([torch.randperm(VOCAB, generator=draw)[:8] for _ in range(TOKENS)]).to(device)
    shares = torch.rand(TOKENS, 8, generator=draw, dtype=torch.float64).to(device, dtype) / 10
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    walk, ours = Walk(chunk_bytes=VOCAB * dtype.itemsize * 40), Head(weight, 30.0)
    if isinstance(kind, CrossEntropy):
        loss = cross_entropy(hidden, ours, ids, TOKENS, kind, walk=walk)
    else:
        teacher = {
            "live": LiveTeacher(theirs, Head(head, 30.0)),
            "top": TopKTeacher(few, shares),
            "draws": SampledTeacher(few, shares, shares),
        }[kind[0]]
        loss = distill(hidden, ours, teacher, TOKENS, kind[1], temperature=1.5, walk=walk)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


KINDS = [CrossEntropy(), CrossEntropy(0.1, 1e-3), ("draws", ForwardKL())]
KINDS += [(teacher, divergence) for teacher in ("live", "top") for divergence in DIVERGENCES]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses(gpu: str, kind: Any) -> None:
    for a, b in zip(loss_of(kind, gpu, torch.float32), loss_of(kind, "cpu", torch.float64), strict=True):
        assert (a.cpu().double() - b).norm() < 1e-4 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps(gpu: str, optimizer: Any) -> None:
    """flex_attention forward and backward, the losses, clipping and the optimizers, over packed documents."""
    config = Gemma2Config(
        vocab_size=512, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=256,
        query_pre_attn_scalar=32, sliding_window=64, max_position=512, attn_softcap=5.0, final_softcap=8.0,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (4, 256), generator=draw)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = IGNORED
    batch = Batch(ids, targets, (torch.arange(256) // 100).expand(4, 256).clone())
    losses = {}
    for device in ("cpu", gpu):
        torch.manual_seed(0)
        model = Gemma2(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        settings = TrainConfig(steps=6, precision="float32", optimizer=optimizer, warmup_steps=2, micro_rows=2)
        trainer = Trainer(model.to(device), settings, next_tokens(settings))
        losses[device] = [trainer.step(batch).loss for _ in range(6)]
    assert losses[gpu] == pytest.approx(losses["cpu"], rel=2e-3)
    assert losses[gpu][-1] < losses[gpu][0]
