"""What a merge will do, tensor by tensor, before anything is read or written: `plan`.

Every tensor of the output becomes a `Job`: which tensors of which models it is made of, and the method's parameters
for it, which may depend on the layer and on the tensor's name. Everything that can be wrong with a configuration is
found here, from headers alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from cabochon.base.errors import BadInput, nearest
from cabochon.merge.config import MergeConfig, ModelRef, Parameters, Scalar, Slice, lookup
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.method import Method, Settings, bind, tensor_seed
from cabochon.merge.sources import Opened, refuse_other_architectures
from cabochon.merge.vocabulary import Vocabulary
from cabochon.model.config import Gemma2Config
from cabochon.weights.names import shapes, to_hf
from cabochon.weights.read import TORCH

EMBEDDING, FINAL_NORM = "embedding.weight", "final_norm.weight"


@dataclass(frozen=True)
class Operand:
    """A tensor of a model, by our name."""

    model: ModelRef
    name: str


@dataclass(frozen=True)
class Job:
    """One tensor of the output. `layer` is the decoder layer of the output that it belongs to, if any."""

    name: str
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    base: Operand | None
    settings: Settings
    layer: int | None = None

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """The models, then the base if there is one."""
        return self.operands if self.base is None else (*self.operands, self.base)


@dataclass(frozen=True)
class Plan:
    """A merge in full. `notes` are for the user to read; nothing is wrong with them."""

    method: Method
    jobs: tuple[Job, ...]
    shape: Gemma2Config
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None  # None: the embeddings are merged as they are

    @property
    def nbytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(torch.Size(job.shape).numel() for job in self.jobs) * self.dtype.itemsize

    def stages(self) -> Iterator[list[Job]]:
        """Jobs that have to be done together: those of a layer where the method measures layers, else one by one."""
        for _, jobs in groupby(self.jobs, key=lambda job: job.layer if self.method.per_layer else job.name):
            together = list(jobs)
            yield from [[job] for job in together] if together[0].layer is None else [together]


def plan(
    config: MergeConfig, models: Mapping[ModelRef, Opened], *, seed: int = 0, vocabulary: Vocabulary | None = None
) -> Plan:
    """Lay out a merge.

    Args:
        config: what the YAML says.
        models: every one of `config.models()`, opened.
        seed: of the methods that drop weights at random.
        vocabulary: what the embeddings are brought to first; None: they are merged as they are.

    Raises `BadInput`: an unknown method or parameter, a missing one, layers that a model does not have, models that
    differ in architecture, shapes or vocabulary.
    """
    method = METHODS.get(config.method)
    if method is None:
        close = nearest(config.method, METHODS)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(METHODS)}"
        raise BadInput(f"there is no merge method {config.method}", "its name is unknown", hint)
    first = models[config.base or config.models()[0]]
    ordered = [first, *(model for model in models.values() if model is not first)]
    notes = refuse_other_architectures(ordered)
    notes += _refuse_unknown_parameters(config, method)
    notes += [note for model in models.values() if model.adapter for note in model.adapter.notes]
    if vocabulary:
        notes += vocabulary.notes
    planner = _Planner(config, method, models, seed, None if vocabulary and vocabulary.unchanged else vocabulary)
    jobs = tuple(planner.jobs())
    layers = 1 + max(job.layer for job in jobs if job.layer is not None)
    shape = replace(first.config, num_layers=layers, vocab_size=jobs[0].shape[0])
    stored = TORCH[first.checked.dtype]
    dtype = getattr(torch, config.out_dtype or config.dtype or "", stored)
    return Plan(method, jobs, shape, dtype, (*notes, *_moved_layers(jobs)), planner.vocabulary)


class _Planner:
    """Walks the slices and makes jobs."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        models: Mapping[ModelRef, Opened],
        seed: int,
        vocabulary: Vocabulary | None,
    ) -> None:
        self._config, self._method, self._models, self._seed = config, method, models, seed
        self.vocabulary = vocabulary

    def jobs(self) -> Iterator[Job]:
        first, last = self._config.slices[0], self._config.slices[-1]
        # As in mergekit, what lies outside the layers has depth 0 in any gradient.
        yield self._job(EMBEDDING, [EMBEDDING] * len(first.sources), first, 0.0, None)
        out = 0
        for part in self._config.slices:
            starts, count = self._layers(part)
            for index in range(count):
                depth = index / (count - 1) if count > 1 else 1.0
                for suffix in _layer_tensors():
                    names = [f"layers.{start + index}.{suffix}" for start in starts]
                    yield self._job(f"layers.{out}.{suffix}", names, part, depth, out)
                out += 1
        yield self._job(FINAL_NORM, [FINAL_NORM] * len(last.sources), last, 0.0, None)

    def _layers(self, part: Slice) -> tuple[list[int], int]:
        """The first layer of each source and how many layers the slice has."""
        counts = {str(s.model): self._models[s.model].config.num_layers for s in part.sources}
        if part.base or self._config.base:
            base = part.base or self._config.base
            assert base is not None
            counts[str(base)] = self._models[base].config.num_layers
        if part.sources[0].layers is None:
            if len(set(counts.values())) > 1:
                found = ", ".join(f"{count} in {name}" for name, count in counts.items())
                raise BadInput("models of different depth cannot be merged whole", f"layers: {found}", "use slices")
            return [0] * len(part.sources), next(iter(counts.values()))
        for source in part.sources:
            assert source.layers is not None
            if source.layers[1] > counts[str(source.model)]:
                raise BadInput(
                    f"{source.model} has no layers {list(source.layers)}",
                    f"it has {counts[str(source.model)]} layers, counted from 0; the range leaves out its end",
                    "change layer_range",
                )
        starts = [source.layers[0] for source in part.sources if source.layers]
        first = part.sources[0].layers
        return starts, first[1] - first[0]

    def _job(self, name: str, names: list[str], part: Slice, depth: float, layer: int | None) -> Job:
        every = [Operand(s.model, n) for s, n in zip(part.sources, names, strict=True)]
        place = self._base_place(part)
        base = None if place is None else every[place]
        if place is None and self._method.base != "none" and part.sources[0].layers is None:
            ref = part.base or self._config.base
            base = Operand(ref, name) if ref else None
        if base is None and self._method.base == "required":
            cause = "the slice has no source that is base_model" if self._config.base else "it is missing"
            raise BadInput(f"{self._method.name} needs base_model", cause, "add base_model: MODEL, and it to the slice")
        kept = [i for i in range(len(every)) if i != place]
        shared, own = self._values(part, kept, name, names, depth)
        settings = bind(self._method, shared, own, seed=tensor_seed(self._seed, to_hf(name)))
        operands = tuple(every[i] for i in kept)
        return Job(name, self._shape(name, operands, base), operands, base, settings, layer)

    def _base_place(self, part: Slice) -> int | None:
        """Which source is the base. To a method that knows no base it is a model like the others."""
        base = part.base or self._config.base
        places = [i for i, s in enumerate(part.sources) if s.model == base]
        return places[0] if places and self._method.base != "none" else None

    def _values(
        self, part: Slice, kept: list[int], name: str, names: list[str], depth: float
    ) -> tuple[dict[str, Scalar], list[dict[str, Scalar]]]:
        """The method's parameters for one tensor: those for all models, and those of each model."""
        general: tuple[Parameters, ...] = (part.parameters, self._config.module_parameters, self._config.parameters)

        def values(levels: tuple[Parameters, ...], per_model: bool, tensor: str) -> dict[str, Scalar]:
            known = [p for p in self._method.parameters if p.per_model == per_model]
            found = {p.name: lookup(levels, p.name, to_hf(tensor), depth) for p in known}
            switches = {p.name for p in known if p.kind is bool}
            # mergekit reads every value as a number: 1 is as good as true
            return {n: bool(v) if n in switches and v in (0, 1) else v for n, v in found.items() if v is not None}

        own = [values((part.sources[i].parameters, *general), True, names[i]) for i in kept]
        return values(general, False, name), own

    def _shape(self, name: str, operands: tuple[Operand, ...], base: Operand | None) -> tuple[int, ...]:
        inputs = operands if base is None else (*operands, base)
        found = {self._models[o.model].shape(o.name): self._models[o.model].place(o.name) for o in inputs}
        if name == EMBEDDING and self.vocabulary:
            found = {(self.vocabulary.size, shape[1]): place for shape, place in found.items()}
        if len(found) > 1:
            hint = "align the vocabularies with tokenizer_source: base, or union"
            raise BadInput(
                "tensors of different shapes cannot be merged",
                "; ".join(f"{place} is {list(shape)}" for shape, place in found.items()),
                hint if name == EMBEDDING else "merge models of one size",
            )
        return next(iter(found))


