"""Adapters of one base merged into one adapter, without the base. What the names mean: adapter_methods.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.adapter_methods import Combination, Merged, combine
from cabochon.merge.methods.method import Settings
from cabochon.model.config import Gemma2Config
from cabochon.weights.adapter_config import EMBEDDING
from cabochon.weights.adapter_save import Factors, write_factors
from cabochon.weights.adapters import Adapter
from cabochon.weights.names import to_hf

# The settings for one matrix, by our name of it, and which of the adapters change it.
SettingsOf = Callable[[str, Sequence[int]], Settings]


@dataclass(frozen=True)
class MergedAdapter:
    """What is added to each matrix, by our names.

    `lost`: the share of the sum's energy (its squared length) that was cut off, over all matrices.
    """

    factors: Mapping[str, Merged]
    base_model: str | None
    lost: float = 0.0

    def delta(self, name: str) -> Tensor:
        """What is added to a matrix, float32 [N, K]."""
        return self.factors[name].b.float() @ self.factors[name].a.float()


def merge_adapters(
    adapters: Sequence[Adapter],
    combination: Combination,
    settings: SettingsOf,
    *,
    majority: str = "total",
    base_model: str | None = None,
    done: Callable[[str], None] = lambda _: None,
) -> MergedAdapter:
    """Merge adapters matrix by matrix. One that leaves a matrix alone has no say in it.

    Args:
        adapters: read for the same base.
        combination: one of `COMBINATIONS`.
        settings: gives the parameters for each matrix.
        majority: one of `MAJORITIES`.
        base_model: what the result says it is for; None: what the first adapter says.
        done: called with the name of each matrix that is merged.

    Raises `BadInput`: one is DoRA or brings whole tensors, whose sums mean something else; or as `combine`.
    """
    check_sums(adapters)
    factors = {}
    for name in matrices(adapters):
        places = [i for i, adapter in enumerate(adapters) if name in adapter.deltas]
        try:
            factors[name] = combine(
                [adapters[i].deltas[name] for i in places],
                combination,
                settings(name, places),
                majority=majority,
                embedding=name == EMBEDDING,
            )
        except BadInput as error:
            raise BadInput(f"{to_hf(name)}: {error.what}", error.cause, error.hint) from None
        done(name)
    whole, kept = (sum(getattr(part, field) for part in factors.values()) for field in ("whole", "kept"))
    return MergedAdapter(factors, base_model or adapters[0].settings.base_model, 1 - kept / whole if whole else 0.0)


def matrices(adapters: Sequence[Adapter]) -> list[str]:
    """Everything that any of the adapters changes, by our names."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.deltas))


def check_sums(adapters: Sequence[Adapter]) -> None:
    """Raise `BadInput` unless all adapters only add to matrices."""
    for adapter in adapters:
        if adapter.settings.use_dora or adapter.replaced:
            cause = "it uses DoRA" if adapter.settings.use_dora else f"it brings {to_hf(next(iter(adapter.replaced)))}"
            raise BadInput(
                f"the adapter in {adapter.folder} cannot be merged with others",
                f"{cause}, which does not add to the base and has no sum",
                "put each on the base (model: BASE+ADAPTER) and merge the models",
            )


def write_adapter(
    merged: MergedAdapter, folder: Path, config: Gemma2Config, *, card: str | None = None, overwrite: bool = False
) -> None:
    """Write a folder that PEFT loads, whole or not at all.

    Args:
        merged: what to write, in float32.
        folder: new or empty, unless `overwrite`, which replaces an adapter and nothing else.
        config: of the base model.
        card: the README.md; None: what every adapter has.

    Raises:
        UsageError: the folder is in use.
        MissingResource: no space or no permission. Nothing is left behind.
    """
    factors = {name: Factors(part.a, part.b, alpha=len(part.a)) for name, part in merged.factors.items()}
    write_factors(folder, factors, config, base_model=merged.base_model, card=card, overwrite=overwrite)
