"""bfloat16 weights in 12 bits each, without loss: the same model in three quarters of the memory.

Decoding reads every weight for every token, so a quarter less to read makes it faster by a third. The high byte of a
bfloat16, its sign and most of its exponent, takes few values among the weights of a matrix (DFloat11, arXiv 2504.11651,
makes use of the same): four bits choose from a table of 16, and the low byte stays as it is. Weights that the table
does not cover are kept in a list, so that unpacking gives back every bit. The layout is that of `kernels/lossless.c`.

N output channels, K input channels, padded with zeros to whole blocks of 128.
"""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from cabochon.model.kernels.native import floats, library

BLOCK = 128
CHOICES = 16  # high bytes in a table
SAMPLE = 2**20  # weights whose high bytes are counted for it
FEW_ROWS = 64  # up to here multiplying packed weights is faster than unpacking them (measured, 9216 x 2304)
NOT_IN_TABLE = 255


class _Lossless(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "table", "start", "column", "value")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
    )


class LosslessWeight(nn.Module):
    """A bfloat16 matrix [rows, columns] in 12 bits; base of the two layers below."""

    weight: Tensor  # uint8 [N, K / 128, 192]
    table: Tensor  # uint8 [16], the first 0
    start: Tensor  # int32 [N + 1]
    column: Tensor  # int32 [exceptions]
    value: Tensor  # bfloat16 [exceptions]

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.padded = rows, columns, columns + -columns % BLOCK
        self.register_buffer("weight", torch.empty(rows, self.padded // BLOCK, BLOCK * 3 // 2, dtype=torch.uint8))
        self.register_buffer("table", torch.zeros(CHOICES, dtype=torch.uint8))
        self.register_buffer("start", torch.zeros(rows + 1, dtype=torch.int32))
        self.register_buffer("column", torch.empty(0, dtype=torch.int32))
        self.register_buffer("value", torch.empty(0, dtype=torch.bfloat16))
        self._described: _Lossless | None = None

    def fill(self, pieces: Iterable[Tensor], table: Tensor) -> None:
        """Take the values of a matrix, given as pieces of its rows, bfloat16 [n, columns]; see `high_bytes`."""
        self.table = table
        done, columns, values = 0, [], []
        for piece in pieces:
            end = done + len(piece)
            counts, column, value = pack(self._whole_blocks(piece), table, self.weight[done:end])
            self.start[done + 1 : end + 1] = counts
            columns.append(column)
            values.append(value)
            done = end
        assert done == self.rows
        self.start = self.start.cumsum(0, dtype=torch.int32)
        self.column, self.value = torch.cat(columns), torch.cat(values)

    def unpacked(self, rows: Tensor) -> Tensor:
        """Some rows (int64 [R]) as bfloat16 [R, columns], bit for bit."""
        native = library()
        if native is None or self.weight.device.type != "cpu":
            return self._plain(rows)
        out, rows = torch.empty(len(rows), self.padded, dtype=torch.bfloat16), rows.contiguous()
        native.cabochon_lossless_unpack(self._description(), rows.data_ptr(), len(rows), out.data_ptr())
        return out[:, : self.columns]

    def _plain(self, rows: Tensor) -> Tensor:
        """The kernel's twin."""
        low, choices = self.weight[rows].split([BLOCK, BLOCK // 2], dim=-1)
        high = self.table[torch.cat([choices & 15, choices >> 4], dim=-1).int()]
        bits = _from_layout(low).int() | _from_layout(high).int() << 8
        out = bits.to(torch.int16).view(torch.bfloat16).flatten(1)
        first, counts = self.start[rows].long(), (self.start[rows + 1] - self.start[rows]).long()
        offsets = torch.arange(int(counts.sum()), device=out.device) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        entries = first.repeat_interleave(counts) + offsets
        which = torch.arange(len(rows), device=out.device).repeat_interleave(counts)
        out[which, self.column[entries].long()] = self.value[entries]
        return out[:, : self.columns]

    def project(self, x: Tensor) -> Tensor:
        """x [..., K] times the transposed matrix: [..., N], in x's dtype."""
        flat = x.reshape(-1, self.columns)
        native = library()
        fast = native is not None and x.device.type == "cpu" and x.dtype is torch.bfloat16
        if native is not None and fast and len(flat) <= FEW_ROWS and native.cabochon_has_bf16():
            flat = self._whole_blocks(flat).contiguous()
            out = flat.new_empty(len(flat), self.rows)
            native.cabochon_lossless_linear(self._description(), flat.data_ptr(), floats(out), len(flat))
        else:
            out = self._by_unpacking(flat)
        return out.view(*x.shape[:-1], self.rows)

    def _whole_blocks(self, rows: Tensor) -> Tensor:
        """[n, columns] with zeros behind, if need be."""
        return pad(rows, (0, self.padded - self.columns)) if self.padded > self.columns else rows

    def _by_unpacking(self, flat: Tensor) -> Tensor:
        """A slice of rows at a time, so that all of the matrix is never unpacked."""
        out = flat.new_empty(len(flat), self.rows)
        step = max(1, 2**23 // self.padded)
        for start in range(0, self.rows, step):
            rows = torch.arange(start, min(start + step, self.rows), device=flat.device)
            out[:, start : start + step] = linear(flat, self.unpacked(rows).to(flat.dtype))
        return out

    def _description(self) -> int:
        """The address of what tells the kernels where everything is. Made once: buffers seldom move."""
        if self._described is None or self._described.weight != self.weight.data_ptr():
            tensors = (self.weight, self.table, self.start, self.column, self.value)
            self._described = _Lossless(*(t.data_ptr() for t in tensors), self.rows, self.padded)
        return ctypes.addressof(self._described)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.rows} x {self.columns}, bfloat16 in 12 bits, {len(self.column)} exceptions"


class LosslessLinear(LosslessWeight):
    """A linear layer without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.project(x)


class LosslessEmbedding(LosslessWeight):
    """The embedding; `project` is the output head."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> bfloat16 [..., K]."""
        return self.unpacked(ids.flatten()).view(*ids.shape, self.columns)


def high_bytes(matrix: Tensor) -> Tensor:
    """The table for a bfloat16 matrix [N, K]: 0, then the most frequent high bytes of a sample of rows."""
    step = max(1, matrix.numel() // SAMPLE)
    high = matrix[::step].contiguous().view(torch.uint8).view(-1, 2)[:, 1]
    counts = torch.bincount(high.int(), minlength=256)
    counts[0] = 0  # is there anyway
    return torch.cat([torch.zeros(1, dtype=torch.uint8), counts.topk(CHOICES - 1).indices.to(torch.uint8)])


def pack(matrix: Tensor, table: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack a bfloat16 matrix [n, K] into `out`, uint8 [n, K / 128, 192], contiguous.

    Returns:
        exceptions of each row int32 [n], their columns int32 and values bfloat16.
    """
    choice = torch.full((256,), NOT_IN_TABLE, dtype=torch.uint8)
    choice[table.long().flip(0)] = torch.arange(CHOICES, dtype=torch.uint8).flip(0)  # the first where one stands twice
    native = library()
    if native is None:
        return _pack_plain(matrix, choice, out)
    matrix, (n, k) = matrix.contiguous(), matrix.shape
    counts = torch.empty(n, dtype=torch.int32)
    table, source = table.contiguous(), matrix.data_ptr()
    native.cabochon_lossless_pack(source, table.data_ptr(), out.data_ptr(), counts.data_ptr(), n, k)
    start = pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    column, value = torch.empty(int(start[-1]), dtype=torch.int32), torch.empty(int(start[-1]), dtype=torch.bfloat16)
    tables = (choice.data_ptr(), start.data_ptr())
    native.cabochon_lossless_exceptions(source, *tables, column.data_ptr(), value.data_ptr(), n, k)
    return counts, column, value


def _pack_plain(matrix: Tensor, choice: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' twin."""
    n, k = matrix.shape
    low, high = matrix.contiguous().view(torch.uint8).view(n, k, 2).unbind(-1)
    chosen = choice[high.int()]
    lacking = chosen == NOT_IN_TABLE
    row, column = lacking.nonzero(as_tuple=True)
    low, chosen = (_to_layout(torch.where(lacking, 0, t)) for t in (low, chosen))
    both = chosen[..., :64] | chosen[..., 64:] << 4
    out.copy_(torch.cat([low, both], dim=-1))
    return lacking.sum(1, dtype=torch.int32), column.int(), matrix[row, column]


def _to_layout(values: Tensor) -> Tensor:
    """[n, K] -> [n, K / 128, 128] in the order of a packed block: the places (i, j) of a half change to (j, i)."""
    return values.view(len(values), -1, 2, 2, 4, 8).transpose(3, 4).flatten(2)


def _from_layout(packed: Tensor) -> Tensor:
    """The other way round; [n, K / 128, 128] stays in blocks."""
    blocks: Tensor = packed.unflatten(-1, (2, 4, 2, 8)).transpose(3, 4).flatten(2)
    return blocks
