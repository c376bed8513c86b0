"""What a merge is told, in the words of mergekit's YAML, brought to one form. `parse.py` reads the file.

The file has `models` (whole models), `slices` (stacks of layers) or `modules` (either, below the name of the only part
that Gemma 2 has); all three become slices here. A parameter's value is looked for in this order: the source of a slice,
the slice, the module, the file. It is a scalar, a list (a gradient over the layers of the slice), or a list of
`{filter, value}`, of which the first whose filter occurs in the tensor's name counts.

Source: the documentation of mergekit 0.1.5, and its behaviour.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Scalar = float | bool


@dataclass(frozen=True)
class ModelRef:
    """A model of a merge, `PATH[@REVISION][+ADAPTER[@REVISION]]`: folders or Hub ids."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Read the text form. Raises `ValueError`: more than one `+`, more than one `@` in a part, or no path."""
        model, *adapters = text.split("+")
        if len(adapters) > 1 or any(part.count("@") > 1 for part in (model, *adapters)):
            raise ValueError(f"{text!r} has too many + or @")
        path, _, revision = model.partition("@")
        adapter, _, adapter_revision = (adapters or [""])[0].partition("@")
        if not path or (adapters and not adapter):
            raise ValueError(f"{text!r} leaves out a path")
        return cls(path, revision or None, adapter or None, adapter_revision or None)

    def __str__(self) -> str:
        adapter = f"+{self.adapter}" if self.adapter else ""
        return _at(self.path, self.revision) + _at(adapter, self.adapter_revision)


@dataclass(frozen=True)
class Filtered:
    """A value for the tensors whose name has `filter` in it; None or "*": for all."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    def covers(self, tensor: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor


Setting = Scalar | tuple[Scalar, ...] | tuple[Filtered, ...]
Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model's part in a slice: layers `layers[0]` up to, without, `layers[1]`; None: all."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the output that are made of the same layers of some models."""

    sources: tuple[Source, ...]
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TokenChoice:
    """Where the embedding of a token comes from: a model (its token of this text, `token` or `token_id`) or zeros."""

    model: ModelRef | None  # None: zeros
    token: str | None = None
    token_id: int | None = None
    force: bool = False  # also for models that have the token


@dataclass(frozen=True)
class TokenizerChoice:
    """`tokenizer_source`, or the longer `tokenizer`."""

    source: str | ModelRef  # "base", "union" or a model
    tokens: Mapping[str, TokenChoice | bool] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergeConfig:
    """One merge. `text` is the file as it was, for the model card."""

    method: str
    slices: tuple[Slice, ...]
    base: ModelRef | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    module_parameters: Parameters = field(default_factory=dict)
    parameters: Parameters = field(default_factory=dict)
    text: str = ""

    def models(self) -> tuple[ModelRef, ...]:
        """Every model that takes part, in the order of the file; a base that is only named as such is the last."""
        bases = [self.base, *(s.base for s in self.slices)]
        named = [source.model for s in self.slices for source in s.sources] + [b for b in bases if b]
        return tuple(dict.fromkeys(named))


def evaluate(setting: Setting, tensor: str, depth: float) -> Scalar | None:
    """A setting's value for a tensor (its Hugging Face name) at a depth from 0 to 1; None where no filter fits."""
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Filtered):
        chosen = next((f for f in setting if isinstance(f, Filtered) and f.covers(tensor)), None)
        return None if chosen is None else evaluate(chosen.value, tensor, depth)
    values = [value for value in setting if not isinstance(value, Filtered)]
    place = depth * (len(values) - 1)
    low = int(place)
    if any(isinstance(value, bool) for value in values):  # what is true or false has nothing between
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def lookup(levels: tuple[Parameters, ...], name: str, tensor: str, depth: float) -> Scalar | None:
    """The value of a parameter in the first of some levels that has one for this tensor."""
    for level in levels:
        value = evaluate(level[name], tensor, depth) if name in level else None
        if value is not None:
            return value
    return None


def _at(path: str, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else path
