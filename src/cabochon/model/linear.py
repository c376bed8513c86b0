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
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from cabochon.model.kernels.native import LANES, floats, library, usable

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
    """The embedding, whose matrix the output head shares through `project`."""

    def project(self, x: Tensor) -> Tensor:
        """[..., K] times the transposed matrix: [..., N]."""
        return float_linear(x, self.weight)


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transposed weight [N, K], in x's dtype."""
    (n, k), rows = weight.shape, x.numel() // x.shape[-1]
    few = rows <= FEW_ROWS and weight.dtype is torch.bfloat16 and x.dtype is torch.bfloat16
    native = usable(x, weight) if few and n % 4 == 0 and k % LANES == 0 else None
    if native is None:
        return linear(x, weight)
    out = x.new_empty(*x.shape[:-1], n)
    native.cabochon_bf16_linear(floats(x), weight.data_ptr(), floats(out), rows, n, k)
    return out


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

    def project(self, x: Tensor) -> Tensor:
        """x [..., K] times the transposed matrix: [..., N], in x's dtype."""
        flat = x.reshape(-1, self.columns).float()
        if self.padded > self.columns:
            flat = pad(flat, (0, self.padded - self.columns))
        native = library()
        if native is None or x.device.type != "cpu":
            out = self._plain(flat)
        else:
            flat, out = flat.contiguous(), flat.new_empty(len(flat), self.rows)
            if native.cabochon_qlinear(self._description(), flat.data_ptr(), len(flat), out.data_ptr()):
                raise MemoryError(f"no memory for {len(flat)} rows of activations")
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def _plain(self, flat: Tensor) -> Tensor:
        """The same product in torch: the kernels' twin, and what computes without them. A slice of rows at a time."""
        activations = fake_quantize(flat, self.group)
        step = max(LANES, 2**22 // self.padded)
        parts = (slice(start, start + step) for start in range(0, self.rows, step))
        return torch.cat([linear(activations, self.quantized(part).dequantize()) for part in parts], dim=1)

    def _description(self) -> int:
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


def fake_quantize(x: Tensor, group: int) -> Tensor:
    """Activations [M, K] rounded to int8 with a scale for each row and group, as float32 again."""
    grouped = x.float().view(len(x), -1, group)
    top = grouped.abs().amax(-1, keepdim=True)
    factor = torch.where(top > 0, 127 / top, 0)
    return (torch.round(grouped * factor) * (top / 127)).view_as(x)
