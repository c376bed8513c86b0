"""The compiled kernels against their plain twins, and a row's bits against the same row in any company."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from cabochon.model import linear as linear_module
from cabochon.model.gemma2 import RMSNorm, rotary, rotate
from cabochon.model.kernels import elementwise, native
from cabochon.model.linear import FEW_ROWS, QuantEmbedding, QuantLinear, float_linear, quantize
from cabochon.weights.quantize import use_packed_layers
from cabochon.weights.scheme import Scheme
from support import SMALL, random_ids, relative_error, small_model

compiled = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "compiled")
pytestmark = compiled
BF16_STEP = 2**-8  # the largest relative rounding error of bfloat16, and so the most that two roundings differ by


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def products(draw: st.DrawFn) -> tuple[QuantLinear, Tensor]:
    """A layer of any shape and rows for it: fewer and more than a block of the kernel takes."""
    rows, columns, count = draw(st.integers(1, 150)), draw(st.integers(1, 300)), draw(st.integers(1, 14))
    bits, group = draw(st.sampled_from([8, 4])), draw(st.sampled_from([32, 64, 128]))
    seed = draw(st.integers(0, 10**6))
    layer = QuantLinear(rows, columns, bits, group)
    layer.fill(quantize(normal(rows, columns, seed=seed), bits, group))
    x = normal(count, columns, seed=seed + 1) * 10.0 ** draw(st.integers(-3, 3))
    if draw(st.booleans()):
        x[draw(st.integers(0, count - 1))] = 0
    return layer, x


def plainly(call: Any) -> Any:
    """The result of a call without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        patch.setattr(linear_module, "library", lambda: None)
        return call()


# Quantised products


@settings(max_examples=150, deadline=None)
@given(problem=products())
@torch.no_grad()
def test_a_quantised_product_equals_its_twin(problem: Any) -> None:
    """Sums inside a group are exact in both; groups are added in float32, in another order."""
    layer, x = problem
    plain = plainly(lambda: layer(x))
    # Weights are standard normal. Where a lone sum comes out near 0, its relative error is that of what cancelled.
    assume(not x.any() or plain.norm() > 0.05 * x.norm() * layer.rows**0.5)
    assert relative_error(layer(x), plain) < 1e-5


@settings(max_examples=150, deadline=None)
@given(problem=products(), order=st.randoms(use_true_random=False))
@torch.no_grad()
def test_the_bits_of_a_row_do_not_depend_on_the_others(problem: Any, order: Any) -> None:
    layer, x = problem
    together = layer(x)
    chosen = [order.randrange(len(x)) for _ in range(order.randrange(1, 9))]
    assert torch.equal(layer(x[chosen]), together[chosen])
    for i in chosen:
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


@torch.no_grad()
def test_the_number_of_threads_changes_no_bit() -> None:
    layer = QuantEmbedding(1000, 192, 4)
    layer.fill(quantize(normal(1000, 192), 4))
    x, threads = normal(7, 192), torch.get_num_threads()
    alone = layer.project(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer.project(x), alone)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_extreme_numbers() -> None:
    """The largest sums that 128 products of a group can reach, and inputs at both ends of float32."""
    layer = QuantLinear(16, 128, 8, 128)
    weight = torch.ones(16, 128)
    weight[::2] *= -1
    layer.fill(quantize(weight, 8, 128))
    for size in (1e-30, 1.0, 1e30):
        got = layer(torch.full((5, 128), size))
        assert torch.allclose(got, weight.sum(1).expand(5, -1) * size, rtol=1e-5)


# Few rows of bfloat16


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 11), n=st.integers(1, 12), k=st.integers(1, 9), seed=st.integers(0, 999))
@torch.no_grad()
def test_few_rows_of_bfloat16(rows: int, n: int, k: int, seed: int) -> None:
    x, weight = normal(rows, 16 * k, seed=seed).bfloat16(), normal(4 * n, 16 * k, seed=seed + 1).bfloat16()
    expected = linear(x.double(), weight.double())
    assert relative_error(float_linear(x, weight).double(), expected) < BF16_STEP
    assert torch.equal(float_linear(x[:1], weight), float_linear(x, weight)[:1]) or rows > FEW_ROWS


@torch.no_grad()
def test_the_bfloat16_kernel_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to eight rows, dense, of sizes that it has."""
    used = []
    monkeypatch.setattr(linear_module, "linear", lambda *tensors: used.append(len(tensors[0])) or linear(*tensors))
    weight = normal(8, 32).bfloat16()
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        float_linear(normal(rows, 32).bfloat16(), weight)
    float_linear(normal(2, 32), weight.float())
    float_linear(normal(2, 24).bfloat16(), weight[:, :24])
    with torch.enable_grad():
        float_linear(normal(3, 32).bfloat16(), weight)
    assert used == [FEW_ROWS + 1, 2, 2, 3]


# Elementwise steps


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 20),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)
@torch.no_grad()
def test_rms_norm(rows: int, width: int, dtypes: Any, size: float) -> None:
    norm = RMSNorm(SMALL)
    norm.weight = torch.nn.Parameter(normal(16 * width).to(dtypes[1]))
    x = (normal(2, rows, 16 * width, seed=1) * size).to(dtypes[0])
    got = elementwise.rms_norm(x, norm.weight, norm.eps)
    assert got is not None and got.dtype == x.dtype
    expected = plainly(lambda: norm(x))
    assert relative_error(got.float(), expected.float()) < (1e-6 if x.dtype == torch.float32 else BF16_STEP)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 12)),
    heads=st.integers(1, 5),
    half=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_rotate(rows: tuple[int, int], heads: int, half: int, dtype: torch.dtype) -> None:
    positions = torch.randint(0, 8192, rows, generator=torch.Generator().manual_seed(1))
    angles = rotary(positions, 2 * half, 10_000.0)
    x = normal(*rows, heads, 2 * half, dtype=dtype)
    expected = plainly(lambda: rotate(x.clone(), angles))
    assert elementwise.rotate_in_place(x, *angles)
    assert relative_error(x.float(), expected.float()) < (1e-6 if dtype == torch.float32 else BF16_STEP)


@torch.no_grad()
def test_what_the_kernels_cannot_do_is_left_to_torch() -> None:
    odd, weight = normal(3, 20), torch.zeros(20)
    assert elementwise.rms_norm(odd, weight, 1e-6) is None
    assert elementwise.rms_norm(normal(32, 16).t(), torch.zeros(32), 1e-6) is None  # not dense
    assert elementwise.rms_norm(normal(2, 32).double(), torch.zeros(32), 1e-6) is None
    angles = rotary(torch.arange(3)[None], 16, 10_000.0)
    assert not elementwise.rotate_in_place(normal(1, 3, 2, 16), *angles)
    with torch.enable_grad():
        assert elementwise.rms_norm(normal(2, 32), torch.zeros(32), 1e-6) is None


# A whole model, and one without kernels


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_quantised_model_with_and_without_kernels(bits: int) -> None:
    model = small_model(size=0.2)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    use_packed_layers(model, Scheme(bits))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear | QuantEmbedding):
            layer.fill(quantize(weights[f"{name}.weight"], bits, layer.group))
    ids = random_ids(SMALL, 2, 12)
    # Rounding of activations turns the last bit of a sum into a whole step now and then.
    assert relative_error(model(ids), plainly(lambda: model(ids))) < 0.02


def test_without_a_library_there_is_a_reason() -> None:
    script = (
        "import pathlib\nfrom cabochon.model.kernels import native\n"
        "native.NAME = 'absent'\nassert native.library() is None\nprint(native.why_not())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "not compiled" in done.stdout
