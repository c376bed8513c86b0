"""LoRA adapters in PEFT's format, put on a model row by row. N and K are a matrix's outputs and inputs, r the rank.

A matrix becomes W + scale B A, scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732); LoRA is
arXiv 2106.09685. With DoRA (arXiv 2402.09353) every row of that is then given the length that `lora_magnitude_vector`
says. Everything is computed in float32: PEFT rounds B A to the adapter's type first, and adds in the model's.

Source: PEFT's documentation and its behaviour. What changes the base in other ways is refused, never left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import adapted, bases, freeze, put, scale
from cabochon.weights.adapter_config import (
    CONFIG,
    EMBEDDING,
    PICKLED,
    PREFIX,
    WEIGHTS,
    LoraSettings,
    module_name,
    read_settings,
)
from cabochon.weights.adapter_save import save_adapter
from cabochon.weights.header import read_header
from cabochon.weights.mapped import MappedFile, is_finite
from cabochon.weights.names import TIED_HEAD, from_hf, shapes
from cabochon.weights.read import TORCH
from cabochon.weights.rows import Rows, stored_rows

__all__ = ["Adapter", "Delta", "load_adapter", "read_adapter", "save_adapter"]

# Behind the name of a module, PEFT's parts. Those of an embedding are the other way round: A [r, V], B [D, r].
_A, _B, _EMBEDDING_A, _EMBEDDING_B = "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE, _BASE = "lora_magnitude_vector", "base_layer.weight"


@dataclass(frozen=True)
class Delta:
    """What is added to one matrix: scale * b @ a. `a` [r, K] and `b` [N, r] as stored, `magnitude` [N] with DoRA."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def rows(self, base: Rows, start: int, stop: int) -> Tensor:
        """Rows of the adapted matrix, float32 [n, K]. `base` gives those of the matrix."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return adapted(base(start, stop), self.a, self.b[start:stop], self.scale, magnitude)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a base model. Made by `read_adapter`. Names of tensors are ours.

    Attributes:
        folder: where it is.
        settings: what its adapter_config.json says.
        deltas: by the name of the matrix that they change.
        replaced: tensors that it brings whole, as stored.
        notes: for the user to read; nothing is wrong with them.
    """

    folder: Path
    settings: LoraSettings
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def touches(self, name: str) -> bool:
        """Whether a tensor of the base changes."""
        return name in self.deltas or name in self.replaced

    def rows(self, name: str, tensor: Tensor) -> Rows:
        """How to make rows of the adapted tensor from the base's, such as a view of a mapped file. Nothing is computed
        before rows are asked for; they are float32."""
        base = stored_rows(self.replaced.get(name, tensor))
        return partial(self.deltas[name].rows, base) if name in self.deltas else base

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The whole adapted tensor, float32, of the shape of the base's."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return self.rows(name, tensor)(0, len(flat)).reshape(tensor.shape)


def read_adapter(folder: Path, config: Gemma2Config) -> Adapter:
    """Read an adapter and check it against the model that it is for. Its weights stay mapped.

    Raises:
        MissingResource: a file is not there.
        BadInput: it is pickled, not LoRA, uses what is not known here, or does not fit the model.
    """
    folder = Path(folder)
    _check_files(folder)
    settings = read_settings(folder / CONFIG)
    tensors = _tensors(folder)
    known = dict(shapes(config))
    parts, replaced, heads = _sorted(folder, tensors, known)
    modules = [module_name(name) for name, shape in known.items() if len(shape) == 2]
    settings.check_targets(folder, modules, [module_name(name) for name in parts])
    deltas = {name: _delta(folder, name, found, known[name], settings) for name, found in parts.items()}
    for name, tensor in replaced.items():
        if tuple(tensor.shape) != known[name]:
            cause = f"it is {list(tensor.shape)} and the model's is {list(known[name])}"
            raise _misfit(folder, name, cause, settings.base_hint)
    _check_head(folder, heads, replaced)
    notes = []
    if EMBEDDING in deltas or EMBEDDING in replaced:
        notes.append("the adapter changes the embedding, which in Gemma 2 is the head as well: both change")
    return Adapter(folder, settings, deltas, replaced, tuple(notes))


def load_adapter(model: Gemma2, folder: Path) -> None:
    """Put a stored adapter beside a model's weights, in place, to be trained on or merged (model/lora.py).

    Raises:
        UsageError: the model has adapters.
        BadInput: as `read_adapter`; or the adapter changes more than linear layers.
        MissingResource: as `read_adapter`.
    """
    bases(model)
    adapter = read_adapter(folder, model.config)
    if adapter.replaced or EMBEDDING in adapter.deltas:
        changed = next(iter(adapter.replaced), EMBEDDING)
        raise BadInput(
            f"the adapter in {folder} cannot be trained on",
            f"it changes {module_name(changed)}, which is no linear layer",
            "put it into the weights, with `cabochon merge` or load(adapter=...), and begin another one",
        )
    settings = adapter.settings
    for name, delta in adapter.deltas.items():
        put(
            model,
            name.removesuffix(".weight"),
            delta.a,
            delta.b,
            alpha=settings.alpha(module_name(name)),
            rslora=settings.use_rslora,
            magnitude=delta.magnitude,
            dropout=settings.lora_dropout,
        )
    freeze(model)


