"""Kernels with a way back against what autograd makes of the plain formulas, in float64 where it can."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.model import attention as attention_module
from cabochon.model.attention import attention, plain
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import GeGLU, Gemma2, RMSNorm, rotary, rotate
from cabochon.model.kernels import elementwise, native, training
from cabochon.model.visibility import NOTHING, Visibility
from support import random_ids

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "compiled")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9))


def answers(call: Callable[..., Tensor], inputs: list[Tensor], wide: bool, back: Tensor) -> list[Tensor]:
    """The result of a call, and the gradients of its inputs for a gradient of the result."""
    leaves = [x.detach().clone().to(torch.float64 if wide else x.dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    gradients = torch.autograd.grad(out, leaves, back.to(out.dtype))
    return [out.detach(), *gradients]


def check(
    ours: Callable[..., Tensor], plainly: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    back = torch.randn(ours(*inputs).shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    got, expected = answers(ours, inputs, False, back), answers(plainly, inputs, True, back)
    for a, b in zip(got, expected, strict=True):
        assert apart(a, b) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    size=st.sampled_from([16, 48, 512]),
    dtype=DTYPES,
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_norms(rows: int, size: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    x, base = (normal(rows, size, seed=seed + i, dtype=dtype) * scale for i in range(2))
    weight = normal(size, seed=seed + 2)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)

    check(lambda x, w: elementwise.rms_norm(x, w, 1e-6), formula, [x, weight.requires_grad_()], dtype)
    check(
        lambda b, x, w: elementwise.add_norm(b, x, w, 1e-6),
        lambda b, x, w: b + formula(x, w),
        [base, x, weight.requires_grad_()],
        dtype,
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), dtype=DTYPES, size=st.sampled_from([0.1, 3.0, 1e4]), seed=st.integers(0, 99))
def test_gelu_times(rows: int, dtype: torch.dtype, size: float, seed: int) -> None:
    gate, up = normal(rows, 32, seed=seed, dtype=dtype) * size, normal(rows, 32, seed=seed + 1, dtype=dtype)

    def formula(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    check(lambda g, u: elementwise.gelu_times(g, u), formula, [gate.requires_grad_(), up], dtype)


@settings(max_examples=30, deadline=None)
@given(positions=st.integers(1, 20), heads=st.integers(1, 4), half=st.sampled_from([16, 64]), dtype=DTYPES)
def test_rotation(positions: int, heads: int, half: int, dtype: torch.dtype) -> None:
    x = normal(2, positions, heads, 2 * half, seed=1, dtype=dtype).requires_grad_()
    angles = rotary(torch.arange(positions).expand(2, positions) * 37, 2 * half, 10_000.0)

    def formula(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles[0] - b * angles[1], b * angles[0] + a * angles[1]], dim=-1)

    kept = x.detach().clone()
    check(lambda x: elementwise.rotated(x, *angles), formula, [x], dtype)
    assert torch.equal(x, kept)  # with gradients nothing is changed in place


@st.composite
def sights(draw: st.DrawFn) -> tuple[Visibility, int, int]:
    """Who sees whom: windows, packed documents that restart or not, padding, more keys than queries."""
    length, extra = draw(st.integers(1, 300)), draw(st.sampled_from([0, 0, 0, 7]))
    window = draw(st.sampled_from([None, 1, 16, 100]))
    keys = torch.arange(length + extra).expand(2, -1).clone()
    queries = keys[:, extra:].clone()
    kind = draw(st.sampled_from(["whole", "documents", "restarted", "padded"])) if not extra else "whole"
    documents = None
    if kind in ("documents", "restarted"):
        documents = torch.stack([torch.arange(length) // draw(st.integers(1, length)) for _ in range(2)])
        if kind == "restarted":
            starts = torch.stack([torch.searchsorted(row, row) for row in documents])
            keys = queries = torch.arange(length) - starts
    if kind == "padded":
        for row in range(2):
            pad = draw(st.integers(0, length))
            keys[row] = torch.where(keys[row] < pad, NOTHING, keys[row] - pad)
        queries = keys
    return Visibility(queries, keys, window, documents, documents), length, length + extra


@settings(max_examples=80, deadline=None)
@given(sight=sights(), dtype=DTYPES, heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]), seed=st.integers(0, 99))
@pytest.mark.parametrize("cap", [None, 5.0, 50.0])
def test_attention(sight: Any, dtype: torch.dtype, heads: tuple[int, int], seed: int, cap: float | None) -> None:
    visible, queries, keys = sight
    assert visible.runs is not None
    size = 5.0 if cap else 1.0
    q = normal(2, heads[0], queries, 16, seed=seed, dtype=dtype) * size
    k, v = (normal(2, heads[1], keys, 16, seed=seed + i, dtype=dtype) for i in (1, 2))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, visible, scale=0.3, softcap=cap, backend="native")

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _in_float64(q, k, v, visible, 0.3, cap)

    back = normal(*q.shape, seed=seed + 3, dtype=dtype)
    got = answers(ours, [q, k, v], False, back)
    expected = answers(formula, [q, k, v], True, back)
    # Scores are rounded to bfloat16 between two products, as torch does: large ones to a few hundredths. Gradients may
    # cancel to nothing, as those of a single key do: what is left are the roundings of numbers as large as the others.
    limit = 1e-5 if dtype is torch.float32 else 0.08
    total = sum(b.norm() for b in expected[1:])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < limit * max(b.norm(), total, 1e-6)


def _in_float64(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, cap: float | None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = visible.mask()[:, None]
    weights = torch.where(mask, scores, -1e30).softmax(-1) * mask
    return weights @ v


def test_keys_that_lie_apart_are_left_to_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([[3, 0, 2, 1, 4]])
    visible = Visibility(positions, positions, 3)
    assert visible.runs is None
    q, k, v = (normal(1, 2, 5, 16, seed=i) for i in range(3))
    expected = plain(q, k, v, visible, 0.3, 5.0)
    monkeypatch.setattr(training.Attention, "apply", None)
    torch.testing.assert_close(attention(q, k, v, visible, scale=0.3, softcap=5.0, backend="native"), expected)


CONFIG = Gemma2Config(
    vocab_size=128, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=96,
    query_pre_attn_scalar=20, sliding_window=24, max_position=256, attn_softcap=4.0, final_softcap=6.0,
)  # fmt: skip


def gradients(model: Gemma2, mixed: bool) -> dict[str, Tensor]:
    ids, documents = random_ids(CONFIG, 2, 150), (torch.arange(150) // 60).expand(2, 150)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = model(ids, documents=documents)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_model_has_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    torch.manual_seed(0)
    model = Gemma2(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.recompute = recompute
    used: list[str] = []
    for name in ("RMSNorm", "GeluTimes", "Rotate", "Attention"):
        kind = getattr(training, name)
        back = kind.backward

        def noted(ctx: Any, *grads: Any, name: str = name, back: Any = back) -> Any:
            used.append(name)
            return back(ctx, *grads)

        monkeypatch.setattr(kind, "backward", staticmethod(noted))
    ours = {mixed: gradients(model, mixed) for mixed in (False, True)}
    assert {n: used.count(n) for n in set(used)} == {"RMSNorm": 2 * 13, "GeluTimes": 6, "Rotate": 12, "Attention": 6}
    monkeypatch.setattr(native, "library", lambda: None)
    torch_model, wide = gradients(model, True), gradients(model.double(), False)
    for name, exact in wide.items():
        # RMSNorm and angles are float32 in a float64 model, too.
        assert apart(ours[False][name], exact) < 1e-4, name
        assert apart(ours[True][name], exact) < 1.1 * apart(torch_model[name], exact) + 0.01, name


def test_the_modules_take_them() -> None:
    """Not only the functions: with gradients each module's result comes from a kernel."""
    config = CONFIG
    x = normal(2, 3, 64, seed=0).requires_grad_()
    assert type(RMSNorm(config)(x).grad_fn).__name__ == "RMSNormBackward"
    hidden = GeGLU(config)(x)
    assert "GeluTimesBackward" in _ancestors(hidden.grad_fn)
    angles = rotary(torch.arange(3).expand(2, 3), 32, 10_000.0)
    assert type(rotate(x.unflatten(-1, (2, 32)), angles).grad_fn).__name__ == "RotateBackward"
    assert attention_module.choose(x, x, 50.0) == "native"


def _ancestors(node: Any) -> set[str]:
    return {type(node).__name__}.union(*(_ancestors(n) for n, _ in node.next_functions if n is not None))
