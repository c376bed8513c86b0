"""Every backend against the oracle and against each other; broken ones are refused by name."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.base.errors import CabochonError, UsageError
from cabochon.model import attention as module
from cabochon.model.attention import BACKENDS, attention, blockwise, plain, prove
from cabochon.model.proof import failures, oracle
from cabochon.model.visibility import NOTHING, Visibility


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Visibility]:
    """Random heads, lengths, windows, left padding, packed documents; queries may be the last of the keys."""
    batch, kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 40))
    queries, size = draw(st.integers(1, keys)), 2 * draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = ((kv * group, queries), (kv, keys), (kv, keys))
    q, k, v = (4 * torch.randn(batch, n, t, size, generator=generator) for n, t in shapes)
    padding = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)))[:, None]
    positions = torch.arange(keys).expand(batch, keys) - padding
    positions = positions.clamp_min(NOTHING)
    documents = None
    if draw(st.booleans()):
        documents = torch.randint(0, 3, (batch, keys), generator=generator).sort(-1).values
    window = draw(st.one_of(st.none(), st.integers(1, 12)))
    of_queries = None if documents is None else documents[:, -queries:]
    return q, k, v, Visibility(positions[:, -queries:], positions, window, of_queries, documents)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(problem=problems(), block=st.integers(1, 16))
def test_backends_equal_the_oracle(name: str, problem: Any, block: int) -> None:
    q, k, v, visible = problem
    cap = None if name == "sdpa" else 3.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        got = attention(q, k, v, visible, scale=0.7, softcap=cap, backend=name)
    assert torch.allclose(got, oracle(q, k, v, visible, 0.7, cap), atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(problem=problems(), block=st.integers(1, 16))
def test_blockwise_gradients_equal_plain_ones(problem: Any, block: int) -> None:
    *tensors, visible = problem
    found = []
    for backend in (plain, blockwise):
        inputs = [t.double().requires_grad_() for t in tensors]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK", block)
            backend(*inputs, visible, 0.7, 3.0).square().sum().backward()
        found.append([t.grad for t in inputs])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)  # softmax is in float32 also here


def _without(feature: str) -> Callable[..., Tensor]:
    def broken(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, cap: float | None) -> Tensor:
        window = visible.window
        if feature == "window off by one" and window:
            window += 1
        if feature == "no window":
            window = None
        documents = (None, None) if feature == "documents" else (visible.query_documents, visible.key_documents)
        k_pos = visible.key_positions.clamp_min(0) if feature == "padding" else visible.key_positions
        seen = Visibility(visible.query_positions, k_pos, window, *documents)
        scale = q.shape[-1] ** -0.5 if feature == "scale" else scale
        return plain(q, k, v, seen, scale, None if feature == "soft cap" else cap)

    return broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("soft cap", "soft cap"),
        ("scale", "scale"),
        ("window off by one", "window edge"),
        ("no window", "window beyond the prompt"),
        ("padding", "padding"),
        ("documents", "documents"),
    ],
)
def test_an_inert_feature_is_named(broken: str, named: str, dtype: torch.dtype) -> None:
    assert named in failures(_without(broken), "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_passes_its_proof(name: str, dtype: torch.dtype) -> None:
    assert failures(BACKENDS[name], "cpu", dtype, with_softcap=name != "sdpa") == []


def test_a_backend_that_fails_is_refused_before_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fast", _without("soft cap"))
    q = torch.zeros(1, 2, 3, 4)
    here = torch.arange(3)[None]
    with pytest.raises(CabochonError, match=r"'fast' is refused on cpu[^$]*soft cap"):
        attention(q, q, q, Visibility(here, here, None), scale=1.0, softcap=50.0, backend="fast")


def test_a_proof_holds_inside_autocast() -> None:
    module._PROVED.clear()
    with torch.autocast("cpu", torch.bfloat16):
        prove("plain", "cpu", torch.bfloat16)


def test_sdpa_refuses_a_soft_cap_and_training() -> None:
    q = torch.zeros(1, 2, 3, 4, requires_grad=True)
    here = torch.arange(3)[None]
    for cap in (50.0, None):
        with pytest.raises(UsageError):
            attention(q, q, q, Visibility(here, here, None), scale=1.0, softcap=cap, backend="sdpa")
    with pytest.raises(UsageError, match="did you mean 'blockwise'"):
        attention(q, q, q, Visibility(here, here, None), scale=1.0, softcap=50.0, backend="blockwize")


def test_a_row_with_nothing_to_see_is_zero() -> None:
    q = torch.randn(1, 2, 3, 4)
    queries, keys = torch.tensor([[NOTHING, 0, 9]]), torch.tensor([[NOTHING, 0, 1]])
    for name in BACKENDS:
        got = attention(q, q, q, Visibility(queries, keys, 4), scale=1.0, softcap=None, backend=name)
        assert got[0, :, 0].abs().max() == 0 and got[0, :, 2].abs().max() == 0, name
        assert torch.allclose(got[0, :, 1], q[0, :, 1], atol=1e-6)


_LONG_PROMPT = """
import resource, torch
from cabochon.model.attention import attention
from cabochon.model.visibility import Visibility
torch.set_num_threads(1)
def at(length):  # the heads of a 2b layer
    q, kv = torch.zeros(1, 8, length, 256, dtype=torch.bfloat16), torch.zeros(1, 4, length, 256, dtype=torch.bfloat16)
    here = torch.arange(length)[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        attention(q, kv, kv, Visibility(here, here, WINDOW), scale=1 / 16, softcap=50.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
at(64)
print(at(8192))
"""


@pytest.mark.parametrize("window", [None, 4096])
def test_a_long_prompt_never_holds_all_scores(window: int | None) -> None:
    """8192 tokens through a 2b layer: all scores in float32 would be 2 GiB; a block's, a few times over, are not."""
    program = _LONG_PROMPT.replace("WINDOW", repr(window))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.45 * 2**30
