"""The walk over chunks of tokens: memory, dtypes, parts of a step, what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy as plain_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from cabochon.base.errors import UsageError
from cabochon.train.losses import fused
from cabochon.train.losses.divergences import JensenShannon
from cabochon.train.losses.fused import Walk, chunk_rows, cross_entropy, distill
from cabochon.train.losses.teachers import Head, LiveTeacher, SampledTeacher, TopKTeacher


def finished(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    logits = hidden @ head.weight.T
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits / temperature


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["cross entropy", "live", "top k", "draws"])
def test_no_tensor_is_as_large_as_the_logits(kind: str) -> None:
    tokens, vocab, size = 512, 4096, 16
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, size, generator=generator).requires_grad_() for n in (tokens, vocab))
    head, walk = Head(weight, 30.0), Walk(chunk_bytes=4 * vocab * 32)
    ids = torch.randint(vocab, (tokens, 1), generator=generator)
    share = torch.full((tokens, 1), 0.5)
    with LargestTensor() as largest:
        if kind == "cross entropy":
            loss = cross_entropy(hidden, head, ids[:, 0], 1, walk=walk)
        else:
            teachers = {
                "live": LiveTeacher(hidden.detach(), head),
                "top k": TopKTeacher(ids, share),
                "draws": SampledTeacher(ids, share, share),
            }
            loss = distill(hidden, head, teachers[kind], 1, walk=walk)
        loss.backward()
    assert 4 * vocab * 16 <= largest.bytes <= 4 * vocab * 32 < 4 * vocab * tokens / 10


def test_the_weight_gradient_is_added_up_in_float32_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK", 16)  # four products for 50 ids, the last one smaller
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=generator).bfloat16()
    weight = torch.randn(50, 8, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(50, (64,), generator=generator)
    gradients = {}
    for dtype in (torch.float64, None, torch.bfloat16):
        wide = torch.float64 if dtype is torch.float64 else torch.bfloat16
        inputs = hidden.to(wide), weight.detach().to(wide).requires_grad_()
        walk = Walk(chunk_bytes=50 * wide.itemsize, weight_gradient=dtype)  # token by token
        cross_entropy(inputs[0], Head(inputs[1], None), targets, 1, walk=walk).backward()
        assert inputs[1].grad is not None and inputs[1].grad.dtype is wide
        gradients[dtype] = inputs[1].grad
    exact = gradients[torch.float64]
    errors = {dtype: (gradient - exact).norm() / exact.norm() for dtype, gradient in gradients.items()}
    assert errors[None] < 0.01 < 2 * errors[torch.bfloat16] < 0.2


def test_parts_of_a_step_weigh_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (30, 50))
    head, targets = Head(weight, 30.0), torch.randint(50, (30,), generator=generator)
    whole = cross_entropy(hidden, head, targets, 30)
    parts = [cross_entropy(hidden[s], head, targets[s], 30) for s in (slice(0, 7), slice(7, 30))]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (whole, parts[0] + parts[1]))
    torch.testing.assert_close(*gradients)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    cross_entropy(hidden, Head(weight, None), torch.arange(5), 5).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not cross_entropy(hidden, Head(weight, None), torch.arange(5), 5).requires_grad


def test_a_second_backward_is_refused() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = cross_entropy(hidden, Head(torch.randn(9, 4), None), torch.arange(5), 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_autocast_multiplies_in_bfloat16_and_leaves_gradients_in_float32() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, Head(weight, 30.0), torch.arange(5), 5)
        plain = plain_cross_entropy(finished(hidden, Head(weight, 30.0), 1).float(), torch.arange(5))
    gradients = [torch.autograd.grad(one, (hidden, weight)) for one in (loss, plain)]
    assert all(part.dtype is torch.float32 for part in gradients[0])
    torch.testing.assert_close(loss, plain, atol=0.02, rtol=0.02)
    torch.testing.assert_close(*gradients, atol=0.02, rtol=0.02)


def test_chunks_fit_their_budget() -> None:
    assert chunk_rows(2048, 2 * 256_000, 128 * 2**20) == 256
    assert chunk_rows(2048, 4 * 256_000, 128 * 2**20) == 128
    assert chunk_rows(2048, 4 * 256_000, 1) == 1
    assert chunk_rows(2048, 100, 1500) == 15
    assert chunk_rows(257, 2 * 256_000, 128 * 2**20) == 144  # not 256 and 1
    assert chunk_rows(3, 2 * 256_000, 128 * 2**20) == 16


@given(tokens=st.integers(1, 5000), token_bytes=st.integers(1, 1000), budget=st.integers(1, 100_000))
def test_chunks_are_as_few_as_the_budget_allows(tokens: int, token_bytes: int, budget: int) -> None:
    size = chunk_rows(tokens, token_bytes, budget)
    assert size == 1 or size * token_bytes <= budget
    most = max(1, budget // token_bytes)
    assert math.ceil(tokens / size) == math.ceil(tokens / (most if most < 16 else most // 16 * 16))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(3, 5)), "head"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "4 targets"),
        (dict(temperature=0.0), "not positive"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict, message: str) -> None:
    fits = dict(hidden=torch.zeros(3, 4), targets=torch.zeros(3, dtype=torch.int64), temperature=1.0)
    fits |= change
    with pytest.raises(UsageError, match=message):
        cross_entropy(
            fits["hidden"], Head(torch.zeros(9, 4), None), fits["targets"], 1, temperature=fits["temperature"]
        )


def test_vocabularies_have_to_be_the_same() -> None:
    teacher = LiveTeacher(torch.zeros(3, 4), Head(torch.zeros(8, 4), None))
    with pytest.raises(UsageError, match="knows 8 ids"):
        distill(torch.zeros(3, 4), Head(torch.zeros(9, 4), None), teacher, 1)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(UsageError, match="beta"):
        JensenShannon(beta)
