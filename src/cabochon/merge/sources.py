"""The models of a merge, opened: their tensors where they lie in the files. Names of tensors are ours."""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.base.files import sha256
from cabochon.merge.config import ModelRef
from cabochon.model.config import Gemma2Config
from cabochon.weights.adapters import Adapter, read_adapter
from cabochon.weights.hub import adapter_folder, resolve
from cabochon.weights.mapped import MappedFile, MappedTensor
from cabochon.weights.names import to_hf
from cabochon.weights.read import TORCH
from cabochon.weights.rows import Rows, stored_rows
from cabochon.weights.verify import Checked, verify

# What two models have to share beside the sizes of their tensors, or their weights mean different things.
_MEANING = (
    *("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "query_pre_attn_scalar"),
    *("attn_softcap", "final_softcap", "rope_theta", "norm_eps"),
)

SMALL = 1_000_000_000  # bytes that are hashed in a moment


@dataclass(frozen=True)
class Opened:
    """One model. The tensors it gives are views of its files: read them only, and let them go when done."""

    ref: ModelRef
    folder: Path
    checked: Checked
    files: Mapping[Path, MappedFile]
    adapter: Adapter | None = None  # what `MODEL+ADAPTER` puts on it

    @property
    def config(self) -> Gemma2Config:
        return self.checked.config

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checked.tensors[name].shape

    def nbytes(self, name: str) -> int:
        """Bytes that are read for a tensor."""
        return self.checked.tensors[name].nbytes

    def tensor(self, name: str) -> Tensor:
        """A whole tensor: as stored, or float32 where the adapter changes it."""
        stored = self._mapped(name).view()
        return self.adapter.apply(name, stored) if self.adapter and self.adapter.touches(name) else stored

    def is_made(self, name: str) -> bool:
        """Whether the adapter changes a tensor: `rows` then makes it without ever holding it whole."""
        return self.adapter is not None and self.adapter.touches(name)

    def rows(self, name: str) -> Rows:
        """A tensor by its rows."""
        stored = self._mapped(name).view()
        return self.adapter.rows(name, stored) if self.adapter else stored_rows(stored)

    def announce(self, name: str) -> None:
        """Have a tensor that is needed soon read from the disk."""
        self._mapped(name).announce()

    def let_go(self, name: str) -> None:
        """Give back the memory of a tensor that is not needed any more."""
        self._mapped(name).let_go()

    def place(self, name: str) -> str:
        """Where a tensor is, for errors."""
        return f"{to_hf(name)} in {self.checked.tensors[name].path}"

    def identity(self) -> list[str]:
        """What tells whether the files are still the same: their names, sizes and times."""
        small = [path for pattern in ("*.json", "*.model") for path in sorted(self.folder.glob(pattern))]
        adapter = sorted(self.adapter.folder.glob("adapter_*")) if self.adapter else []
        states = [(file, file.stat()) for file in (*self.checked.files, *small, *adapter)]
        return [f"{file.resolve()} {state.st_size} {state.st_mtime_ns}" for file, state in states]

    def digests(self, *, compute: bool = False) -> list[str | None]:
        """The SHA-256 of each weight file. The cache of the Hub has it as the file's real name; other files are read,
        which takes seconds for each model, if that is asked for or they are small; else None.
        """
        files = self.checked.files
        names = [file.resolve().name for file in files]
        known = [name if re.fullmatch("[0-9a-f]{64}", name) else None for name in names]
        if not compute and sum(file.stat().st_size for file in files) > SMALL:
            return list(known)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda file, digest: digest or sha256(file), files, known))

    def _mapped(self, name: str) -> MappedTensor:
        stored = self.checked.tensors[name]
        return self.files[stored.path].tensor(stored, TORCH[stored.dtype])


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """A model's tensors by name, each looked up, or made, only when it is asked for."""

    model: Opened

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.model.checked.tensors:
            raise KeyError(name)
        return self.model.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.model.checked.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.checked.tensors)

    def __len__(self) -> int:
        return len(self.model.checked.tensors)


def open_models(refs: Iterable[ModelRef], *, token: str | None = None, offline: bool = False) -> dict[ModelRef, Opened]:
    """Find, check and map models and their adapters, fetching those that are on the Hub.

    Raises `BadInput` and `MissingResource` as `verify` and `resolve` do, and `BadInput` for quantised weights.
    """
    return {ref: _open(ref, token, offline) for ref in refs}


def _open(ref: ModelRef, token: str | None, offline: bool) -> Opened:
    folder = resolve(ref.path, revision=ref.revision, token=token, offline=offline)
    checked = verify(folder)
    if checked.scheme or checked.encoded:
        bits = checked.scheme.bits if checked.scheme else 4
        raise BadInput(
            f"{ref} cannot be merged",
            f"its weights are quantised ({bits} bits): rounding errors would be merged with the weights",
            "merge the models that it was made from, then quantise the result (cabochon quantize)",
        )
    found = adapter_folder(ref.adapter, ref.adapter_revision, token=token, offline=offline) if ref.adapter else None
    adapter = read_adapter(found, checked.config) if found else None
    return Opened(ref, folder, checked, {path: MappedFile(path) for path in checked.files}, adapter)


def refuse_other_architectures(models: Iterable[Opened]) -> list[str]:
    """Raise `BadInput` unless all models compute alike; what differs without harm comes back as notes."""
    first, *others = models
    notes = []
    for other in others:
        for field in fields(Gemma2Config):
            ours, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
            difference = f"{field.name} is {ours} in {first.ref} and {theirs} in {other.ref}"
            if ours != theirs and field.name in _MEANING:
                raise BadInput("models of different architectures cannot be merged", difference, "merge one size only")
            if ours != theirs and field.name in ("sliding_window", "max_position"):
                notes.append(f"{difference}; the output has {ours}")
    return notes
