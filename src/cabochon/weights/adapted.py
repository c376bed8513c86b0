"""A folder's tensors with an adapter put on them, on their way into memory: rounded once, from float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cabochon.model.kernels.native import LANES
from cabochon.weights.adapters import Adapter
from cabochon.weights.mapped import is_finite
from cabochon.weights.read import NOT_FINITE, PIECE, TORCH, Reader
from cabochon.weights.verify import Checked


class AdaptedReader(Reader):
    """The tensors of a model and an adapter, as if they had been merged before. Float weights only."""

    def __init__(self, checked: Checked, adapter: Adapter) -> None:
        super().__init__(checked)
        self._adapter, self._base = adapter, Reader(checked)

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A whole tensor. Raises `BadInput`."""
        if not self._adapter.touches(name):
            return super().load(name, dtype, device)
        tensor = self._stored(name)
        out = torch.empty(tensor.shape, dtype=dtype, device=device)
        flat, done = out.view(-1, tensor.shape[-1]), 0
        for piece in self._pieces(name, tensor):
            flat[done : done + len(piece)] = piece
            done += len(piece)
        self._base.let_go(name)
        return out

    def rows(self, name: str) -> Iterator[Tensor]:
        """The rows of a matrix as float32, in pieces of a multiple of `LANES` rows (the last of what is left)."""
        if not self._adapter.touches(name):
            yield from super().rows(name)
            return
        yield from self._pieces(name, self._stored(name))
        self._base.let_go(name)

    def let_go(self, name: str) -> None:
        """Give back the memory of a tensor that is not needed any more; one that was made is the caller's."""
        if not self._adapter.touches(name):
            super().let_go(name)

    def _stored(self, name: str) -> Tensor:
        cpu = torch.device("cpu")
        encoded = name in self._checked.encoded
        return self._base.load(name, torch.float32 if encoded else TORCH[self._checked.tensors[name].dtype], cpu)

    def _pieces(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        make, columns = self._adapter.rows(name, tensor), tensor.shape[-1]
        count = max(1, PIECE // columns // LANES) * LANES
        whole = tensor.numel() // columns
        for start in range(0, whole, count):
            piece = make(start, min(start + count, whole))
            if not is_finite(piece):
                raise self._unusable(name, f"with the adapter {NOT_FINITE}")
            yield piece
