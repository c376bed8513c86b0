"""Write a model folder in Hugging Face's layout: shards, index, configuration, tokenizer files.

Tensors go to the disk piece by piece, so saving needs no second copy of the model, and a model that is larger than
memory can be written from a generator (`write_folder`).
"""

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.files import atomic_folder
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import PackedWeight, QuantLinear
from cabochon.model.lora import LoraLinear
from cabochon.model.lossless import LosslessWeight
from cabochon.weights.names import SCORE, to_hf
from cabochon.weights.scheme import KEY, Scheme
from cabochon.weights.verify import CONFIG, INDEX, SINGLE

GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
PIECE = 2**22  # elements converted and written at once
SCORED = {  # in config.json, when there is a score: a classifier with one label, whose value is what it is
    "architectures": ["Gemma2ForSequenceClassification"],
    "id2label": {"0": "reward"},
    "label2id": {"reward": 0},
}
_FLOATS = (torch.bfloat16, torch.float32)  # what float weights are saved in
_SAFETENSORS = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written: its parts, in order, make up the flat tensor."""

    name: str  # as Hugging Face calls it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    dtype: torch.dtype | None = None  # None: the folder's

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes on the disk, in a folder of this dtype."""
        return torch.Size(self.shape).numel() * (self.dtype or dtype).itemsize


def save_model(
    model: Gemma2,
    folder: Path,
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    whole: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a model as a folder, whole or not at all.

    Args:
        model: on any device.
        folder: new or empty, unless `overwrite`, which replaces a model folder and nothing else.
        tokenizer_files: file name to content, written unchanged beside the weights.
        dtype: bfloat16 or float32; None keeps the embedding's. A quantised model is saved as it is.
        shard_bytes: the most bytes of weights in one file (a single tensor may be larger).
        whole: gives a parameter by its name, where this process has only a part of each.

    Raises:
        UsageError: the folder exists and is in use, or the dtype cannot be stored.
        MissingResource: no space or no permission. Nothing is left behind.
    """
    scheme = scheme_of(model)
    _check_layers(model, folder, scheme)
    if scheme and dtype:
        raise UsageError(
            f"{folder} was not written",
            f"a model of {scheme.bits}-bit weights cannot be saved in {dtype}: what was rounded off is gone",
            "leave dtype out, or convert the model that it was made from",
        )
    packed = {name: m for name, m in model.named_modules() if isinstance(m, LosslessWeight)}
    entries = [
        Entry(to_hf(name), tuple(tensor.shape), _values(name, tensor, whole), tensor.dtype if scheme else None)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in packed
    ]
    entries += [
        Entry(to_hf(f"{name}.weight"), (m.rows, m.columns), partial(_unpacked, m)) for name, m in packed.items()
    ]
    write_folder(
        folder,
        model.config,
        entries,
        dtype=dtype or (torch.float32 if scheme else model.cache_dtype),
        scheme=scheme,
        tokenizer_files=tokenizer_files,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _check_layers(model: Gemma2, folder: Path, scheme: Scheme | None) -> None:
    """Refuse models that there is no folder for."""
    kinds = {type(module) for module in model.modules()}
    cause = "it has adapters" if LoraLinear in kinds else ""
    if QuantLinear in kinds and scheme is None:
        cause = cause or "its layers are quantised and its embedding is not"
    if cause:
        raise UsageError(
            f"{folder} was not written",
            f"no model folder can hold this model: {cause}",
            "save the adapters (weights/adapters.py), or make it plain first (`merge` in model/lora.py)",
        )


def scheme_of(model: Gemma2) -> Scheme | None:
    """How a model's weights are quantised; None: they are floats."""
    embedding: Any = model.embedding
    if not isinstance(embedding, PackedWeight):
        return None
    packed = next(module for module in model.layers.modules() if isinstance(module, PackedWeight))
    return Scheme(packed.bits, packed.group, packed.method, embedding.bits)


def write_folder(
    folder: Path,
    config: Gemma2Config,
    entries: Iterable[Entry],
    *,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model folder from entries that make their values when asked, in order; arguments as in `save_model`.

    With a scheme the entries are those of `layout`, each with its dtype, and `dtype` is what is computed in.
    """
    folder = Path(folder)
    if dtype not in _FLOATS:
        raise UsageError(f"weights cannot be saved in {dtype}", "folders hold bfloat16 or float32", "choose one")
    _check_names(tokenizer_files or {})
    check_replaces_a_model(folder)
    try:
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            placed = shards(entries, dtype, shard_bytes)
            for name, shard in placed.items():
                with (temporary / name).open("wb") as file:
                    write_safetensors(file, shard, dtype)
            write_documents(temporary, config, dtype, placed, scheme)
            for name, content in (tokenizer_files or {}).items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise MissingResource(
            f"{folder} was not written",
            error.strerror or str(error),
            "free some space or choose another place; nothing was left behind",
        ) from None


def write_safetensors(
    file: BinaryIO, entries: Iterable[Entry], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file (the format is described in `header.py`); `metadata` goes into its header."""
    entries = list(entries)
    file.write(file_header(entries, dtype, metadata))
    for entry in entries:
        written = 0
        for piece in entry.pieces():
            ready = piece.detach().to("cpu", entry.dtype or dtype).contiguous()
            written += file.write(ready.view(torch.uint8).numpy().data)
        assert written == entry.nbytes(dtype), entry.name


def file_header(entries: Iterable[Entry], dtype: torch.dtype, metadata: Mapping[str, str] | None = None) -> bytes:
    """What leads a safetensors file; the tensors follow in order, without a gap. Their data is aligned to 64 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}  # transformers asks for a format
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes(dtype)
        header[entry.name] = {
            "dtype": _SAFETENSORS[entry.dtype or dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    return struct.pack("<Q", len(raw)) + raw


def _values(name: str, tensor: Tensor, whole: Callable[[str], Tensor] | None) -> Callable[[], Iterator[Tensor]]:
    return lambda: flat_pieces(tensor if whole is None else whole(name))


def flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as flat pieces of a size that is converted at once."""
    yield from tensor.detach().reshape(-1).split(PIECE)


def _unpacked(matrix: LosslessWeight) -> Iterator[Tensor]:
    yield from (matrix.unpacked(rows).reshape(-1) for rows in torch.arange(matrix.rows).split(4096))


def shards(entries: Iterable[Entry], dtype: torch.dtype, limit: int) -> dict[str, list[Entry]]:
    """Which file holds what: one file after the other is filled, in order, up to `limit` bytes."""
    filled: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = entry.nbytes(dtype)
        if not filled or size > room:
            filled.append([])
            room = limit
        filled[-1].append(entry)
        room -= size
    count = len(filled)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, filled, strict=True))


