"""The losses of generalised knowledge distillation (arXiv 2306.13649) against TRL's, on the same tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cabochon.train.losses.divergences import JensenShannon
from cabochon.train.losses.fused import Walk, distill
from cabochon.train.losses.teachers import Head, LiveTeacher

GOLDEN = Path(__file__).parents[2] / "golden" / "distill" / "trl.safetensors"
SOFT_CAP = 5.0
SETTINGS = [(beta, temperature) for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for temperature in (1.0, 0.9, 2.5)]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, float]]:
    with safe_open(GOLDEN, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["losses"])  # noqa: SIM118


def plain(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The divergence of each row of logits, written as in the paper, section 2."""
    q, p = ((logits / temperature).softmax(1) for logits in (student, teacher))
    if beta == 0:
        return (p * (p / q).log()).sum(1)
    if beta == 1:
        return (q * (q / p).log()).sum(1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(1) + (1 - beta) * (q * (q / m).log()).sum(1)


@pytest.mark.parametrize(("beta", "temperature"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_trl(
    golden: tuple[dict[str, Tensor], dict[str, float]], beta: float, temperature: float, dtype: torch.dtype
) -> None:
    tensors, losses = golden
    name = f"{beta} {temperature}"
    hidden, head = (tensors[part].to(dtype, copy=True).requires_grad_() for part in ("hidden", "head"))
    counted = tensors["targets"] >= 0
    teacher = LiveTeacher(tensors["teacher_hidden"].to(dtype), Head(tensors["teacher_head"].to(dtype), SOFT_CAP))
    loss = distill(
        hidden, Head(head, SOFT_CAP), teacher, int(counted.sum()), JensenShannon(beta), counted=counted,
        temperature=temperature, walk=Walk(chunk_bytes=2000),
    )  # fmt: skip
    loss.backward()
    near = {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    assert loss.item() == pytest.approx(losses[name], rel=near["rtol"])
    assert torch.allclose(hidden.grad.double(), tensors[f"{name} hidden"], **near)
    assert torch.allclose(head.grad.double(), tensors[f"{name} head"], **near)


@pytest.mark.parametrize(("beta", "temperature"), SETTINGS)
def test_trl_computes_what_the_paper_says(
    golden: tuple[dict[str, Tensor], dict[str, float]], beta: float, temperature: float
) -> None:
    tensors, losses = golden
    pairs = (("hidden", "head"), ("teacher_hidden", "teacher_head"))
    student, teacher = (torch.tanh(tensors[a] @ tensors[b].T / SOFT_CAP) * SOFT_CAP for a, b in pairs)
    counted = tensors["targets"] >= 0
    expected = plain(student[counted], teacher[counted], beta, temperature).mean()
    assert losses[f"{beta} {temperature}"] == pytest.approx(expected.item(), rel=1e-9)
