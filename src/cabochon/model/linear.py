"""Linear layers over float, int8 and int4 weights: the only place that knows how quantised weights are packed.

    float  bfloat16 or float32 as stored; a few rows of bfloat16 by our own kernel, at the speed of memory
    int8   one scale for each output channel, symmetric
    int4   a float16 scale and a zero point for each group of input channels

Activations are quantised as well, on the fly: int8 with a scale for each row and group. A product is then a sum of
integers inside a group, which is exact in any order, and groups are added first to last. So a row's result has the
same bits however many rows are computed together (`kernels/qmatmul.c`).

Dimension letters: N output channels, K input channels, G = K / group. Packed weights come in tiles of 16 output
channels, N and K padded with zeros to whole tiles and groups.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from cabochon.model.kernels import cuda
from cabochon.model.kernels.losses import large
from cabochon.model.kernels.native import LANES, Floats, floats, library, usable

GROUP = 64
BITS = (8, 4)
FEW_ROWS = 8  # up to here reading bfloat16 weights takes longer than multiplying by them


class Linear(nn.Linear):
    """A linear layer without a bias over float weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return float_linear(x, self.weight)


class Embedding(nn.Embedding):
    """The embedding, whose matrix the output head shares through `project`.

    Attributes:
        looked_up: while it is a list, a backward pass appends ids [N] and the gradients [N, K] of what was looked up,
            and the matrix gets no gradient from that: whoever made the list adds them (`train/lookups.py`).
    """

    looked_up: "list[tuple[Tensor, Tensor]] | None" = None

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., K]."""
        if self.looked_up is None or not torch.is_grad_enabled():
            return super().forward(ids)
        out: Tensor = _Lookup.apply(ids, self.weight, self.looked_up)  # type: ignore[no-untyped-call]
        return out

    def project(self, x: Tensor) -> Tensor:
        """[..., K] times the transposed matrix: [..., N]."""
        return float_linear(x, self.weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, looked_up: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows of the weight."""
        ctx.ids, ctx.looked_up = ids, looked_up
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """Notes the rows' gradients."""
        ctx.looked_up.append((ctx.ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transposed weight [N, K], in x's dtype."""
    (n, k), rows = weight.shape, x.numel() // x.shape[-1]
    if rows == 1 and x.dtype is weight.dtype and cuda.usable(x, weight):
        from cabochon.model.kernels.cuda.rows import float_row

        return float_row(x, [weight]).view(*x.shape[:-1], n)
    few = rows <= FEW_ROWS and weight.dtype is torch.bfloat16 and x.dtype is torch.bfloat16
    native = usable(x, weight) if few and n % 4 == 0 and k % LANES == 0 else None
    if native is None:
        return _in_round_numbers(x, weight)
    out = x.new_empty(*x.shape[:-1], n)
    native.cabochon_bf16_linear(floats(x), weight.data_ptr(), floats(out), rows, n, k)
    return out


def _in_round_numbers(x: Tensor, weight: Tensor) -> Tensor:
    """The same by torch: for 16-bit floats on a CPU with rows of zeros added, up to one of few numbers of rows.

    There oneDNN writes machine code for each shape that it meets: half a MB and a millisecond, again and again where
    every step of an engine has another number of rows. At most 15 rows are added, or one for every 16.
    """
    rows = x.numel() // x.shape[-1]
    added = -rows % max(16, 1 << max(0, rows.bit_length() - 5))
    if not added or x.is_cuda or x.element_size() != 2 or torch.is_grad_enabled():
        return linear(x, weight)
    padded = pad(x.reshape(rows, -1), (0, 0, 0, added))
    return linear(padded, weight)[:rows].view(*x.shape[:-1], len(weight))


class _QWeight(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("half", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] as whole numbers q and what turns them back: (q - zero) * scale.

    q uint8 [N, K]; int8: zero is 128 everywhere (None), scale float32 [N]; int4: scale float16 and zero uint8 [N, G].
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.zero is None else 4

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        if self.zero is None:
            return (self.q.float() - 128) * self.scale[:, None]
        grouped = self.q.float().view(len(self.q), -1, self.group) - self.zero.float()[..., None]
        return (grouped * self.scale.float()[..., None]).view_as(self.q)


def quantize(weight: Tensor, bits: int, group: int = GROUP) -> Quantized:
    """Round a matrix [N, K] to the nearest int8 or int4 values; K is padded with zeros to whole groups."""
    weight = pad(weight.float(), (0, -weight.shape[1] % group))
    if bits == 8:
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        return Quantized((torch.round(weight / scale[:, None]) + 128).to(torch.uint8), scale, None, group)
    scale, zero = int4_grid(weight.view(len(weight), -1, group))
    q = torch.round(weight.view(*scale.shape, group) / scale.float()[..., None]) + zero[..., None]
    return Quantized(q.clamp(0, 15).to(torch.uint8).view_as(weight), scale, zero, group)


def int4_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale float16 and zero point uint8 [...] for groups float32 [..., group]; 0 itself is always on the grid."""
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-7).half()
    return scale, torch.round(-low / scale.float()).clamp(0, 15).to(torch.uint8)


class PackedWeight(nn.Module):
    """A quantised matrix in the layout of the kernels; base of the two layers below.

    Args:
        rows, columns: N and K of the matrix as the model knows it.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    method = "rtn"  # how the weights were rounded, a note that is saved with them
    exact = False  # multiply as floats, with activations as they are: for training beside it

    def __init__(self, rows: int, columns: int, bits: int, group: int = GROUP) -> None:
        super().__init__()
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.padded = columns + -columns % group
        tiles, groups = -(-rows // LANES), self.padded // group
        self.register_buffer("weight", torch.empty(tiles, LANES * self.padded * bits // 8, dtype=torch.uint8))
        shape, dtype = ((tiles, LANES), torch.float32) if bits == 8 else ((tiles, groups, LANES), torch.float16)
        self.register_buffer("scale", torch.empty(shape, dtype=dtype))
        zero = torch.empty(tiles, groups, LANES, dtype=torch.uint8) if bits == 4 else None
        self.register_buffer("zero", zero)
        self._described: _QWeight | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Go where the model goes, but keep the types of packed values when it is cast."""

        def moved(values: Tensor) -> Tensor:
            new = fn(values)
            return new if new.dtype is values.dtype else values.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Copies describe themselves to the kernels anew."""
        return self.__dict__ | {"_described": None}

    def fill(self, matrix: Quantized) -> None:
        """Take the values of a quantised matrix [rows, padded]."""
        more = -self.rows % LANES
        q = pad(matrix.q, (0, 0, 0, more)).view(-1, LANES, self.padded)
        if matrix.zero is None:
            self.scale = pad(matrix.scale, (0, more)).view(-1, LANES)
            self.weight = q.unflatten(2, (-1, 4)).transpose(1, 2).flatten(1)
            return
        halves = q.unflatten(2, (-1, 2, 4))
        both = halves[..., 0, :] | (halves[..., 1, :] << 4)  # [tiles, 16, K / 8, 4]
        self.weight = both.transpose(1, 2).flatten(1)
        scale, zero = (pad(t, (0, 0, 0, more)).unflatten(0, (-1, LANES)) for t in (matrix.scale, matrix.zero))
        self.scale, self.zero = scale.transpose(1, 2).contiguous(), zero.transpose(1, 2).contiguous()

    def quantized(self, rows: Tensor | slice = slice(None)) -> Quantized:
        """The whole numbers of some rows (int64 [R]), or of all."""
        if isinstance(rows, slice):
            rows = torch.arange(self.rows, device=self.weight.device)[rows]
        tile, lane = rows // LANES, rows % LANES
        packed = self.weight.view(len(self.weight), -1, LANES, 4)[tile, :, lane]  # [R, K / (32 / bits), 4]
        if self.zero is None:
            return Quantized(packed.flatten(1), self.scale[tile, lane], None, self.group)
        q = torch.stack([packed & 15, packed >> 4], dim=2)
        return Quantized(q.flatten(1), self.scale[tile, :, lane], self.zero[tile, :, lane], self.group)

    def dequantized(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Some rows of the matrix, or all, as floats [n, columns]. `rows` begins at a multiple of 16."""
        start, stop, _ = rows.indices(self.rows)
        if cuda.usable(torch.empty(0, dtype=dtype, device=self.weight.device)):
            from cabochon.model.kernels.cuda.packed import unpacked

            return unpacked(self, dtype, start // LANES, stop - start)[:, : self.columns]
        out = torch.empty(stop - start, self.columns, dtype=dtype, device=self.weight.device)
        native, known = library(), dtype is torch.float32 or dtype is torch.bfloat16
        if native is None or out.device.type != "cpu" or not known:
            step = max(LANES, 2**22 // self.padded)
            for first in range(start, stop, step):
                part = self.quantized(slice(first, min(first + step, stop)))
                out[first - start : first - start + step] = part.dequantize()[:, : self.columns]
        else:
            native.cabochon_dequantize(self.description(), floats(large(out)), self.columns, start, stop)
        return out

    def project(self, x: Tensor) -> Tensor:
        """x [..., K] times the transposed matrix: [..., N], in x's dtype.

        The gradient of x is that of the product with floats, as if activations had not been rounded.
        """
        if self.exact:
            return frozen_product(x, self)
        return _product(x, self) if torch.is_grad_enabled() and x.requires_grad else self.rounded_product(x)

    def rounded_product(self, x: Tensor) -> Tensor:
        """The product with activations rounded to int8, by the kernels where there are some; without a gradient."""
        return rounded_products(x, [self])[0]

    def plain_product(self, flat: Tensor) -> Tensor:
        """The same product in torch: the kernels' twin, and what computes without them. A slice of rows at a time."""
        activations = fake_quantize(flat, self.group)
        step = max(LANES, 2**22 // self.padded)
        parts = (slice(start, start + step) for start in range(0, self.rows, step))
        return torch.cat([linear(activations, self.quantized(part).dequantize()) for part in parts], dim=1)

    def description(self) -> int:
        """The address of what tells the kernels where everything is. Made once: buffers seldom move."""
        if self._described is None or self._described.weight != self.weight.data_ptr():
            where = self.scale.data_ptr()
            self._described = _QWeight(
                self.weight.data_ptr(),
                where if self.zero is None else None,
                where if self.zero is not None else None,
                None if self.zero is None else self.zero.data_ptr(),
                self.rows, self.padded, self.group, self.bits,
            )  # fmt: skip
        return ctypes.addressof(self._described)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.rows} x {self.columns}, int{self.bits}, groups of {self.group}"


class QuantLinear(PackedWeight):
    """A linear layer without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.project(x)


class QuantEmbedding(PackedWeight):
    """The embedding over quantised weights; `project` is the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., K]."""
        return self.quantized(ids.flatten()).dequantize()[:, : self.columns].view(*ids.shape, -1)


def rounded_products(x: Tensor, layers: Sequence[PackedWeight]) -> list[Tensor]:
    """x [..., K], rounded to int8 once, times each of some matrices of one width, group and number of bits."""
    first, kept = layers[0], x.dtype
    if x.dtype is not torch.bfloat16 or cuda.usable(x):
        x = x.float()
    flat = x.reshape(-1, first.columns)
    if first.padded > first.columns:
        flat = pad(flat, (0, first.padded - first.columns))
    native = library()
    if cuda.usable(flat):
        outs = [_product_on_gpu(flat, layer) for layer in layers]
    elif native is None or x.device.type != "cpu":
        outs = [layer.plain_product(flat.float()) for layer in layers]
    else:
        flat, outs = flat.contiguous(), [flat.new_empty(len(flat), layer.rows) for layer in layers]
        where = (ctypes.c_void_p * len(layers))(*[layer.description() for layer in layers])
        to = (Floats * len(layers))(*[floats(out) for out in outs])
        if native.cabochon_qlinear(where, len(layers), floats(flat), len(flat), to):
            raise MemoryError(f"no memory for {len(flat)} rows of activations")
    return [out.view(*x.shape[:-1], -1).to(kept) for out in outs]


def frozen_product(x: Tensor, base: Linear | PackedWeight) -> Tensor:
    """x [..., K] times a transposed matrix that does not learn: [..., N], in x's type, or in autocast's.

    A quantised matrix counts as what it stands for (QLoRA, arXiv 2305.14314), so that the gradient of x is that of what
    was computed. It is made anew on the way back: nothing of its size is kept.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(base, Linear) and base.weight.dtype is x.dtype:
        return float_linear(x, base.weight)
    return _product(x, base)


def _product(x: Tensor, base: Linear | PackedWeight) -> Tensor:
    out: Tensor = _FrozenProduct.apply(x, base)  # type: ignore[no-untyped-call]
    return out


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Linear | PackedWeight) -> Tensor:
        """The product."""
        ctx.base = base
        if isinstance(base, PackedWeight) and not base.exact:
            return base.rounded_product(x)
        return linear(x, matrix(base, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        return gradient @ matrix(ctx.base, gradient.dtype), None


def matrix(layer: Linear | PackedWeight, dtype: torch.dtype) -> Tensor:
    """The whole matrix [N, K] of a layer as floats, without a gradient."""
    return layer.dequantized(dtype) if isinstance(layer, PackedWeight) else layer.weight.detach().to(dtype)


def matrix_shape(layer: Linear | PackedWeight) -> tuple[int, int]:
    """N, K."""
    return (layer.rows, layer.columns) if isinstance(layer, PackedWeight) else (layer.out_features, layer.in_features)


def _product_on_gpu(flat: Tensor, matrix: PackedWeight) -> Tensor:
    """float32 [M, N] of rows [M, padded], which are not rounded to int8: there, sums of floats cost nothing more."""
    from cabochon.model.kernels.cuda import packed, rows

    return rows.packed_row(flat, [matrix])[None] if len(flat) == 1 else packed.product(flat, matrix)


def fake_quantize(x: Tensor, group: int) -> Tensor:
    """Activations [M, K] rounded to int8 with a scale for each row and group, as float32 again."""
    grouped = x.float().view(len(x), -1, group)
    top = grouped.abs().amax(-1, keepdim=True)
    factor = torch.where(top > 0, torch.full_like(top, 127) / top, 0)  # 127 / top would be 127 times the reciprocal
    return (torch.round(grouped * factor) * (top / 127)).view_as(x)
