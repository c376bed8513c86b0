"""Model folders as Hugging Face lays them out: `load_config`, `load_model`, `save_model`, `describe`.

verify (headers only) -> map the files -> tensor by tensor into the target dtype -> Gemma2
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.weights.mapped import MappedFile
from cabochon.weights.names import to_hf
from cabochon.weights.save import save_model
from cabochon.weights.verify import Checked, load_config, verify

__all__ = ["Facts", "describe", "load_config", "load_model", "save_model"]

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    softcap: bool = True,
) -> Gemma2:
    """The model in a folder, with weights that may be trained in place; the files are never written to.

    Args:
        folder: holds config.json and model.safetensors, or the shards that model.safetensors.index.json names.
        dtype: bfloat16, float32 or float64; None keeps what is stored (the embedding's dtype where they differ).
        device: where the weights go.
        softcap: False leaves the cap on attention scores out: another model, for inference only.

    Raises:
        MissingResource: a file, the device or the memory is not there.
        BadInput: the folder does not hold a sound Gemma 2 model; the cause names the tensors.
        UsageError: float16 was asked for.
    """
    checked = verify(folder)
    target = dtype or _TORCH[checked.dtype]
    _refuse_float16(folder, target, asked=dtype is not None)
    where = _usable_device(device)
    config = checked.config if softcap else dataclasses.replace(checked.config, attn_softcap=None)
    with torch.device("meta"):
        model = Gemma2(config)
    with _explained(folder):
        model.load_state_dict(_read(checked, target, where), assign=True)
    return model


@dataclass(frozen=True)
class Facts:
    """What a model folder holds; dtype, nbytes and shards are empty when only its small files are there."""

    config: Gemma2Config
    parameters: int
    tokenizer: str | None  # the file that it would be read from
    dtype: str | None  # as stored: "bfloat16", "float16" or "float32"
    nbytes: int  # of the weights as stored
    shards: tuple[Path, ...]


def describe(folder: Path) -> Facts:
    """Facts from the headers alone; the weights need not be there. Raises as `load_model` for an unsound folder."""
    folder = Path(folder)
    config = load_config(folder)
    tokenizers = (name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file())
    tokenizer = next(tokenizers, None)
    try:
        checked = verify(folder)
    except MissingResource:  # fetched without its weights, or not all of them are here yet
        return Facts(config, config.num_parameters, tokenizer, None, 0, ())
    dtype = str(_TORCH[checked.dtype]).removeprefix("torch.")
    nbytes = sum(tensor.nbytes for tensor in checked.tensors.values())
    return Facts(config, config.num_parameters, tokenizer, dtype, nbytes, tuple(checked.files))


def _read(checked: Checked, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """All parameters by our names, read in the order in which they lie in the files."""
    files = {path: MappedFile(path) for path in checked.files}
    order = sorted(checked.tensors.items(), key=lambda item: (item[1].path, item[1].start))
    weights = {}
    for name, stored in order:
        source = files[stored.path].tensor(stored, _TORCH[stored.dtype])
        weights[name], finite = source.load(dtype, device)
        if not finite:
            raise BadInput(
                f"the weights in {stored.path.parent} cannot be used",
                f"{to_hf(name)} has values that are infinite or not a number",
                "training has diverged or the file is damaged: use an earlier checkpoint, or fetch it again",
            )
    if checked.tied_head:
        head, embedding = checked.tied_head, checked.tensors["embedding.weight"]
        second = MappedFile(head.path).tensor(head, _TORCH[head.dtype])
        first = files[embedding.path].tensor(embedding, _TORCH[embedding.dtype])
        if not second.equals(first):
            raise BadInput(
                f"the weights in {head.path.parent} are not a Gemma 2 model",
                "lm_head.weight differs from model.embed_tokens.weight; Gemma 2 has one matrix for both",
                "remove lm_head.weight if the embedding is what was trained",
            )
    return weights


def _refuse_float16(folder: Path, dtype: torch.dtype, *, asked: bool) -> None:
    if dtype in (torch.bfloat16, torch.float32, torch.float64):
        return
    name = str(dtype).removeprefix("torch.")
    overflow = "Gemma 2's activations go beyond 65504, the largest float16: 27b answers with padding or nothing"
    cause = overflow if dtype is torch.float16 else "weights are computed with in bfloat16 or float32"
    hint = "use bfloat16, which takes the same memory (--dtype bfloat16, dtype=torch.bfloat16), or float32"
    if asked:
        raise UsageError(f"{folder} cannot run in {name}", cause, hint)
    raise BadInput(f"{folder} is stored in {name} and cannot run in it", cause, hint)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
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
