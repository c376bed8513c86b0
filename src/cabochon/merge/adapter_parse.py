"""A merge of adapters, in a file like mergekit's: `adapters` in the place of `models`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cabochon.base.errors import nearest
from cabochon.merge.adapter_methods import COMBINATIONS, MAJORITIES, Combination
from cabochon.merge.config import MergeConfig, ModelRef, Parameters, lookup
from cabochon.merge.methods.method import Settings, filled, tensor_seed
from cabochon.merge.parse import Parser, parse_document, read_document
from cabochon.weights.names import to_hf

KEY = "adapters"  # a file that has it merges adapters
_TOP = (KEY, "merge_method", "base_model", "majority_sign_method", "parameters")


@dataclass(frozen=True)
class AdapterSource:
    """One adapter, a folder or a Hub id, and its own parameters."""

    path: str
    revision: str | None = None
    parameters: Parameters = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class AdapterConfig:
    """One merge of adapters. `base`: the model that they are for; None: what the first says. `text`: the file."""

    combination: Combination
    sources: tuple[AdapterSource, ...]
    base: ModelRef | None = None
    majority: str = "total"
    parameters: Parameters = field(default_factory=dict)
    text: str = ""

    def settings(self, name: str, places: Sequence[int], layers: int, seed: int) -> Settings:
        """The parameters of one matrix, by our name, for those adapters that change it. Raises `BadInput`.

        As in merges of models a list is a gradient over the layers, and filters look at the tensor's name.
        """
        number = int(name.split(".")[1]) if name.startswith("layers.") else 0
        depth = number / (layers - 1) if layers > 1 else 0.0

        def found(levels: tuple[Parameters, ...], per_model: bool) -> dict[str, Any]:
            known = [p.name for p in self.combination.parameters if p.per_model == per_model]
            values = {p: lookup(levels, p, to_hf(name), depth) for p in known}
            return {p: value for p, value in values.items() if value is not None}

        own = [found((self.sources[i].parameters, self.parameters), True) for i in places]
        combination = self.combination
        shared = found((self.parameters,), False)
        return filled(combination.name, combination.parameters, shared, own, seed=tensor_seed(seed, to_hf(name)))


def read_either(path: Path) -> MergeConfig | AdapterConfig:
    """The merge that a file describes, of models or of adapters. Raises as `read_config`."""
    document, text = read_document(path)
    parser = _Parser(str(path))
    if isinstance(document, dict) and KEY in document:
        return parser.adapters(document, text)
    return parser.config(document, text)


def parse_adapters(text: str, file: str = "the configuration") -> AdapterConfig:
    """The merge of adapters that YAML describes. Raises `BadInput`; `file` is named in errors."""
    return _Parser(file).adapters(parse_document(text, file), text)


class _Parser(Parser):
    def adapters(self, document: Any, text: str) -> AdapterConfig:
        top = self.mapping(document, "the file", _TOP)
        method = self.text(top.get("merge_method"), "merge_method")
        if method not in COMBINATIONS:
            close = nearest(method, COMBINATIONS)
            hint = f"did you mean {close}?" if close else f"choose one of {', '.join(COMBINATIONS)}"
            self.fail("merge_method", f"adapters cannot be merged by {method}", hint)
        majority = self.optional(top, "majority_sign_method", self.text) or MAJORITIES[0]
        if majority not in MAJORITIES:
            self.fail("majority_sign_method", f"it is {majority}", f"write {' or '.join(MAJORITIES)}")
        combination = COMBINATIONS[method]
        sources = tuple(self._adapter(value, f"{KEY}[{i}]") for i, value in self.items(top[KEY], KEY))
        base = self.optional(top, "base_model", self.model)
        if base and base.adapter:
            self.fail("base_model", "it has an adapter of its own", f"write {ModelRef(base.path, base.revision)}")
        config = AdapterConfig(
            combination,
            sources,
            base,
            majority,
            self.parameters(top.get("parameters"), "parameters"),
            text,
        )
        known = {parameter.name for parameter in combination.parameters}
        for level in (config.parameters, *(source.parameters for source in sources)):
            for name in level.keys() - known:
                close = nearest(name, known)
                hint = f"did you mean {close}?" if close else f"{method} has {', '.join(sorted(known))}"
                self.fail("parameters", f"the parameter {name} is unknown to {method}", hint)
        return config

    def _adapter(self, value: Any, where: str) -> AdapterSource:
        level = self.mapping(value, where, ("adapter", "parameters"))
        path, revision = self.path(level.get("adapter"), f"{where}.adapter")
        if not path:
            self.fail(f"{where}.adapter", "it is missing", "name a folder or a Hub id")
        return AdapterSource(path, revision, self.parameters(level.get("parameters"), f"{where}.parameters"))
