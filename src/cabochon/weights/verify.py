"""Which file holds which tensor, and whether together they are the model that `config.json` describes.

Everything here reads headers only, so a folder that is wrong is refused before any weight is loaded.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, MissingResource
from cabochon.model.config import Gemma2Config
from cabochon.weights.bnb import Encoded, claim
from cabochon.weights.header import MAX_HEADER, Stored, broken, parse_json, read_header
from cabochon.weights.names import SCORE, TIED_HEAD, from_hf, is_harmless, shapes, to_hf
from cabochon.weights.scheme import Scheme, is_bitsandbytes, layout, read_scheme

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_CONFIG = 1 << 20
FLOATS = ("BF16", "F32", "F16")  # dtypes that weights may be stored in
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checked:
    """A folder whose headers and configuration agree. Tensors by our names."""

    config: Gemma2Config
    tensors: dict[str, Stored]
    tied_head: Stored | None  # a second copy of the embedding, to be compared with it
    scheme: Scheme | None  # how the weights are quantised; None: they are floats
    encoded: dict[str, Encoded]  # matrices that bitsandbytes stored, and that become floats; they are not in `tensors`

    @property
    def dtype(self) -> str:
        """The stored dtype, as safetensors spells it; where they differ, that of the first tensor (the embedding)."""
        return next(iter(self.tensors.values())).dtype

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in order of name."""
        return sorted({t.path for t in self.tensors.values()} | {e.weight.path for e in self.encoded.values()})


def load_config(folder: Path) -> Gemma2Config:
    """The configuration in a model folder.

    Raises `MissingResource` when there is none, `BadInput` when it cannot be used or is of another architecture.
    """
    return Gemma2Config.from_hf(_config_json(Path(folder)))


def load_scheme(folder: Path) -> Scheme | None:
    """How the weights in a model folder are quantised; None: they are floats. Raises as `load_config`."""
    return read_scheme(_config_json(Path(folder)))


def _config_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingResource(f"no model in {folder}", "there is no such folder", "check the path")
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise MissingResource(
                f"no model in {folder}",
                "it is an adapter, and what is asked for needs a whole model",
                f"make one of both: cabochon merge, with MODEL+{folder} as the model",
            )
        raise MissingResource(
            f"no model in {folder}",
            f"it has no {CONFIG}",
            "name the folder that holds config.json and the weights",
        )
    return _read_json(folder / CONFIG, MAX_CONFIG)


def verify(folder: Path, *, scored: bool = False) -> Checked:
    """Check a model folder without reading its weights; `scored`: that of a reward model, which has a score.

    Raises:
        MissingResource: a file is not there.
        BadInput: a header or the index is unsound, or tensors are missing, unknown, there twice, of another shape
            than `config.json` says, or stored in another form than it says.
    """
    folder = Path(folder)
    raw = _config_json(folder)
    config, scheme = Gemma2Config.from_hf(raw), read_scheme(raw)
    stored = _stored_tensors(folder)
    if scored != (SCORE in stored):
        raise _other_kind(folder, scored)
    for name in [name for name in stored if is_harmless(name)]:
        del stored[name]
    tied_head = stored.pop(TIED_HEAD, None) if scheme is None else None
    _check_layers(folder, config, stored)
    matrices = {to_hf(name): shape for name, shape in shapes(config) if len(shape) == 2}
    encoded = claim(stored, matrices) if is_bitsandbytes(raw) else {}
    expected = {to_hf(t.name): t for t in _expected(config, scheme) if to_hf(t.name) not in encoded}
    if scored:
        expected[SCORE] = _Expected(SCORE, (1, config.hidden_size), FLOATS)
    _refuse(folder, "lack tensors of this model", [name for name in expected if name not in stored])
    _refuse(folder, "hold tensors that Gemma 2 does not have", [name for name in stored if name not in expected])
    wanted, found = dict(expected), dict(stored)
    if tied_head:
        wanted[TIED_HEAD], found[TIED_HEAD] = wanted["model.embed_tokens.weight"], tied_head
    _refuse(
        folder,
        "do not have the shapes that config.json gives",
        [f"{n} {list(found[n].shape)} for {list(t.shape)}" for n, t in wanted.items() if found[n].shape != t.shape],
    )
    _refuse(
        folder,
        "are not stored as BF16, F16 or F32" if scheme is None else "are not stored as their format says",
        [f"{n} ({found[n].dtype})" for n, t in wanted.items() if found[n].dtype not in t.dtypes],
    )
    tensors = {tensor.name: stored[theirs] for theirs, tensor in expected.items()}
    return Checked(config, tensors, tied_head, scheme, {from_hf(name): e for name, e in encoded.items()})


