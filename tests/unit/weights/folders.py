"""Small model folders, sound ones and the parts to break them with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cabochon.model.gemma2 import Gemma2
from cabochon.weights.save import save_model
from support import SMALL, small_model


def saved(folder: Path, *, shard_bytes: int = 1 << 30, **options: Any) -> Gemma2:
    """Write a small model to a folder and return it."""
    model = small_model(SMALL)
    save_model(model, folder, shard_bytes=shard_bytes, **options)
    return model


def change_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a safetensors file; `__` in a name stands for a dot."""
    tensors: dict[str, Any] = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def change_json(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON object in a file; None removes them."""
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