def _check_files(folder: Path) -> None:
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        return
    if (folder / PICKLED).is_file():
        raise BadInput(
            f"the adapter in {folder} cannot be used",
            f"{PICKLED}: pickled files can run code, and nothing is ever unpickled here",
            "load it with PEFT and save it again, which writes safetensors, or fetch that version",
        )
    missing = " and no ".join(name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file())
    raise MissingResource(f"no adapter in {folder}", f"it has no {missing}", "name the folder that PEFT has written")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors as stored, by PEFT's names. Raises `BadInput` for types other than floats."""
    stored = read_header(folder / WEIGHTS)
    file = MappedFile(folder / WEIGHTS)
    for name, tensor in stored.items():
        if not TORCH.get(tensor.dtype, torch.uint8).is_floating_point:
            raise _misfit(folder, name, f"it holds {tensor.dtype}, and weights are BF16, F16 or F32")
    return {name: file.tensor(tensor, TORCH[tensor.dtype]).view() for name, tensor in stored.items()}


def _sorted(
    folder: Path, tensors: Mapping[str, Tensor], known: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[Tensor]]:
    """LoRA's parts by matrix and part, tensors that come whole, and copies of the head."""
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    heads: list[Tensor] = []
    for full, tensor in tensors.items():
        path = full.removeprefix(PREFIX)
        part = next(
            (p for p in (_A, _B, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, _BASE) if path.endswith(f".{p}")), None
        )
        # Old versions of PEFT put a `.weight` behind the magnitude.
        if part is None and path.endswith(f".{_MAGNITUDE}.weight"):
            path, part = path.removesuffix(".weight"), _MAGNITUDE
        module = path.removesuffix(f".{part}") if part else path.removesuffix(".weight").replace(".modules_to_save", "")
        name = _ours(f"{module}.weight")
        if f"{module}.weight" == TIED_HEAD and part in (None, _BASE):
            heads.append(tensor)
        elif name not in known or (part and len(known[name]) != 2):
            cause = f"{module} is not an embedding or linear layer of Gemma 2 that can be adapted"
            if module == "lm_head":
                cause = "it changes the head alone, and Gemma 2 has one matrix for head and embedding"
            raise BadInput(
                f"the adapter in {folder} does not fit the model", f"{full}: {cause}", "use an adapter for this model"
            )
        elif part in (None, _BASE):
            replaced[name] = tensor
        else:
            parts.setdefault(name, {})[str(part)] = tensor
    return parts, replaced, heads


def _ours(name: str) -> str:
    """Our name of a tensor, with or without the `model.` that PEFT leaves out around a bare body; or an empty one."""
    for full in (name, f"model.{name}"):
        try:
            return from_hf(full)
        except KeyError:
            continue
    return ""


def _delta(
    folder: Path, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], settings: LoraSettings
) -> Delta:
    """The parts of one matrix, checked against it and against what the configuration says."""
    embedding, hint = name == EMBEDDING, settings.base_hint
    wanted = {_EMBEDDING_A, _EMBEDDING_B} if embedding else {_A, _B}
    if settings.use_dora and not embedding:
        wanted.add(_MAGNITUDE)
    if settings.use_dora and embedding:
        raise _misfit(folder, name, "DoRA on an embedding is not known here", hint)
    if set(parts) != wanted:
        odd = ", ".join(sorted(set(parts) ^ wanted))
        raise _misfit(folder, name, f"these parts are missing, or are there and should not be: {odd}", hint)
    a, b = (parts[_EMBEDDING_B].T, parts[_EMBEDDING_A].T) if embedding else (parts[_A], parts[_B])
    rank = settings.rank(module_name(name))
    if a.dim() != 2 or b.dim() != 2 or tuple(a.shape) != (rank, shape[1]) or tuple(b.shape) != (shape[0], rank):
        cause = f"lora_B @ lora_A is {list(b.shape)} @ {list(a.shape)}; rank {rank} and the matrix ask for "
        raise _misfit(folder, name, f"{cause}{[shape[0], rank]} @ {[rank, shape[1]]}", hint)
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None and magnitude.numel() != shape[0]:
        raise _misfit(folder, name, f"{_MAGNITUDE} has {magnitude.numel()} numbers for {shape[0]} rows", hint)
    if not all(is_finite(tensor) for tensor in parts.values()):
        raise _misfit(folder, name, "it has values that are infinite or not a number", hint)
    factor = scale(settings.alpha(module_name(name)), rank, rslora=settings.use_rslora)
    return Delta(a, b, factor, None if magnitude is None else magnitude.reshape(-1))


def _check_head(folder: Path, heads: list[Tensor], replaced: Mapping[str, Tensor]) -> None:
    """A copy of the head has to be the embedding that comes with it. PEFT stores both when one was adapted."""
    if heads and not (EMBEDDING in replaced and all(torch.equal(head, replaced[EMBEDDING]) for head in heads)):
        raise BadInput(
            f"the adapter in {folder} does not fit the model",
            "it brings a head that is not its embedding; Gemma 2 has one matrix for both",
            "train it without lm_head in modules_to_save, or with ensure_weight_tying",
        )


def _misfit(folder: Path, name: str, cause: str, hint: str = "fetch or copy it again") -> BadInput:
    try:
        shown = module_name(name)
    except KeyError:
        shown = name
    return BadInput(f"the adapter in {folder} does not fit the model", f"{shown}: {cause}", hint)
