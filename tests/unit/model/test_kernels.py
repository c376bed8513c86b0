"""The compiled kernels against their plain twins, and a row's bits against the same row in any company."""

import math
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
from cabochon.model.kernels.draw import draw
from cabochon.model.kernels.vectors import inner_products, kept_where, magnitudes, weighted_sum
from cabochon.model.linear import FEW_ROWS, QuantEmbedding, QuantLinear, float_linear, quantize
from cabochon.weights.quantize import use_packed_layers
from cabochon.weights.scheme import Scheme
from support import SMALL, random_ids, relative_error, small_model

compiled = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "compiled")
pytestmark = compiled
BF16_STEP = 2**-8  # the largest relative rounding error of bfloat16, and so the most that two roundings differ by
BOTH = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def products(draw: st.DrawFn) -> tuple[QuantLinear, Tensor]:
    """A layer of any shape and rows for it: fewer and more than a block of either kernel takes, VNNI's or AMX's."""
    rows, columns, count = draw(st.integers(1, 150)), draw(st.integers(1, 700)), draw(st.integers(1, 100))
    bits, group = draw(st.sampled_from([8, 4])), draw(st.sampled_from([32, 64, 128, 192, 256]))
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


# Quantised matrices


@settings(max_examples=150, deadline=None)
@given(problem=products(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_a_dequantised_matrix_equals_its_twin(problem: Any, dtype: torch.dtype, data: Any) -> None:
    layer, _ = problem
    start = 16 * data.draw(st.integers(0, (layer.rows - 1) // 16))
    rows = slice(start, data.draw(st.integers(start, layer.rows + 3)))
    expected = layer.quantized().dequantize()[rows, : layer.columns].to(dtype)
    assert torch.equal(layer.dequantized(dtype, rows), expected)
    assert torch.equal(plainly(lambda: layer.dequantized(dtype, rows)), expected)


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


@settings(max_examples=40, deadline=None)
@given(problem=products(), second=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_layers_together_are_the_same_layers_alone(problem: Any, second: int, dtype: torch.dtype) -> None:
    layer, x = problem
    other = QuantLinear(second, layer.columns, layer.bits, layer.group)
    other.fill(quantize(normal(second, layer.columns), layer.bits, layer.group))
    joint = linear_module.rounded_products(x.to(dtype), [layer, other])
    for found, alone in zip(joint, (layer, other), strict=True):
        assert found.dtype is dtype
        # What is bfloat16 on the way in and out is rounded inside the kernel exactly as torch does it.
        assert torch.equal(found, alone(x.to(dtype).float()).to(dtype))


@torch.no_grad()
def test_many_rows_pass_through_in_panels() -> None:
    layer = QuantLinear(40, 320, 4)
    layer.fill(quantize(normal(40, 320), 4))
    x = normal(1100, 320)
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(7)]))


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
    assert used == [16, 2, 16, 3]  # 16-bit rows are rounded up, where nothing is learnt


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
    assert elementwise.rotated(x, *angles) is x
    assert relative_error(x.float(), expected.float()) < (1e-6 if dtype == torch.float32 else BF16_STEP)


@torch.no_grad()
def test_what_the_kernels_cannot_do_is_left_to_torch() -> None:
    odd, weight = normal(3, 20), torch.zeros(20)
    assert elementwise.rms_norm(odd, weight, 1e-6) is None
    assert elementwise.rms_norm(normal(32, 16).t(), torch.zeros(32), 1e-6) is None  # not dense
    assert elementwise.rms_norm(normal(2, 32).double(), torch.zeros(32), 1e-6) is None
    angles = rotary(torch.arange(3)[None], 16, 10_000.0)
    assert elementwise.rotated(normal(1, 3, 2, 16), *angles) is None
    assert elementwise.add_norm(normal(2, 32), normal(2, 32), torch.zeros(32), 1e-6) is None  # inference rounds twice


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


# Inner products


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 200), count=st.integers(1, 5), seed=st.integers(0, 99), halves=st.booleans())
def test_inner_products_are_those_of_float64(n: int, count: int, seed: int, halves: bool) -> None:
    dtypes = [torch.bfloat16 if halves and i % 2 else torch.float32 for i in range(count)]
    vectors = [normal(n, seed=seed + i, dtype=dtype) * 10.0 ** (3 * i) for i, dtype in enumerate(dtypes)]
    found = iter(inner_products(vectors))
    for i, a in enumerate(vectors):
        for b in vectors[: i + 1]:
            products = a.double() * b.double()
            assert abs(next(found) - math.fsum(products.tolist())) <= 1e-14 * products.abs().sum()
    assert next(found, None) is None


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 200), count=st.integers(1, 3), seed=st.integers(0, 99), out=st.sampled_from(BOTH), data=st.data()
)
def test_a_weighted_sum_is_that_of_torch(n: int, count: int, seed: int, out: torch.dtype, data: Any) -> None:
    tensors = [normal(n, seed=seed + i, dtype=data.draw(st.sampled_from(BOTH))) for i in range(count)]
    factors = data.draw(st.lists(st.floats(-2, 2, width=16), min_size=count, max_size=count))
    found, finite = weighted_sum(tensors, factors, out)
    terms = torch.stack([t.double() * f for t, f in zip(tensors, factors, strict=True)])
    step = BF16_STEP if out is torch.bfloat16 else 0.0
    assert found.dtype is out and finite
    allowed = step * terms.sum(0).abs() + 1e-6 * terms.abs().sum(0)
    assert ((found.double() - terms.sum(0)).abs() <= allowed).all()
    tensors[-1][data.draw(st.integers(0, n - 1))] = data.draw(st.sampled_from([math.nan, math.inf]))
    assert not weighted_sum(tensors, [*factors[:-1], 1.5], out)[1]


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 99), below=st.integers(-(2**15), 2**15))
def test_kept_elements_and_magnitudes(n: int, seed: int, below: int) -> None:
    values = normal(n, seed=seed)
    bits = torch.randint(-(2**15), 2**15, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    kept = torch.where(bits.int() < below, values, 0.0)
    assert torch.equal(kept_where(values, bits, below), kept)
    assert magnitudes(kept) == pytest.approx(kept.double().abs().sum().item(), rel=1e-14)
    values[0] = math.inf
    assert not kept_where(values, bits, below)[0].isfinite()


@compiled
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300).map(lambda n: 16 * n),
    scale=st.sampled_from([0.3, 1.0, 2.5]),
    share=st.floats(0, 1, exclude_max=True),
    forbidden=st.floats(0, 0.9),
    seed=st.integers(0, 2**16),
)
def test_a_drawn_token_stands_at_its_share(size: int, scale: float, share: float, forbidden: float, seed: int) -> None:
    logits = 4 * normal(size, seed=seed)
    logits[torch.rand(size, generator=torch.Generator().manual_seed(seed)) < forbidden] = -math.inf
    logits[seed % size] = 1.0
    token = draw(logits, scale, share)
    assert token is not None and logits[token] > -math.inf
    sums = torch.softmax(scale * logits.double(), 0).cumsum(0)
    below = sums[token - 1] if token else 0.0
    assert below - 1e-6 <= share <= sums[token] + 1e-6


@compiled
def test_the_ends_of_what_can_be_drawn() -> None:
    logits = torch.full((2064,), -math.inf)
    assert draw(logits, 1.0, 0.5) is None  # nothing can
    logits[[3, 1030]] = torch.tensor([0.0, -80.0])
    assert draw(logits, 1.0, 0.0) == draw(logits, 1.0, 1 - 1e-12) == 3
    assert draw(logits, 0.01, 1 - 1e-12) == 1030
    assert draw(logits[:2050], 1.0, 0.5) is draw(logits.double(), 1.0, 0.5) is None  # not for the kernel


@compiled
def test_kernels_of_other_sources_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._SIGNATURES, "cabochon_of_tomorrow", ())
    opened, reason = native._open.__wrapped__()
    assert opened is None and "install cabochon again" in reason
