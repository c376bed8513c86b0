"""Tensors in pieces: a file for each rank, with what it has, and tensors filled from the pieces of any number of them.

A file is safetensors; where its pieces begin in the whole tensors is in its header, in the words of
`torch.distributed.checkpoint.HuggingFaceStorageWriter`, whose reader reads these files as well.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.train.shards import box, local, slices
from cabochon.weights.save import Entry, flat_pieces, write_safetensors

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, on the CPU: `values` begin at `offsets` of the tensor called `name`."""

    name: str
    offsets: list[int]
    values: Tensor


def write_parts(path: Path, parts: Iterable[Part]) -> None:
    """One rank's file, forced to the disk. Raises `OSError`."""
    parts = list(parts)
    entries = [_entry(part) for part in parts]
    places = json.dumps({part.name: {_OFFSETS: part.offsets} for part in parts})
    with path.open("wb") as file:
        write_safetensors(file, entries, torch.float32, {_PLACES: places})
        file.flush()
        os.fsync(file.fileno())


def _entry(part: Part) -> Entry:
    return Entry(part.name, tuple(part.values.shape), lambda: flat_pieces(part.values), part.values.dtype)


class Parts:
    """The files of all ranks of a checkpoint. Nothing of them is in memory but what is being read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.pieces: dict[str, list[tuple[Any, list[int], list[int]]]] = {}  # file, where it begins, its size
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            places = json.loads(file.metadata()[_PLACES])
            for name in file.keys():  # noqa: SIM118
                piece = file, places[name][_OFFSETS], file.get_slice(name).get_shape()
                self.pieces.setdefault(name, []).append(piece)

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Set what this rank has of `target`. Raises `BadInput` when the files do not have it all."""
        out, (mine, size), found = local(target), box(target), 0
        for file, begin, shape in self.pieces.get(name, ()):
            low = [max(a, b) for a, b in zip(mine, begin, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(mine, size, begin, shape, strict=True)]
            common = [b - a for a, b in zip(low, high, strict=True)]
            if any(n <= 0 for n in common):
                continue
            there = slices([a - b for a, b in zip(low, begin, strict=True)], common)
            here = slices([a - b for a, b in zip(low, mine, strict=True)], common)
            out[here] = (file.get_slice(name)[there] if there else file.get_tensor(name)).to(out.device)
            found += math.prod(common)
        if found != out.numel():
            raise BadInput(
                "the checkpoint is that of another model",
                f"its files have {found} of {out.numel()} values of {name}",
                "go on with the model and the settings that the run was started with",
            )
