"""Write adapters as PEFT does: adapter_config.json, adapter_model.safetensors, and a model card for the Hub."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.files import atomic_folder
from cabochon.base.version import package_version
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraLinear, adapters
from cabochon.weights.adapter_config import CONFIG, EMBEDDING, PREFIX, WEIGHTS, module_name
from cabochon.weights.hub import BUILT_IN_ID, REPO_ID
from cabochon.weights.names import shapes
from cabochon.weights.save import Entry, write_safetensors

_CARD = """\
---
{base}library_name: peft
pipeline_tag: text-generation
tags: [gemma2, lora, cabochon]
---

# {kind} for {model}

An adapter of rank {rank}, written by cabochon {version}.

    cabochon chat --adapter FOLDER MODEL

PEFT loads it as well (`PeftModel.from_pretrained`).
"""


@dataclass(frozen=True)
class Factors:
    """What is stored of one matrix: `a` [r, K], `b` [N, r], what their scale is made of, and DoRA's lengths [N]."""

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None


def save_adapter(
    model: Gemma2,
    folder: Path,
    *,
    base_model_name: str | None,
    overwrite: bool = False,
    whole: Callable[[str], Tensor] | None = None,
) -> None:
    """Write the adapters of a model as a folder that PEFT loads, whole or not at all; float32.

    Args:
        model: with adapters (model/lora.py).
        folder: new or empty, unless `overwrite`, which replaces an adapter and nothing else.
        base_model_name: what the adapter says it belongs to: a Hub id, or a folder.
        whole: gives a parameter by its name, where this process has only a part of each.

    Raises:
        UsageError: the model has no adapters, or the folder is in use.
        MissingResource: no space or no permission. Nothing is left behind.
    """
    layers = adapters(model)
    if not layers:
        raise UsageError(
            f"{folder} was not written", "the model has no adapters", "attach some, or save the model (save_model)"
        )
    factors = {f"{name}.weight": _factors(name, layer, whole) for name, layer in layers.items()}
    first = next(iter(layers.values()))
    write_factors(
        folder,
        factors,
        model.config,
        base_model=base_model_name,
        rslora=first.rslora,
        dropout=first.dropout,
        overwrite=overwrite,
    )


def _factors(name: str, layer: LoraLinear, whole: Callable[[str], Tensor] | None) -> Factors:
    if whole is None:
        return Factors(layer.a, layer.b, layer.alpha, layer.magnitude)
    magnitude = None if layer.magnitude is None else whole(f"{name}.magnitude")
    return Factors(whole(f"{name}.a"), whole(f"{name}.b"), layer.alpha, magnitude)


def write_factors(
    folder: Path,
    factors: Mapping[str, Factors],
    config: Gemma2Config,
    *,
    base_model: str | None,
    rslora: bool = False,
    dropout: float = 0.0,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write matrices by our names as an adapter of a model of this configuration; else as `save_adapter`.

    `card`: the README.md, instead of the one that every adapter has.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} was not written", f"it has files in it and no {CONFIG}", "name a new folder, or an adapter's"
        )
    document = _document(factors, config, base_model, rslora, dropout)
    entries = [Entry(name, tuple(tensor.shape), partial(_whole, tensor)) for name, tensor in _named(factors)]
    try:
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            with (temporary / WEIGHTS).open("wb") as file:
                write_safetensors(file, entries, torch.float32)
            (temporary / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (temporary / "README.md").write_text(card or _card(document), encoding="utf-8")
    except OSError as error:
        raise MissingResource(
            f"{folder} was not written", error.strerror or str(error), "free some space or choose another place"
        ) from None


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _named(factors: Mapping[str, Factors]) -> Iterable[tuple[str, Tensor]]:
    """Tensors by PEFT's names; of an embedding it holds the transposed product."""
    for name, part in factors.items():
        module = PREFIX + module_name(name)
        if name == EMBEDDING:
            yield from ((f"{module}.lora_embedding_A", part.b.T), (f"{module}.lora_embedding_B", part.a.T))
        else:
            yield from ((f"{module}.lora_A.weight", part.a), (f"{module}.lora_B.weight", part.b))
        if part.magnitude is not None:
            yield f"{module}.lora_magnitude_vector", part.magnitude


def _document(
    factors: Mapping[str, Factors], config: Gemma2Config, base_model: str | None, rslora: bool, dropout: float
) -> dict[str, Any]:
    """adapter_config.json: the most frequent rank and alpha, and by whole names those that differ."""
    ranks = {module_name(name): len(part.a) for name, part in factors.items()}
    alphas = {module_name(name): _plain(part.alpha) for name, part in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _targets(set(ranks), config),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": any(part.magnitude is not None for part in factors.values()),
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(modules: set[str], config: Gemma2Config) -> list[str]:
    """The ends of the modules' names, such as q_proj; whole names where not every layer's is among them."""
    matrices = [module_name(name) for name, shape in shapes(config) if len(shape) == 2]
    ends = {module.rpartition(".")[2] for module in modules}
    reached = {module for module in matrices if module.rpartition(".")[2] in ends}
    return sorted(ends if reached == modules else modules)


def _card(document: Mapping[str, Any]) -> str:
    base = document["base_model_name_or_path"]
    on_hub = base not in (None, BUILT_IN_ID) and REPO_ID.fullmatch(base) is not None and not Path(base).exists()
    kind = "DoRA" if document["use_dora"] else "rsLoRA" if document["use_rslora"] else "LoRA"
    return _CARD.format(
        base=f"base_model: {base}\n" if on_hub else "",
        model=f"`{base}`" if base else "a Gemma 2",
        kind=kind,
        rank=document["r"],
        version=package_version(),
    )
