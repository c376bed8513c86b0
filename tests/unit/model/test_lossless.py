"""bfloat16 weights in 12 bits: every bit comes back, and products are those of the weights."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.model import lossless
from cabochon.model.kernels.native import library
from cabochon.model.lossless import FEW_ROWS, LosslessEmbedding, LosslessLinear, high_bytes, pack

SHAPES = [(5, 128), (64, 256), (101, 2304), (7, 200), (1, 1)]


def matrix(n: int, k: int) -> Tensor:
    """Rows of very different size, with both zeros, a whole row of them, and values that no table covers."""
    draw = torch.Generator().manual_seed(n * k)
    values = torch.randn(n, k, generator=draw) * torch.exp(2 * torch.randn(n, 1, generator=draw))
    values[0, 0], values[n // 2], values[-1, -1] = 1e-30, 0.0, -0.0
    return values.bfloat16()


def filled(kind: type[LosslessLinear] | type[LosslessEmbedding], values: Tensor) -> LosslessLinear | LosslessEmbedding:
    layer = kind(*values.shape)
    layer.fill(values.split(4), high_bytes(values))
    return layer


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_bit_comes_back(n: int, k: int) -> None:
    values = matrix(n, k)
    layer = filled(LosslessEmbedding, values)
    ids = torch.randint(n, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(layer(ids)), bits(values[ids]))
    assert torch.equal(bits(layer._plain(ids.flatten())), bits(values[ids.flatten()]))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_equals_its_plain_twin(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = matrix(n, k)
    padded, table = pad(values, (0, -k % lossless.BLOCK)), high_bytes(values)
    packed = [torch.empty(len(padded), padded.shape[1] // 128, 192, dtype=torch.uint8) for _ in range(2)]
    fast = (packed[0], *pack(padded, table, packed[0]))
    monkeypatch.setattr(lossless, "library", lambda: None)
    plain = (packed[1], *pack(padded, table, packed[1]))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(fast, plain, strict=True))


def test_a_quarter_is_saved_and_exceptions_are_few() -> None:
    values = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = filled(LosslessLinear, values)
    assert layer.weight.nbytes == 0.75 * values.nbytes
    assert 0 < len(layer.column) < 2e-3 * values.numel()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_are_those_of_the_weights(n: int, k: int, rows: int) -> None:
    values = matrix(n, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()
    with torch.inference_mode():
        out = filled(LosslessLinear, values)(x)
    exact = x.double() @ values.double().T
    # One rounding to bfloat16 at the end, float32 sums before it.
    size = x.double().abs() @ values.double().abs().T
    assert out.dtype is torch.bfloat16
    assert bool(((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * size + 1e-37).all())


@pytest.mark.skipif(library() is None, reason="needs the compiled kernels: install with a C compiler")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer = filled(LosslessLinear, matrix(101, 2304))
    x = torch.randn(FEW_ROWS, 2304, generator=torch.Generator().manual_seed(3)).bfloat16()
    native = library()
    if native is None or not native.cabochon_has_bf16():
        pytest.skip("this processor has no AVX512-BF16")
    with torch.inference_mode():
        together = layer(x)
        assert all(torch.equal(layer(x[i : i + 1])[0], together[i]) for i in range(FEW_ROWS))
