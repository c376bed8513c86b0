"""Model folders as Hugging Face lays them out: `load_config`, `load_model`, `save_model`, `describe`.

verify (headers only) -> does it fit -> map the files -> tensor by tensor into the wanted form -> Gemma2
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.weights.adapted import AdaptedReader
from cabochon.weights.adapters import read_adapter
from cabochon.weights.fit import refuse_too_large
from cabochon.weights.quantize import rounded, use_lossless_layers, use_packed_layers
from cabochon.weights.read import TORCH, Reader
from cabochon.weights.save import save_model
from cabochon.weights.scheme import Scheme
from cabochon.weights.verify import Checked, load_config, load_scheme, verify

__all__ = ["Facts", "describe", "load_config", "load_model", "save_model"]

WEIGHTS = ("auto", "bf16", "lossless", "int8", "int4")


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    group: int = 0,
    device: str | torch.device = "cpu",
    softcap: bool = True,
    check_memory: bool = True,
    adapter: Path | None = None,
    kind: type[Gemma2] = Gemma2,
) -> Gemma2:
    """The model in a folder. Float weights may be trained in place; the files are never written to.

    Args:
        folder: holds config.json and model.safetensors, or the shards that model.safetensors.index.json names.
        dtype: of float weights: bfloat16, float32 or float64; None keeps what is stored (the embedding's dtype
            where they differ).
        weights: "auto" as they are stored, "bf16", "lossless" (bfloat16 in 12 bits each, on a CPU), or "int8" and
            "int4", which round float weights to the nearest while loading.
        group: input channels that share a scale in weights that are quantised here; 0: 128 for int8, 64 for int4.
        device: where the weights go.
        softcap: False leaves the cap on attention scores out: another model, for inference only.
        check_memory: False tries to load a model that is larger than the free memory.
        adapter: a folder with an adapter in PEFT's format, put into the weights before they are rounded.
        kind: `ScoredGemma2` for a reward model, in floats.

    Raises:
        MissingResource: a file, the device or the memory is not there.
        BadInput: the folder does not hold a sound Gemma 2 model; the cause names the tensors.
        UsageError: float16 was asked for, or the stored weights cannot become what was asked for.
    """
    checked = verify(folder, scored=kind is not Gemma2)
    if adapter and checked.scheme:
        raise UsageError(
            f"no adapter can be put on {folder}",
            f"its weights are quantised: {checked.scheme}",
            "put it on the float model that these were made from; --weights int8 or int4 quantises while loading",
        )
    form = _form(folder, checked, dtype, weights, group)
    where = usable_device(device)
    if form.lossless and where.type != "cpu":
        raise UsageError(
            f"{folder} cannot be loaded with lossless weights on {where}",
            "they are for reading less memory on a CPU",
            'use weights "bf16"',
        )
    config = checked.config if softcap else dataclasses.replace(checked.config, attn_softcap=None)
    if check_memory:
        refuse_too_large(folder, config, str(form), form.nbytes(config), str(where))
    with torch.device("meta"):
        model = kind(config)
        if form.scheme:
            use_packed_layers(model, form.scheme)
    with _explained(folder):
        reader = AdaptedReader(checked, read_adapter(adapter, config)) if adapter else Reader(checked)
        tensors = _tensors(reader, model, form, where, packed=checked.scheme is not None)
        reader.check_tied_head()
        model.load_state_dict(tensors, assign=True)
    return model


def _tensors(
    reader: Reader, model: Gemma2, form: "_Form", where: torch.device, *, packed: bool
) -> Mapping[str, torch.Tensor]:
    """All values of a model in the form that was asked for. `packed`: the folder has them so."""
    if packed:
        return {name: reader.packed(name, where) for name in reader.names()}
    if form.scheme:
        return {name: tensor.to(where) for name, tensor in rounded(reader, model.config, form.scheme)}
    if form.lossless:
        use_lossless_layers(model, reader)
        norms = (name for name in reader.names() if "norm" in name)
        return model.state_dict() | {name: reader.load(name, form.dtype, where) for name in norms}
    return {name: reader.load(name, form.dtype, where) for name in reader.names()}


@dataclass(frozen=True)
class _Form:
    """What weights are in memory: floats of a dtype, or quantised."""

    dtype: torch.dtype
    scheme: Scheme | None
    lossless: bool = False

    def nbytes(self, config: Gemma2Config) -> int:
        if self.lossless:
            return config.num_parameters * 3 // 2
        return self.scheme.nbytes(config) if self.scheme else config.num_parameters * self.dtype.itemsize

    def __str__(self) -> str:
        if self.lossless:
            return "12 bits without loss"
        return f"{self.scheme.bits} bits" if self.scheme else _name(self.dtype)


def _form(folder: Path, checked: Checked, dtype: torch.dtype | None, weights: str, group: int) -> _Form:
    """What was asked for, as far as the stored weights can become that."""
    if weights not in WEIGHTS:
        raise UsageError(f"no weights named {weights!r}", f"there are {', '.join(WEIGHTS)}", "use one of these")
    bits = {"int8": 8, "int4": 4}.get(weights)
    if checked.scheme and weights not in ("auto", f"int{checked.scheme.bits}"):
        raise UsageError(
            f"{folder} cannot be loaded with {weights} weights",
            f"it holds {checked.scheme.bits}-bit weights: what was rounded off is gone",
            "load it as it is, or load the model that it was made from",
        )
    scheme = checked.scheme or (Scheme(bits, group) if bits else None)
    if dtype is not None and (scheme or (weights == "bf16" and dtype != torch.bfloat16)):
        raise UsageError(
            f"{folder} cannot be loaded with {f'{scheme.bits}-bit' if scheme else weights} weights in {_name(dtype)}",
            "dtype is that of float weights; beside quantised ones everything else is float32",
            "leave one of the two out",
        )
    if scheme:
        return _Form(torch.float32, scheme)
    if weights == "lossless":
        if checked.dtype != "BF16" or dtype not in (None, torch.bfloat16):
            raise UsageError(
                f"{folder} cannot be loaded with lossless weights",
                f"they are stored bfloat16 in 12 bits each; these are {_name(dtype or TORCH[checked.dtype])}",
                'use weights "bf16" or "int8"',
            )
        return _Form(torch.bfloat16, None, lossless=True)
    target = dtype or (torch.bfloat16 if weights == "bf16" else TORCH[checked.dtype])
    _refuse_float16(folder, target, asked=dtype is not None)
    return _Form(target, None)


@dataclass(frozen=True)
class Facts:
    """What a model folder holds; dtype, nbytes and shards are empty when only its small files are there."""

    config: Gemma2Config
    parameters: int
    tokenizer: str | None  # the file that it would be read from
    scheme: Scheme | None  # how the weights are quantised; None: they are floats
    dtype: str | None  # as stored: "bfloat16", "float16", "float32", "int8" or "int4"
    nbytes: int  # of the weights as stored
    shards: tuple[Path, ...]


def describe(folder: Path) -> Facts:
    """Facts from the headers alone; the weights need not be there. Raises as `load_model` for an unsound folder."""
    folder = Path(folder)
    config, scheme = load_config(folder), load_scheme(folder)
    tokenizers = (name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file())
    tokenizer = next(tokenizers, None)
    try:
        checked = verify(folder)
    except MissingResource:  # fetched without its weights, or not all of them are here yet
        return Facts(config, config.num_parameters, tokenizer, scheme, None, 0, ())
    dtype = f"int{scheme.bits}" if scheme else _name(TORCH[checked.dtype])
    nbytes = sum(tensor.nbytes for tensor in checked.tensors.values())
    return Facts(config, config.num_parameters, tokenizer, scheme, dtype, nbytes, tuple(checked.files))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_float16(folder: Path, dtype: torch.dtype, *, asked: bool) -> None:
    if dtype in (torch.bfloat16, torch.float32, torch.float64):
        return
    name = _name(dtype)
    overflow = "Gemma 2's activations go beyond 65504, the largest float16: 27b answers with padding or nothing"
    cause = overflow if dtype is torch.float16 else "weights are computed with in bfloat16 or float32"
    hint = "use bfloat16, which takes the same memory (--dtype bfloat16, dtype=torch.bfloat16), or float32"
    if asked:
        raise UsageError(f"{folder} cannot run in {name}", cause, hint)
    raise BadInput(f"{folder} is stored in {name} and cannot run in it", cause, hint)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name, once it has held something. Raises `MissingResource` when it cannot."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()  # "meta" gives nothing back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MissingResource(
            f"device {str(device)!r} cannot be used",
            str(error).splitlines()[0] if str(error) else "torch does not have it",
            "use --device cpu, or see what this machine has with `cabochon doctor`",
        ) from None
    return found


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the operating system or the device refuse, as an error with a hint."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise  # torch has no class of its own for memory that the CPU lacks
        raise MissingResource(
            f"{folder} was not loaded",
            (str(error).splitlines() or ["there is not enough memory"])[0],
            "free some memory, choose a smaller model, or use --dtype bfloat16",
        ) from None
