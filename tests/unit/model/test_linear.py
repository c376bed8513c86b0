"""Quantised matrices: what rounding costs, that packing keeps every number, and what a product with them is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from cabochon.model import linear as module
from cabochon.model.linear import (
    Linear,
    PackedWeight,
    QuantEmbedding,
    Quantized,
    QuantLinear,
    fake_quantize,
    float_linear,
    int4_grid,
    quantize,
)
from support import relative_error

bits_and_groups = st.sampled_from([(bits, group) for bits in (8, 4) for group in (32, 64, 128)])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A matrix of any shape, spread and offset, with bits and a group."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 200))
    bits, group = draw(bits_and_groups)
    values = normal(rows, columns, seed=draw(st.integers(0, 10**6)))
    return values * 10.0 ** draw(st.integers(-4, 3)) + draw(st.sampled_from([0.0, 0.5])), bits, group


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, bits: int, group: int, kind: Any = QuantLinear) -> Any:
    layer = kind(*weight.shape, bits, group)
    layer.fill(quantize(weight, bits, group))
    return layer


# Rounding


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.12)])
@pytest.mark.parametrize("columns", [64, 256, 2304])
def test_error_on_normal_weights(bits: int, bound: float, columns: int) -> None:
    weight = 0.02 * normal(256, columns)
    error = (quantize(weight, bits).dequantize() - weight).norm() / weight.norm()
    assert bound / 4 < error < bound  # below a quarter would mean that nothing was rounded


@settings(max_examples=60, deadline=None)
@given(problem=matrices())
def test_every_value_is_within_half_a_step(problem: Any) -> None:
    weight, bits, group = problem
    matrix = quantize(weight, bits, group)
    back = matrix.dequantize()
    assert back[:, weight.shape[1] :].abs().sum() == 0  # the padding stays zero
    step = matrix.scale[:, None].expand_as(back) if bits == 8 else matrix.scale.float().repeat_interleave(group, 1)
    # float16 scales and whole zero points move the ends of a 4-bit grid: up to another half step there.
    room = 0.5001 if bits == 8 else 1.02
    assert ((back[:, : weight.shape[1]] - weight).abs() <= room * step[:, : weight.shape[1]]).all()


@settings(max_examples=60, deadline=None)
@given(problem=matrices())
def test_numbers_are_in_range(problem: Any) -> None:
    weight, bits, group = problem
    matrix = quantize(weight, bits, group)
    assert matrix.bits == bits
    assert matrix.q.dtype == torch.uint8 and int(matrix.q.max()) < 2**bits
    assert torch.isfinite(matrix.scale).all() and (matrix.scale > 0).all()
    if matrix.zero is not None:
        assert int(matrix.zero.max()) <= 15


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_is_kept_exactly(bits: int) -> None:
    weight = normal(20, 128).abs() + 3  # all on one side: a grid that only spans them would miss zero
    weight[:, ::7] = 0
    back = quantize(weight, bits).dequantize()
    assert (back[:, ::7] == 0).all() and (back[:, 1] != 0).all()
    assert (quantize(torch.zeros(3, 64), bits).dequantize() == 0).all()


def test_the_4_bit_grid_spans_its_group() -> None:
    groups = normal(50, 3, 64)
    scale, zero = int4_grid(groups)
    low, high = ((end - zero.float()) * scale.float() for end in (0, 15))
    step = scale.float()
    assert (low <= groups.amin(-1) + step).all() and (high >= groups.amax(-1) - step).all()


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99))
def test_activations_are_within_half_a_step(rows: int, groups: int, group: int, seed: int) -> None:
    x = normal(rows, groups * group, seed=seed) * torch.logspace(-3, 3, rows)[:, None]
    x[0] = 0
    back = fake_quantize(x, group)
    top = x.view(rows, groups, group).abs().amax(-1, keepdim=True)
    assert ((back - x).view(rows, groups, group).abs() <= top / 253.9).all()
    assert (back[0] == 0).all()


# Packing


@settings(max_examples=60, deadline=None)
@given(problem=matrices())
def test_packing_keeps_every_number(problem: Any) -> None:
    weight, bits, group = problem
    matrix = quantize(weight, bits, group)
    layer = PackedWeight(*weight.shape, bits, group)
    layer.fill(matrix)
    back = layer.quantized()
    assert torch.equal(back.q, matrix.q) and torch.equal(back.scale, matrix.scale)
    assert (back.zero is None and matrix.zero is None) or torch.equal(back.zero, matrix.zero)
    chosen = torch.randint(len(weight), (5,), generator=torch.Generator().manual_seed(1))
    some = layer.quantized(chosen)
    assert torch.equal(some.dequantize(), matrix.dequantize()[chosen])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_of_the_bytes(bits: int) -> None:
    """As kernels/qmatmul.c reads them: 16 channels times four consecutive columns, in 4 bits eight."""
    q = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8)
    scale, zero = (torch.ones(32), None) if bits == 8 else (torch.ones(32, 1).half(), torch.zeros(32, 1).byte())
    layer = QuantLinear(32, 64, bits)
    layer.fill(Quantized(q, scale, zero, 64))
    for row, column in ((0, 0), (17, 5), (31, 63), (3, 36)):
        tile, lane = layer.weight[row // 16], row % 16
        if bits == 8:
            assert tile[column // 4 * 64 + lane * 4 + column % 4] == q[row, column]
        else:
            byte = int(tile[column // 8 * 64 + lane * 4 + column % 4])
            assert (byte >> 4 if column % 8 >= 4 else byte & 15) == q[row, column]


@pytest.mark.parametrize(("bits", "per_weight"), [(8, 1.0), (4, 0.5 + 3 / 64)])
def test_bytes_in_memory(bits: int, per_weight: float) -> None:
    layer = QuantLinear(2048, 2304, bits)
    scales = 4 * 2048 if bits == 8 else 0
    assert sum(b.nbytes for b in layer.buffers()) == 2048 * 2304 * per_weight + scales
    assert list(layer.parameters()) == []


# Products


@settings(max_examples=40, deadline=None)
@given(problem=matrices(), shape=st.sampled_from([(1,), (3,), (2, 4), (1, 1, 5)]))
def test_the_plain_product(problem: Any, shape: tuple[int, ...]) -> None:
    weight, bits, group = problem
    layer = packed(weight, bits, group)
    x = normal(*shape, weight.shape[1])
    padded = torch.zeros(*shape, layer.padded)
    padded[..., : weight.shape[1]] = x
    rounded = fake_quantize(padded.flatten(0, -2), group).view_as(padded)
    expected = linear(rounded.double(), quantize(weight, bits, group).dequantize().double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "library", lambda: None)
        got = layer(x)
    assert got.shape == (*shape, len(weight))
    assert relative_error(got.double(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = packed(normal(48, 64), 8, 64)
    x = normal(3, 64).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert relative_error(got.float(), layer(x.float())) < (1e-6 if dtype == torch.float32 else 0.005)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_embedding_and_its_head(bits: int) -> None:
    weight = normal(100, 40)
    layer = packed(weight, bits, 64, QuantEmbedding)
    ids = torch.tensor([[0, 99, 17], [17, 16, 15]])
    whole = quantize(weight, bits).dequantize()[:, :40]
    assert torch.equal(layer(ids), whole[ids])
    x = normal(2, 3, 40)
    assert layer.project(x).shape == (2, 3, 100)
    assert relative_error(layer.project(x), linear(x, whole)) < 0.02


def test_a_moved_layer_finds_its_weights_again() -> None:
    """The kernels are told where everything lies once; loading, or a move, puts it elsewhere."""
    layer, other = packed(normal(32, 64), 4, 64), packed(normal(32, 64, seed=1), 4, 64)
    x = normal(2, 64)
    before, expected = layer(x), other(x)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), expected) and not torch.equal(before, expected)


def test_float_layers_are_those_of_torch() -> None:
    layer = Linear(24, 10)
    x = normal(4, 24)
    assert torch.equal(layer(x), linear(x, layer.weight))
    assert torch.equal(float_linear(x.double(), layer.weight.double()), linear(x.double(), layer.weight.double()))


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from([(9,), (2, 3, 4), (63,), (64,), (65,), (3, 200), (1, 1025)]), seed=st.integers(0, 99))
def test_rows_of_bfloat16_are_those_of_float32_rounded(shape: tuple[int, ...], seed: int) -> None:
    x, weight = normal(*shape, 48, seed=seed).bfloat16(), normal(20, 48, seed=seed + 1).bfloat16()
    with torch.inference_mode():
        got = float_linear(x, weight)
    assert got.shape == (*shape, 20) and got.dtype == torch.bfloat16
    assert relative_error(got.float(), linear(x.float(), weight.float())) < 0.004


def test_torch_multiplies_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of rows are rounded up where oneDNN would write code for each, but never by much."""
    seen: list[int] = []
    monkeypatch.setattr(module, "linear", lambda x, weight: seen.append(x.numel() // 24) or linear(x, weight))
    weight = normal(10, 24).bfloat16()
    with torch.inference_mode():
        for rows in range(9, 1025):
            assert len(float_linear(normal(rows, 24).bfloat16(), weight)) == rows
            assert 0 <= seen[-1] - rows < max(16, rows / 16 + 1)
    assert len(set(seen)) == 48
    x, learnt = normal(9, 24).bfloat16(), weight.clone().requires_grad_()
    float_linear(x, learnt)  # training has batches of one shape
    with torch.inference_mode():
        float_linear(x.float(), weight.float())  # and MKL writes no code
    assert seen[-2:] == [9, 9]
