"""Tensors out of a checked folder: whole, or some rows at a time. Every value is looked at once, on its way."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.model.kernels.native import LANES
from cabochon.weights.header import Stored
from cabochon.weights.mapped import MappedFile, MappedTensor, is_finite
from cabochon.weights.names import to_hf
from cabochon.weights.verify import Checked

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
NOT_FINITE = "has values that are infinite or not a number"
PIECE = 2**20  # elements of a piece of rows: what is made of it still fits a core's cache


class Reader:
    """The tensors of a folder by our names."""

    def __init__(self, checked: Checked) -> None:
        self._checked = checked
        self._files = {path: MappedFile(path) for path in checked.files}

    def names(self) -> list[str]:
        """All tensors, in the order in which they lie in the files: read so, a disk is fastest."""
        encoded = {name: matrix.weight for name, matrix in self._checked.encoded.items()}
        places = {name: (str(t.path), t.start) for name, t in (self._checked.tensors | encoded).items()}
        return sorted(places, key=lambda name: places[name])

    def load(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A whole tensor; on a CPU in its stored dtype it is the mapped file itself. Raises `BadInput`."""
        if name in self._checked.encoded:
            return self._decoded(name, dtype, device)
        tensor, finite = self._mapped(self._checked.tensors[name]).load(dtype, device)
        if not finite:
            raise self._unusable(name, NOT_FINITE)
        return tensor

    def let_go(self, name: str) -> None:
        """Give back the memory of a tensor that was loaded in place and is not needed any more."""
        if name not in self._checked.encoded:
            self._mapped(self._checked.tensors[name]).let_go()

    def packed(self, name: str, device: torch.device) -> Tensor:
        """A tensor of a quantised model as stored. Raises `BadInput` for a scale or zero point that cannot be."""
        stored = self._checked.tensors[name]
        tensor = self.load(name, TORCH[stored.dtype], device)
        wrong = (name.endswith(".scale") and bool((tensor < 0).any())) or (
            name.endswith(".zero") and bool((tensor > 15).any())
        )
        if wrong:
            raise self._unusable(name, "has values that quantising never writes")
        return tensor

    def rows(self, name: str) -> Iterator[Tensor]:
        """The rows of a matrix as float32, in pieces of a multiple of `LANES` rows (the last of what is left)."""
        matrix = self._checked.encoded.get(name)
        shape = matrix.shape if matrix else self._checked.tensors[name].shape
        count = max(1, PIECE // shape[1] // LANES) * LANES
        for piece in matrix.rows(count) if matrix else self._mapped(self._checked.tensors[name]).rows(count):
            if not is_finite(piece):
                raise self._unusable(name, NOT_FINITE)
            yield piece.float()

    def check_tied_head(self) -> None:
        """Raises `BadInput` when a second copy of the embedding is not one."""
        head, embedding = self._checked.tied_head, self._checked.tensors["embedding.weight"]
        if head is None or self._mapped(head).equals(self._mapped(embedding)):
            return
        raise BadInput(
            f"the weights in {head.path.parent} are not a Gemma 2 model",
            "lm_head.weight differs from model.embed_tokens.weight; Gemma 2 has one matrix for both",
            "remove lm_head.weight if the embedding is what was trained",
        )

    def _mapped(self, stored: Stored) -> MappedTensor:
        if stored.path not in self._files:  # the head can lie in a file of its own
            self._files[stored.path] = MappedFile(stored.path)
        return self._files[stored.path].tensor(stored, TORCH[stored.dtype])

    def _decoded(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix that bitsandbytes stored, in the dtype that was asked for."""
        out, done = torch.empty(self._checked.encoded[name].shape, dtype=dtype, device=device), 0
        for piece in self.rows(name):
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def _unusable(self, name: str, cause: str) -> BadInput:
        return BadInput(
            f"the weights in {self._checked.files[0].parent} cannot be used",
            f"{to_hf(name)} {cause}",
            "training has diverged or the file is damaged: use an earlier checkpoint, or fetch it again",
        )
