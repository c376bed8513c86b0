"""A merge of adapters from its configuration to a folder: open, check, merge, write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cabochon.base.errors import BadInput
from cabochon.base.files import sha256
from cabochon.base.version import package_version
from cabochon.merge.adapter_merge import MergedAdapter, check_sums, matrices, merge_adapters, write_adapter
from cabochon.merge.adapter_parse import AdapterConfig
from cabochon.merge.config import ModelRef
from cabochon.merge.methods.method import Settings
from cabochon.model.config import Gemma2Config
from cabochon.weights.adapter_config import CONFIG, WEIGHTS, read_settings
from cabochon.weights.adapters import Adapter, read_adapter
from cabochon.weights.hub import REPO_ID, adapter_folder, resolve
from cabochon.weights.verify import load_config

_CARD = """\
---
{base}library_name: peft
pipeline_tag: text-generation
tags: [gemma2, lora, merge, cabochon]
---

# {name}

A merge of {count} adapters for `{model}`, made by cabochon {version} with the method `{method}`.

| adapter | SHA-256 of the weights |
|---|---|
{rows}

{matrices} matrices, rank {ranks}.{lost}{seed}

## Configuration

`cabochon merge FILE OUT` makes it again.

```yaml
{config}
```
"""


@dataclass(frozen=True)
class AdapterMerge:
    """A merge whose adapters are open and fit their model. `notes` are for the user to read; nothing is wrong."""

    config: AdapterConfig
    adapters: tuple[Adapter, ...]
    base: ModelRef
    shape: Gemma2Config  # of the model that they are for
    seed: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls, config: AdapterConfig, *, seed: int = 0, token: str | None = None, offline: bool = False
    ) -> "AdapterMerge":
        """Find the adapters, fetching those on the Hub, and check them against their model.

        Raises as `adapter_folder`, `read_adapter` and `check_sums`; `BadInput` when it is not said what model that is,
        or for parameters that are missing or out of bounds.
        """
        folders = [adapter_folder(s.path, s.revision, token=token, offline=offline) for s in config.sources]
        base = config.base or _named_base(folders[0])
        model = resolve(base.path, revision=base.revision, token=token, offline=offline, weights=False)
        shape = load_config(model)
        adapters = tuple(read_adapter(folder, shape) for folder in folders)
        check_sums(adapters)
        made = cls(config, adapters, base, shape, seed, _notes(adapters))
        for name in made.matrices:
            made.settings(name, [i for i, adapter in enumerate(adapters) if name in adapter.deltas])
        return made

    @property
    def matrices(self) -> list[str]:
        """What the result changes, by our names."""
        return matrices(self.adapters)

    def settings(self, name: str, places: Sequence[int]) -> Settings:
        """The parameters of one matrix for some of the adapters. Raises `BadInput`."""
        return self.config.settings(name, places, self.shape.num_layers, self.seed)

    def merge(self, *, done: Callable[[str], None] = lambda _: None) -> MergedAdapter:
        """The merged adapter. `done` is called with each matrix. Raises as `merge_adapters`."""
        return merge_adapters(
            self.adapters,
            self.config.combination,
            self.settings,
            majority=self.config.majority,
            base_model=str(self.base),
            done=done,
        )

    def write(
        self, out: Path, *, overwrite: bool = False, done: Callable[[str], None] = lambda _: None
    ) -> MergedAdapter:
        """Merge, and write a folder that PEFT loads, with a card, whole or not at all; as `write_adapter`."""
        merged = self.merge(done=done)
        write_adapter(merged, out, self.shape, card=self._card(out.resolve().name, merged), overwrite=overwrite)
        return merged

    def _card(self, name: str, merged: MergedAdapter) -> str:
        hub = REPO_ID.fullmatch(self.base.path) and not Path(self.base.path).exists()
        ranks = sorted({len(part.a) for part in merged.factors.values()})
        rows = [
            f"| {source} | `{sha256(adapter.folder / WEIGHTS)}` |"
            for source, adapter in zip(self.config.sources, self.adapters, strict=True)
        ]
        return _CARD.format(
            base=f"base_model: {self.base.path}\n" if hub else "",
            name=name,
            count=len(self.adapters),
            model=self.base,
            version=package_version(),
            method=self.config.combination.name,
            rows="\n".join(rows),
            matrices=len(merged.factors),
            ranks=" to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))),
            lost=f" {100 * merged.lost:.3g}% of the sum's energy was cut off." if merged.lost else "",
            seed=f" Seed {self.seed}." if self.config.combination.random else "",
            config=self.config.text.strip(),
        )


def _named_base(folder: Path) -> ModelRef:
    name = read_settings(folder / CONFIG).base_model
    if name:
        return ModelRef(name)
    raise BadInput(
        "these adapters cannot be merged",
        f"the one in {folder} does not say what model it is for",
        "add base_model: MODEL to the configuration",
    )


def _notes(adapters: tuple[Adapter, ...]) -> tuple[str, ...]:
    bases = dict.fromkeys(adapter.settings.base_model for adapter in adapters)
    notes = list(dict.fromkeys(note for adapter in adapters for note in adapter.notes))
    if len(bases) > 1:
        notes.append(f"the adapters name different models: {', '.join(map(str, bases))}")
    return tuple(notes)