@dataclass(frozen=True)
class _Expected:
    name: str  # ours
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def _expected(config: Gemma2Config, scheme: Scheme | None) -> Iterator[_Expected]:
    if scheme is None:
        yield from (_Expected(name, shape, FLOATS) for name, shape in shapes(config))
    else:
        yield from (_Expected(tensor.name, tensor.shape, (tensor.dtype,)) for tensor in layout(config, scheme))


def _other_kind(folder: Path, scored: bool) -> BadInput:
    if scored:
        hint = "cabochon train reward makes one: --reward model:FOLDER"
        return BadInput(f"{folder} is not a reward model", f"its weights have no {SCORE}", hint)
    hint = "use it as a reward: --reward model:FOLDER; to talk to, take the model that it was made from"
    return BadInput(f"{folder} is a reward model", "it gives scores and writes no text", hint)


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors by their stored names, from one file or from those that the index names."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    placed = _read_index(folder / INDEX)
    stored: dict[str, Stored] = {}
    for file in sorted(set(placed.values())):
        header = read_header(folder / file)
        _refuse(folder, "hold tensors twice", [name for name in header if name in stored])
        stored |= header
        _refuse(
            folder,
            f"disagree with {INDEX}",
            [f"{name} in {file}" for name in header if placed.get(name) != file]
            + [f"{name} not in {file}" for name, where in placed.items() if where == file and name not in header],
        )
    return stored


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name. Only plain names of files beside the index are accepted."""
    placed = _read_json(path, MAX_HEADER).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise broken(path, "it has no weight_map")
    for name, file in placed.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            # Without this a folder from elsewhere could have any file of this machine opened.
            raise BadInput(
                f"{path} cannot be used",
                f"it places {name!r} in {file!r}, which is not the plain name of a safetensors file in its folder",
                "use the index that was published with the weights",
            )
    return placed


def _no_weights(folder: Path) -> Exception:
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickled:
        return BadInput(
            f"the weights in {folder} cannot be used",
            f"{_some(pickled)}: pickled files can run code, and nothing is ever unpickled here",
            "convert them to safetensors with the program that wrote them, or fetch the safetensors version",
        )
    return MissingResource(
        f"no weights in {folder}",
        f"it has neither {SINGLE} nor {INDEX}",
        "fetch the model again (cabochon pull), or name another folder",
    )


def _check_layers(folder: Path, config: Gemma2Config, stored: Collection[str]) -> None:
    """More layers than tensors: said at once, since listing what is missing might take forever."""
    if config.num_layers > len(stored):
        raise BadInput(
            f"the weights in {folder} are not the model that config.json describes",
            f"config.json says {config.num_layers} layers and there are {len(stored)} tensors",
            "use the config.json and the weights of one and the same model",
        )


def _refuse(folder: Path, problem: str, names: list[str]) -> None:
    if names:
        raise BadInput(
            f"the weights in {folder} {problem}",
            _some(names),
            "fetch the folder again, or use the config.json that belongs to these weights",
        )


def _some(names: list[str]) -> str:
    """Up to three names and a count; as in Python source, since they come from files and go to terminals."""
    shown = ", ".join(repr(name)[1:-1] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise MissingResource(
            f"{path} cannot be read", error.strerror or str(error), "check the permissions of the folder"
        ) from None
    if len(raw) > limit:
        raise broken(path, f"it is larger than {limit} bytes")
    return parse_json(raw, path)
