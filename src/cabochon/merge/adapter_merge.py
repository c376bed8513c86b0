"""Adapters of one base merged into one adapter, without the base: weighted sums of what they add.

    linear  all A below, all B beside each other: exactly the sum; the ranks add up
    svd     the best approximation of that sum of a given rank (Eckart and Young 1936)

Every matrix of the result has scale 1. The sum of K adapters of rank r has at most rank K r, so its singular values
are those of a small matrix between two thin ones, and no matrix of the model's size is ever made.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.base.files import atomic_folder
from cabochon.merge.adapter_config import CONFIG
from cabochon.merge.adapters import EMBEDDING, PREFIX, WEIGHTS, Adapter
from cabochon.model.config import Gemma2Config
from cabochon.weights.names import shapes, to_hf
from cabochon.weights.save import Entry, write_safetensors


@dataclass(frozen=True)
class MergedAdapter:
    """Factors of what is added to each matrix: `b` [N, r] @ `a` [r, K], float32, by our names.

    `lost`: the share of the sum's energy (its squared length) that was cut off, over all matrices.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]  # a, b
    base_model: str | None
    lost: float = 0.0

    def delta(self, name: str) -> Tensor:
        """What is added to a matrix, float32 [N, K]."""
        a, b = self.factors[name]
        return b @ a


def merge_linear(adapters: Sequence[Adapter], weights: Sequence[float]) -> MergedAdapter:
    """The weighted sum of adapters, exactly. A matrix that some of them leave alone counts as unchanged by these.

    Raises:
        UsageError: there is not one weight for each adapter, or no adapter.
        BadInput: one is DoRA or brings whole tensors, whose sums mean something else.
    """
    factors = {name: (a.float(), b.float()) for name, (a, b) in _joined(adapters, weights).items()}
    return MergedAdapter(factors, adapters[0].settings.base_model)


def merge_svd(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> MergedAdapter:
    """The weighted sum of adapters, cut to a rank; exact where the sum has no higher one. Raises as `merge_linear`."""
    if rank < 1:
        raise UsageError(f"adapters cannot be merged to rank {rank}", "there is no such rank", "give 1 or more")
    factors, kept, whole = {}, 0.0, 0.0
    for name, (a, b) in _joined(adapters, weights).items():
        left, upper = torch.linalg.qr(b)
        right, lower = torch.linalg.qr(a.T)
        u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        # Both factors get the root, so that neither leaves the range of small types.
        roots = values[:rank].sqrt()
        factors[name] = ((roots[:, None] * v[:rank] @ right.T).float(), (left @ u[:, :rank] * roots).float())
        kept, whole = kept + float(values[:rank].square().sum()), whole + float(values.square().sum())
    return MergedAdapter(factors, adapters[0].settings.base_model, 1 - kept / whole if whole else 0.0)


def write_adapter(merged: MergedAdapter, folder: Path, config: Gemma2Config, *, overwrite: bool = False) -> None:
    """Write a folder that PEFT loads, whole or not at all.

    Args:
        merged: what to write, in float32.
        folder: new or empty, unless `overwrite`, which replaces an adapter and nothing else.
        config: of the base model.

    Raises:
        UsageError: the folder is in use.
        MissingResource: no space or no permission. Nothing is left behind.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} was not written", f"it has files in it and no {CONFIG}", "name a new folder, or an adapter's"
        )
    entries = [Entry(name, tuple(tensor.shape), partial(_whole, tensor)) for name, tensor in _named(merged).items()]
    try:
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            with (temporary / WEIGHTS).open("wb") as file:
                write_safetensors(file, entries, torch.float32)
            document = json.dumps(_document(merged, config), indent=2) + "\n"
            (temporary / CONFIG).write_text(document, encoding="utf-8")
    except OSError as error:
        raise MissingResource(
            f"{folder} was not written", error.strerror or str(error), "free some space or choose another place"
        ) from None


def _joined(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of the sum for every matrix, float64: all A [R, K], and all B [N, R] with their weights and scales."""
    if not adapters or len(adapters) != len(weights):
        cause = f"there are {len(adapters)} adapters and {len(weights)} weights"
        raise UsageError("adapters cannot be merged", cause, "give each adapter a weight")
    for adapter in adapters:
        if adapter.settings.use_dora or adapter.replaced:
            cause = "it uses DoRA" if adapter.settings.use_dora else f"it brings {to_hf(next(iter(adapter.replaced)))}"
            raise BadInput(
                f"the adapter in {adapter.folder} cannot be merged with others",
                f"{cause}, which does not add to the base and has no sum",
                "put each on the base (model: BASE+ADAPTER) and merge the models",
            )
    names = dict.fromkeys(name for adapter in adapters for name in adapter.deltas)
    joined = {}
    for name in names:
        parts = [
            (w, adapter.deltas[name]) for w, adapter in zip(weights, adapters, strict=True) if name in adapter.deltas
        ]
        a = torch.cat([delta.a.double() for _, delta in parts])
        b = torch.cat([delta.b.double() * (weight * delta.scale) for weight, delta in parts], dim=1)
        joined[name] = (a, b)
    return joined


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _named(merged: MergedAdapter) -> dict[str, Tensor]:
    """The factors by PEFT's names; of an embedding it holds the transposed product."""
    named: dict[str, Tensor] = {}
    for name, (a, b) in merged.factors.items():
        module = PREFIX + to_hf(name).removesuffix(".weight")
        if name == EMBEDDING:
            named |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            named |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return named


def _document(merged: MergedAdapter, config: Gemma2Config) -> dict[str, object]:
    """adapter_config.json. alpha is the rank everywhere, which makes the scale 1."""
    ranks = {to_hf(name).removesuffix(".weight"): len(a) for name, (a, _) in merged.factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": merged.base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": _targets(set(ranks), config),
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(modules: set[str], config: Gemma2Config) -> list[str]:
    """The ends of the modules' names, such as q_proj; whole names where not every layer's is among them."""
    matrices = [to_hf(name).removesuffix(".weight") for name, shape in shapes(config) if len(shape) == 2]
    ends = {module.rpartition(".")[2] for module in modules}
    reached = {module for module in matrices if module.rpartition(".")[2] in ends}
    return sorted(ends if reached == modules else modules)