def _layer_tensors() -> list[str]:
    """The tensors of one decoder layer, in the order in which a pass through the model meets them."""
    one = replace(Gemma2Config.preset("tiny"), num_layers=1)
    prefix = "layers.0."
    return [name.removeprefix(prefix) for name, _ in shapes(one) if name.startswith(prefix)]


def _refuse_unknown_parameters(config: MergeConfig, method: Method) -> list[str]:
    """Raise `BadInput` for a parameter that no method has; one that only others have is left out, with a note."""
    levels = [config.parameters, config.module_parameters]
    for part in config.slices:
        levels += [part.parameters, *(source.parameters for source in part.sources)]
    mine = {parameter.name for parameter in method.parameters}
    anyones = {parameter.name for other in METHODS.values() for parameter in other.parameters}
    notes = []
    for name in dict.fromkeys(name for level in levels for name in level if name not in mine):
        if name not in anyones:
            close = nearest(name, mine) or nearest(name, anyones)
            known = f"{method.name} has {', '.join(sorted(mine)) or 'none'}"
            raise BadInput(
                f"there is no parameter {name}", known, f"did you mean {close}?" if close else "leave it out"
            )
        notes.append(f"{name} means nothing to {method.name} and is left out")
    return notes


def _moved_layers(jobs: tuple[Job, ...]) -> list[str]:
    """A note when a layer that saw a window comes to stand where all is seen, or the other way round."""
    moved = [
        f"{number} of {operand.model} becomes {job.layer}"
        for job in jobs
        if job.layer is not None and job.name.endswith("attention.q.weight")
        for operand in job.operands
        if (number := int(operand.name.split(".")[1])) % 2 != job.layer % 2
    ]
    if not moved:
        return []
    some = "; ".join(moved[:3]) + ("; ..." if len(moved) > 3 else "")
    return [f"Gemma 2's even layers see a window and its odd ones everything, and these change places: {some}"]