def write_documents(
    folder: Path, config: Gemma2Config, dtype: torch.dtype, placed: Mapping[str, list[Entry]], scheme: Scheme | None
) -> None:
    """The files beside the weights: the configurations, and the index when there are several shards."""
    documents = _documents(config, dtype, scheme)
    if any(entry.name == SCORE for shard in placed.values() for entry in shard):
        documents[CONFIG] |= SCORED
    if len(placed) > 1:
        total = sum(entry.nbytes(dtype) for shard in placed.values() for entry in shard)
        weight_map = {entry.name: name for name, shard in placed.items() for entry in shard}
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _documents(config: Gemma2Config, dtype: torch.dtype, scheme: Scheme | None) -> dict[str, dict[str, Any]]:
    name = str(dtype).removeprefix("torch.")
    described = {
        **config.to_hf(),
        "dtype": name,
        "torch_dtype": name,
    }  # transformers 5 reads the first, 4 the second
    if scheme:
        described[KEY] = scheme.to_hf()
    generation = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {CONFIG: described, GENERATION: generation}


def _check_names(files: Mapping[str, bytes]) -> None:
    ours = (CONFIG, GENERATION, INDEX)
    plain = re.compile(r"\w[\w.-]*(?<!\.safetensors)")
    wrong = next((name for name in files if name in ours or not plain.fullmatch(name)), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} cannot be saved", "it is not the plain name of a tokenizer file", "rename it")


def check_replaces_a_model(folder: Path) -> None:
    """Replacing a folder deletes what is in it, so it has to be a model and not, say, somebody's home."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} was not written",
            f"it has files in it and is not a model folder (no {CONFIG})",
            "name a new folder",
        )
