"""Matrices as bitsandbytes stores them, without bitsandbytes: 8 bits (arXiv 2208.07339), nf4 and fp4 (2305.14314).

    8 bits  int8 [N, K]; `SCB` float32 [N], the largest value of each row
    4 bits  numbers of a table of 16, two in a byte, the first in the high half, through the whole matrix row by row;
            `absmax` for every block of values; with double quantisation that is itself numbers of a table of 256
            with a scale for every block of them and an offset

What is not in a tensor is in one of bytes that hold JSON (`quant_state`). Layers that were left out of the
quantisation are stored as floats, as are the embedding and the norms.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.weights.header import Stored, parse_json
from cabochon.weights.mapped import MappedFile, MappedTensor, is_finite
from cabochon.weights.scheme import BITSANDBYTES

STATES = {f"quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}
EIGHT = ("SCB", "weight_format")  # beside a matrix of 8 bits; the second is not always there
FOUR = ("absmax", "quant_map", *STATES, "nested_absmax", "nested_quant_map")  # behind the name of one of 4 bits
BLOCKS = tuple(2**i for i in range(5, 13))  # values that can share a scale
MAX_STATE = 4096
_TORCH = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}


@dataclass(frozen=True)
class Encoded:
    """One matrix and what belongs to it; `state` is empty for 8 bits. Made by `claim`, which checks it."""

    name: str  # as in the folder
    shape: tuple[int, int]
    weight: Stored
    parts: Mapping[str, Stored]
    state: Mapping[str, Any]

    def rows(self, count: int) -> Iterator[Tensor]:
        """The matrix in float32, `count` rows at a time, an even number. Raises `BadInput` as `_finite` does."""
        return self._four_bits(count) if self.state else self._eight_bits(count)

    def _eight_bits(self, count: int) -> Iterator[Tensor]:
        scales = self._finite("SCB").split(count)
        for piece, scale in zip(_mapped(self.weight).rows(count), scales, strict=True):
            yield piece.float() * scale[:, None] * (1 / 127)

    def _four_bits(self, count: int) -> Iterator[Tensor]:
        table, scales, block = self._finite("quant_map"), self._scales(), self.state["blocksize"]
        columns, total, start = self.shape[1], math.prod(self.shape), 0
        for piece in _mapped(self.weight).rows(count * columns // 2):
            numbers = torch.stack([piece >> 4, piece & 15], dim=1).flatten()[: total - start].int()
            end = start + len(numbers)
            shared = scales[start // block : -(-end // block)].repeat_interleave(block)
            yield (table[numbers] * shared[start % block :][: len(numbers)]).view(-1, columns)
            start = end

    def _scales(self) -> Tensor:
        """float32, one for each block of the matrix."""
        if "nested_absmax" not in self.parts:
            return self._finite("absmax")
        numbers = _read(self.parts["absmax"])
        outer = self._finite("nested_absmax").repeat_interleave(self.state["nested_blocksize"])
        scales: Tensor = self._finite("nested_quant_map")[numbers.int()] * outer[: len(numbers)]
        return scales.add_(self.state["nested_offset"])

    def _finite(self, part: str) -> Tensor:
        values = _read(self.parts[part])
        if not is_finite(values):
            raise _unusable(self.name, f"its {part} has values that are infinite or not a number")
        return values


def claim(stored: dict[str, Stored], matrices: Mapping[str, tuple[int, ...]]) -> dict[str, Encoded]:
    """Take the encoded matrices and all that belongs to them out of `stored`, checked against each other.

    Args:
        stored: tensors by their names in the folder.
        matrices: names and shapes of the matrices that the model has. Those without parts are left: they are floats.

    Raises `BadInput` when a part is missing, or is not what the matrix asks for.
    """
    found = {}
    for name, (rows, columns) in matrices.items():
        eight = {part: name.removesuffix("weight") + part for part in EIGHT}
        four = {part: f"{name}.{part}" for part in FOUR}
        names = {part: full for part, full in (eight | four).items() if full in stored}
        if names and name in stored:
            weight, parts = stored.pop(name), {part: stored.pop(full) for part, full in names.items()}
            check = _eight_bits if "SCB" in parts else _four_bits
            found[name] = check(name, (rows, columns), weight, parts)
    return found


def _eight_bits(name: str, shape: tuple[int, int], weight: Stored, parts: dict[str, Stored]) -> Encoded:
    _check(name, {"weight": weight, **parts}, {"weight": ("I8", shape), "SCB": ("F32", shape[:1])}, ("weight_format",))
    order = parts.pop("weight_format", None)
    if order and (order.nbytes != 1 or int(_read(order)) != 0):
        raise _unusable(name, "its values lie in the order of some GPU, and not row by row")
    return Encoded(name, shape, weight, parts, {})


def _four_bits(name: str, shape: tuple[int, int], weight: Stored, parts: dict[str, Stored]) -> Encoded:
    count = math.prod(shape)
    state = _state(name, shape, parts)
    blocks = -(-count // state["blocksize"])
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("U8", (-(-count // 2), 1)),
        "absmax": ("F32", (blocks,)),
        "quant_map": ("F32", (16,)),
    }
    if "nested_blocksize" in state:
        wanted |= {
            "absmax": ("U8", (blocks,)),
            "nested_absmax": ("F32", (-(-blocks // state["nested_blocksize"]),)),
            "nested_quant_map": ("F32", (256,)),
        }
    _check(name, {"weight": weight, **parts}, wanted)
    return Encoded(name, shape, weight, parts, state)


def _state(name: str, shape: tuple[int, int], parts: dict[str, Stored]) -> dict[str, Any]:
    """What `quant_state` says, taken out of the parts."""
    keys = [key for key in STATES if key in parts]
    states = [parts.pop(key) for key in keys]
    if len(states) != 1 or states[0].dtype != "U8" or states[0].nbytes > MAX_STATE:
        raise _unusable(name, "it has no single, short quant_state")
    state = parse_json(_read(states[0]).numpy().tobytes(), states[0].path)
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"} if "nested_blocksize" in state else set()
    offset = state.get("nested_offset", 0.0)
    sound = (
        set(state) == {"quant_type", "blocksize", "dtype", "shape"} | nested
        and state["quant_type"] == STATES[keys[0]]
        and state["shape"] == list(shape)
        and all(type(state[key]) is int and state[key] in BLOCKS for key in state if key.endswith("blocksize"))
        and isinstance(offset, float)
        and math.isfinite(offset)
    )
    if not sound:
        raise _unusable(name, f"its quant_state does not describe a matrix of {shape[0]} x {shape[1]}")
    return state


def _check(
    name: str,
    found: Mapping[str, Stored],
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    optional: tuple[str, ...] = (),
) -> None:
    wrong = [part for part in found if part not in wanted and part not in optional]
    wrong += [part for part, (dtype, shape) in wanted.items() if _is_other(found.get(part), dtype, shape)]
    if wrong:
        raise _unusable(name, f"{', '.join(sorted(wrong))}: missing, not needed, or of another dtype or size")


def _is_other(stored: Stored | None, dtype: str, shape: tuple[int, ...]) -> bool:
    return stored is None or (stored.dtype, stored.shape) != (dtype, shape)


def _mapped(stored: Stored) -> MappedTensor:
    return MappedFile(stored.path).tensor(stored, _TORCH[stored.dtype])


def _read(stored: Stored) -> Tensor:
    """A small tensor."""
    return _mapped(stored).load(_TORCH[stored.dtype], torch.device("cpu"))[0]


def _unusable(name: str, cause: str) -> BadInput:
    return BadInput(
        f"{name} cannot be read as {BITSANDBYTES} stores it",
        cause,
        "save the model again with a current version of transformers and bitsandbytes, or use its float weights",
    )
