"""What a merge method is, and how one is called: the seam between the formulas and whoever feeds them tensors.

A method never sees a whole model and never touches a file. For each tensor of the output it is called like this:

    settings = bind(method, shared, per_model, seed=tensor_seed(seed, name))   # parameters checked and filled in
    whole = Whole(tensors, base, run=pool.map)                                 # views, as they lie in the files
    merge(method, whole, settings, out)                                        # writes `out`, of any float type

`bind` is cheap: call it for every tensor, since parameters may differ from tensor to tensor. `whole.tensors` are the
models in their order without the base, `whole.base` is the base. A method whose `base` is "none" knows no base: there
a base model that is listed among the models is a model like the others.

Methods marked `per_layer` need one number for all tensors of a decoder layer, so they go in two steps:

    measured = {name: method.measure(whole of name, settings) for every tensor of the layer}
    merge(method, whole, settings, out, measured=sum of them)                  # for every tensor of the layer

What such a method measures is a tensor that may be added up. Tensors outside the decoder layers are measured alone.

Everything is done in blocks of whole rows, a few MB each, so that tensors of any size need no more memory than the
blocks in flight. `run` decides who computes them: the builtin `map`, or the map of a pool of threads. It must not be
called from inside a thread of the same pool. The result has the same bits for any `run` and any size of blocks.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, nearest
from cabochon.merge.methods.blocks import Block, Sink, Whole, into

Apply = Callable[[Block], Tensor]


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, under the name that a configuration file uses.

    `per_model`: a value for each model (never for the base); otherwise one value for the tensor.
    `low` and `high` are allowed values themselves. A default of None means that the parameter may be left out.
    """

    name: str
    kind: type[float] | type[int] | type[bool] = float
    default: float | bool | Required | None = REQUIRED
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf

    def checked(self, value: Any, method: str) -> Any:
        """The value as its kind. Raises `BadInput` if it is another kind of thing, not finite or out of bounds."""
        if value is None and self.default is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = isinstance(value, bool) if self.kind is bool else number
        if self.kind is int and right:
            right = float(value).is_integer()
        if not right or not math.isfinite(value) or not self.low <= value <= self.high:
            raise BadInput(
                f"{self.name} of {method} cannot be {value!r}", f"it has to be {self.rule}", f"change {self.name}"
            )
        return self.kind(value)

    @property
    def rule(self) -> str:
        """The allowed values, in words."""
        if self.kind is bool:
            return "true or false"
        noun = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{noun} from {self.low:g} to {self.high:g}"
        if math.isfinite(self.low):
            return f"{noun} of at least {self.low:g}"
        return noun


@dataclass(frozen=True)
class Settings:
    """The parameters of one call, complete and checked: `shared[name]`, and `per_model[name][i]` of model i."""

    method: str
    models: int
    shared: Mapping[str, Any]
    per_model: Mapping[str, tuple[Any, ...]]
    seed: int = 0  # see `tensor_seed`


@dataclass(frozen=True)
class Method:
    """A merge method: `prepare(settings, measured)` gives the function from a block of inputs to a block of output.

    prepare: called once per tensor. Raises `BadInput` for values that cannot be used together.
    source: the paper or page that the formula comes from.
    base: whether a base model has to be given, may be given, or means nothing to this method.
    models: the least and the most models, without the base; None for no limit.
    measure: what has to be known about whole tensors first; it may read them several times.
    per_layer: what is measured is added up over the tensors of a decoder layer.
    random: the result depends on `Settings.seed`.
    """

    name: str
    source: str
    prepare: Callable[[Settings, Any], Apply]
    parameters: tuple[Parameter, ...] = ()
    base: Literal["none", "optional", "required"] = "none"
    models: tuple[int, int | None] = (1, None)
    measure: Callable[[Whole, Settings], Any] | None = None
    per_layer: bool = False
    random: bool = False


def bind(
    method: Method, shared: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> Settings:
    """Check parameters and fill in defaults; `per_model` has one mapping for each model, in order, without the base.

    Raises `BadInput`: a wrong number of models, a name that the method does not have, a value that is missing, of the
    wrong kind or out of bounds.
    """
    least, most = method.models
    if not least <= len(per_model) <= (most or len(per_model)):
        allowed = f"exactly {least}" if least == most else f"at least {least}"
        beside = "" if method.base == "none" else " beside the base"
        raise BadInput(
            f"{method.name} cannot merge {len(per_model)} models{beside}",
            f"it needs {allowed}",
            "change the list of models, or choose another merge method",
        )
    return filled(method.name, method.parameters, shared, per_model, seed=seed)


def filled(
    name: str,
    parameters: Sequence[Parameter],
    shared: Mapping[str, Any],
    per_model: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
) -> Settings:
    """Settings of a method of this name with these parameters; else as `bind`, for any number of models."""
    known = {parameter.name for parameter in parameters}
    for given in (shared, *per_model):
        for unknown in given.keys() - known:
            close = nearest(unknown, known)
            hint = f"did you mean {close}?" if close else f"it has: {', '.join(sorted(known)) or 'no parameters'}"
            raise BadInput(f"{name} has no parameter {unknown}", "the name is unknown", hint)
    single = {p.name: _value(p, shared, name) for p in parameters if not p.per_model}
    several = {
        p.name: tuple(_value(p, {**shared, **own}, name) for own in per_model) for p in parameters if p.per_model
    }
    return Settings(name, len(per_model), single, several, seed)


def _value(parameter: Parameter, given: Mapping[str, Any], method: str) -> Any:
    value = given.get(parameter.name, parameter.default)
    if isinstance(value, Required):
        each = " for every model" if parameter.per_model else ""
        raise BadInput(
            f"{method} needs {parameter.name}{each}",
            "it has no default and was not given",
            f"add `{parameter.name}: ...` under `parameters`{each}",
        )
    return parameter.checked(value, method)


def tensor_seed(seed: int, name: str) -> int:
    """The seed for one tensor of a merge, so that a result depends on no order and no number of threads."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def merge(
    method: Method,
    whole: Whole,
    settings: Settings,
    out: Tensor | Sink,
    *,
    measured: Any = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Merge one tensor into `out`: a tensor of the same shape and any float type, or a sink that takes its blocks.

    `measured` is what `method.measure` gave, added up over a layer for methods that are `per_layer`; left out, it is
    measured here, from this tensor alone. `dtype` is what a sink makes of its blocks.

    Raises `BadInput`: the inputs differ in shape, hold values that are not finite, or do not fit the type of `out`.
    """
    if (whole.base is None and method.base == "required") or (whole.base is not None and method.base == "none"):
        need = "needs a" if method.base == "required" else "knows no"
        raise BadInput(f"{method.name} {need} base model", f"its base is {method.base}", "change base_model")
    assert len(whole.tensors) == settings.models, (len(whole.tensors), settings.models)
    if not whole.numel:
        return
    if measured is None and method.measure is not None:
        measured = method.measure(whole, settings)
    sink, dtype = (into(out), out.dtype) if isinstance(out, Tensor) else (out, dtype)
    whole.write(method.prepare(settings, measured), sink, dtype)
