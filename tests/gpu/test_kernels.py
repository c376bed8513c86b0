"""The kernels for CUDA against their plain twins, computed in float32 or float64 on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from cabochon.model.attention import plain
from cabochon.model.gemma2 import rotary
from cabochon.model.kernels import cuda
from cabochon.model.linear import QuantLinear, quantize
from cabochon.model.proof import failures
from cabochon.model.visibility import Visibility

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# bfloat16 has 8 bits: two results differ by a step at most, and the interpreter cuts off where a GPU rounds.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def inference() -> Any:
    """As the engine runs."""
    with torch.inference_mode():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(ours: Tensor, expected: Tensor) -> float:
    """Length of the difference as a share of the expected length."""
    assert torch.isfinite(ours).all()
    return float((ours.double().cpu() - expected.double()).norm() / expected.double().norm())


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normed * (1 + weight.float())).type_as(x)


# Between the products


@DTYPES
@pytest.mark.parametrize("size", [40, 2304, 3584])
def test_norms(device: str, dtype: torch.dtype, size: int) -> None:
    from cabochon.model.kernels.cuda import elementwise as kernels

    x, update = (normal(2, 3, size, seed=i, dtype=dtype) for i in (1, 2))
    weight, following = (0.3 * normal(size, seed=i, dtype=dtype) for i in (3, 4))
    there = [t.to(device) for t in (x, update, weight, following)]
    assert error(kernels.rms_norm(there[0], there[2], 1e-6), norm(x, weight)) < LIMIT[dtype]
    expected = x + norm(update, weight)
    assert error(kernels.add_norm(*there[:3], 1e-6), expected) < LIMIT[dtype]
    total, normed = kernels.add_norm_norm(*there, 1e-6)
    assert error(total, expected) < LIMIT[dtype]
    assert error(normed, norm(expected, following)) < 2 * LIMIT[dtype]


@DTYPES
def test_rotation(device: str, dtype: torch.dtype) -> None:
    from cabochon.model.kernels.cuda import elementwise as kernels

    x, rotation = normal(2, 3, 4, 12, dtype=dtype), rotary(torch.arange(6).view(2, 3) * 700, 12, 10_000.0)
    a, b = x.double().chunk(2, dim=-1)
    cos, sin = (t.double() for t in rotation)
    expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    found = kernels.rotated(x.clone().to(device), *(t.to(device) for t in rotation))
    assert error(found, expected) < LIMIT[dtype]


@DTYPES
def test_gelu_and_cap(device: str, dtype: torch.dtype) -> None:
    from cabochon.model.kernels.cuda import elementwise as kernels

    gate, up = 3 * normal(3000, seed=1, dtype=dtype), normal(3000, seed=2, dtype=dtype)
    expected = gelu(gate.double(), approximate="tanh") * up.double()
    assert error(kernels.gelu_times(gate.to(device), up.to(device)), expected) < 1.5 * LIMIT[dtype]
    for size in (1e-3, 1.0, 100.0):
        x = size * gate
        assert error(kernels.capped(x.to(device), 5.0), torch.tanh(x.double() / 5) * 5) < 1e-4
    assert torch.equal(kernels.capped(gate.to(device), None).cpu(), gate.float())


# Products of a row


@DTYPES
@pytest.mark.parametrize("columns", [304, 4608])  # in one piece and in several
def test_a_row_times_float_matrices(device: str, dtype: torch.dtype, columns: int) -> None:
    from cabochon.model.kernels.cuda.rows import float_row

    x, matrices = normal(columns, dtype=dtype), [normal(n, columns, seed=n, dtype=dtype) for n in (37, 10, 11)]
    there = [m.to(device) for m in matrices]
    expected = [m.double() @ x.double() for m in matrices]
    assert error(float_row(x.to(device), there), torch.cat(expected)) < LIMIT[dtype]
    assert error(float_row(x.to(device), there[:1]), expected[0]) < LIMIT[dtype]
    pair = [there[0], there[0].flip(0).contiguous()]
    both = gelu(expected[0], approximate="tanh") * expected[0].flip(0)
    assert error(float_row(x.to(device), pair, gated=True), both) < 2 * LIMIT[dtype]


def layers(bits: int, group: int, columns: int, device: str) -> tuple[list[QuantLinear], list[Tensor]]:
    """Packed layers of several sizes, and what their weights stand for."""
    packed = []
    for rows in (50, 32, 7):
        layer = QuantLinear(rows, columns, bits, group)
        layer.fill(quantize(normal(rows, columns, seed=rows), bits, group))
        packed.append(layer)
    stand_for = [layer.quantized().dequantize()[:, :columns].double() for layer in packed]
    return [layer.to(device) for layer in packed], stand_for


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_row_times_packed_matrices(device: str, bits: int, group: int) -> None:
    """Nothing is rounded: float32 sums of what the weights stand for."""
    from cabochon.model.kernels.cuda.rows import packed_row

    columns = 11 * group
    packed, matrices = layers(bits, group, columns, device)
    x = normal(columns)
    expected = [m @ x.double() for m in matrices]
    assert error(packed_row(x.to(device), packed), torch.cat(expected)) < 1e-6
    both = gelu(expected[0], approximate="tanh") * expected[0]
    assert error(packed_row(x.to(device), [packed[0], packed[0]], gated=True), both) < 2e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [2, 16, 40, 70])
def test_rows_times_packed_matrices(device: str, bits: int, group: int, rows: int) -> None:
    """Activations are rounded to bfloat16, and with many rows also the values of 4 bits."""
    packed, matrices = layers(bits, group, 5 * group + 8, device)  # not whole groups
    x = normal(rows, 5 * group + 8)
    for layer, matrix in zip(packed, matrices, strict=True):
        assert error(layer(x.to(device)), linear(x.bfloat16().double(), matrix)) < (2e-6 if rows <= 64 else 6e-3)
        assert error(layer(x[:1].to(device)), linear(x[:1].double(), matrix)) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_unpacking(device: str, bits: int) -> None:
    packed, matrices = layers(bits, 64, 200, device)
    for layer, matrix in zip(packed, matrices, strict=True):
        assert torch.equal(layer.dequantized(torch.float32).cpu().double(), matrix)
        part = layer.dequantized(torch.bfloat16, slice(16, 41))
        assert error(part, matrix[16:41]) < 8e-3 if len(matrix) > 16 else part.numel() == 0


# Attention


@DTYPES
def test_attention_proves_itself(device: str, dtype: torch.dtype) -> None:
    from cabochon.model.kernels.cuda.attend import as_backend, prove

    prove(torch.device(device), dtype, dtype)
    assert failures(as_backend, device, dtype, whole_texts_only=True) == []


CASES = [  # key-value heads, group, head size, texts, keys, queries, window, cap
    (1, 1, 16, 1, 1, 1, None, 50.0),
    (2, 2, 16, 2, 150, 150, None, 50.0),
    (2, 2, 32, 1, 150, 150, 7, 3.0),
    (1, 3, 12, 2, 70, 70, 64, None),
    (3, 2, 48, 2, 300, 1, None, 3.0),
    (2, 1, 64, 1, 300, 5, 40, 50.0),
    (1, 4, 256, 1, 90, 90, 33, 50.0),
]


@DTYPES
@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(
    device: str, dtype: torch.dtype, splits: int, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cabochon.model.kernels.cuda import attend

    monkeypatch.setattr(attend, "_splits", lambda *_: splits)
    kv_heads, group, size, texts, keys, queries, window, cap = case
    q = 3 * normal(texts, kv_heads * group, queries, size, seed=1, dtype=dtype)
    k, v = (normal(texts, kv_heads, keys, size, seed=seed, dtype=dtype) for seed in (2, 3))
    positions = torch.arange(keys).expand(texts, keys)
    expected = plain(
        q.double(), k.double(), v.double(), Visibility(positions[:, -queries:], positions, window), 0.3, cap
    )
    there = positions.to(device)
    visible = Visibility(there[:, -queries:], there, window)
    found = attend.as_backend(q.to(device), k.to(device), v.to(device), visible, 0.3, cap)
    assert error(found, expected) < (3e-6 if dtype is torch.float32 else 2e-2)


@DTYPES
def test_keys_go_where_they_belong(device: str, dtype: torch.dtype) -> None:
    from cabochon.model.kernels.cuda import attend

    q, k, v = (normal(3, heads, 12, seed=i, dtype=dtype).to(device) for i, heads in enumerate((4, 2, 2)))
    pages, offsets = torch.tensor([4, 0, 4], device=device), torch.tensor([7, 31, 0], device=device)
    kept = [torch.zeros(5, 2, 32, 12, dtype=dtype, device=device) for _ in range(4)]
    attend.store(k, v, kept[0], kept[1], pages, offsets)
    assert torch.equal(kept[0][pages, :, offsets], k) and torch.equal(kept[1][pages, :, offsets], v)
    assert kept[0].count_nonzero() == k.count_nonzero()

    rotation = [t.to(device) for t in rotary(torch.arange(3)[None], 12, 10_000.0)]
    turned = [cuda_rotated(part, rotation) for part in (q, k)]
    attend.rotate_and_store(q, k, v, *rotation, kept[2], kept[3], pages, offsets)
    assert torch.equal(q, turned[0]) and torch.equal(kept[2][pages, :, offsets], turned[1])
    assert torch.equal(kept[3], kept[1])


def cuda_rotated(x: Tensor, rotation: list[Tensor]) -> Tensor:
    from cabochon.model.kernels.cuda import elementwise

    return elementwise.rotated(x[None].clone(), *rotation)[0]


def test_tensors_that_the_kernels_refuse(device: str) -> None:
    dense = torch.zeros(4, 4, device=device)
    assert cuda.usable(dense)
    assert not cuda.usable(dense, dense.T)
    assert not cuda.usable(dense.double())
    with torch.inference_mode(False), torch.enable_grad():
        assert not cuda.usable(dense)
