"""The tensors of one merge, read and written in blocks of whole rows.

R and C are the rows and columns of a tensor: one with a single dimension is one row, one with more than two has the
last as its columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.model.kernels.vectors import weighted_sum

T = TypeVar("T")
# Takes rows of the output, float32 [r, C] or as `Whole.write` says: from which element of the flattened tensor on, and
# the values.
Sink = Callable[[int, Tensor], None]
Run = Callable[[Callable[[range], T], Iterable[range]], Iterable[T]]

# Elements of a block. Smaller ones stay in a core's cache, but then Python, which runs one thread at a time, is what
# takes time: `dare_ties` takes 26 s with a quarter of this, 15 with this, 20 with twice as many.
BLOCK = 1 << 20

# Sums of floats depend on where they are cut, so whoever sums over blocks cuts here, whatever the caller's blocks.
MEASURED_BLOCK = 1 << 20


@dataclass(frozen=True)
class Block:
    """The same rows of all inputs, [r, C]. They may be views of files: never write into them."""

    models: tuple[Tensor, ...]  # as they are stored
    root: Tensor | None  # the base, likewise
    start: int  # index of the first element in the flattened tensor

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The models in float32."""
        return tuple(tensor.to(torch.float32) for tensor in self.models)

    @cached_property
    def base(self) -> Tensor | None:
        """The base in float32."""
        return None if self.root is None else self.root.to(torch.float32)

    @property
    def origin(self) -> Tensor:
        """The base, of methods that cannot do without."""
        assert self.base is not None
        return self.base

    def deltas(self) -> list[Tensor]:
        """Task vectors, new ones: each model minus the base, float32; the models themselves without a base."""
        if self.root is None:
            return list(self.tensors)
        return [weighted_sum((model, self.root), (1.0, -1.0))[0] for model in self.models]

    def added_to_base(self, delta: Tensor, scale: float) -> Tensor:
        """scale * delta + base, float32."""
        assert self.root is not None
        return weighted_sum((delta, self.root), (scale, 1.0))[0]


@dataclass(frozen=True)
class Combination:
    """A sum of models, and of the base if it has a coefficient, last; made in one pass from what is stored."""

    coefficients: tuple[float, ...]

    def __call__(self, block: Block) -> Tensor:
        """The sum in float32 [r, C]."""
        inputs = block.models if block.root is None else (*block.models, block.root)
        return weighted_sum(inputs[: len(self.coefficients)], self.coefficients)[0]


@dataclass(frozen=True)
class Whole:
    """All inputs of one output tensor: float tensors of one shape, usually views of mapped files.

    Raises `BadInput` when made of tensors that differ in shape or are not floats.
    """

    tensors: tuple[Tensor, ...]
    base: Tensor | None = None
    run: Callable[..., Iterable[object]] = map  # calls a function with each of many things, results in their order
    block: int = BLOCK  # elements, at least one row
    names: tuple[str, ...] = ()  # what errors call the inputs; empty: by their number

    def __post_init__(self) -> None:
        _keep_freed_memory()
        inputs = self.inputs
        for tensor in inputs:
            if tensor.shape != inputs[0].shape:
                shapes = " and ".join(str(list(s)) for s in dict.fromkeys(t.shape for t in inputs))
                raise BadInput(
                    "tensors of different shapes cannot be merged",
                    f"they have the shapes {shapes}",
                    "merge models of one size; tokenizer_source aligns vocabularies",
                )
            if not tensor.dtype.is_floating_point:
                raise BadInput(
                    "only floats can be merged", f"a tensor holds {tensor.dtype}", "use models that are not quantised"
                )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The models, then the base if there is one."""
        return self.tensors if self.base is None else (*self.tensors, self.base)

    @property
    def numel(self) -> int:
        return self.inputs[0].numel()

    @property
    def columns(self) -> int:
        shape = self.inputs[0].shape
        return shape[-1] if shape else 1

    def blocks(self) -> Iterator[range]:
        """The rows of each block, in order."""
        rows = self.numel // self.columns if self.numel else 0
        step = max(1, self.block // max(1, self.columns))
        return (range(first, min(first + step, rows)) for first in range(0, rows, step))

    def stored(self, rows: range) -> list[Tensor]:
        """Some rows [r, C] of every input as they are, usually views of files."""
        return [tensor.reshape(-1, self.columns)[rows.start : rows.stop] for tensor in self.inputs]

    def load(self, rows: range) -> Block:
        """Some rows of every input, for a method."""
        models = self.stored(rows)
        root = None if self.base is None else models.pop()
        return Block(tuple(models), root, rows.start * self.columns)

    def map(self, function: Callable[[Block], T]) -> Iterable[T]:
        """Call a function with each block, perhaps in threads; the results come in the order of the blocks.

        Give plain numbers, not small tensors: one that stays behind lies where the memory of a block was freed, so that
        the next block no longer fits there.
        """
        results: Iterable[T] = self.run(lambda rows: function(self.load(rows)), self.blocks())  # type: ignore[assignment]
        return results

    def write(self, apply: Callable[[Block], Tensor], sink: Sink, dtype: torch.dtype = torch.float32) -> None:
        """Hand what a function makes of each block to a sink, which gets bfloat16 where that is the `dtype` it wants.

        Raises `BadInput` for values that are not finite.
        """
        wanted = dtype if dtype is torch.bfloat16 else torch.float32

        def one(rows: range) -> None:
            if isinstance(apply, Combination):
                used = self.stored(rows)[: len(apply.coefficients)]
                result, finite = weighted_sum(used, apply.coefficients, wanted)
            else:
                result, finite = weighted_sum([apply(self.load(rows)).contiguous()], [1.0], wanted)
            if not finite:
                self._refuse(self.load(rows), result)
            sink(rows.start * self.columns, result)

        for _ in self.run(one, self.blocks()):
            pass

    def _refuse(self, block: Block, result: Tensor) -> None:
        """Say which input is to blame for a result that is not finite."""
        names = self.names or (*(f"model {i}" for i in range(1, len(block.tensors) + 1)), "the base model")
        inputs = block.tensors if block.base is None else (*block.tensors, block.base)
        for tensor, name in zip(inputs, names, strict=False):
            refuse_unless_finite(tensor, name)
        if not torch.isfinite(result).all():
            raise BadInput("the merge is not finite", "its values leave float32", "use smaller weights")


def sums(parts: Iterable[Sequence[float]] | Iterable[Sequence[Sequence[float]]]) -> Tensor:
    """What blocks gave, added up in order; float64."""
    return torch.tensor(list(parts), dtype=torch.float64).sum(0)


def into(out: Tensor) -> Sink:
    """A sink that fills a tensor of any float type."""
    flat = out.view(-1)

    def put(start: int, values: Tensor) -> None:
        flat[start : start + values.numel()] = fitting(values, out.dtype).view(-1)

    return put


def fitting(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another float type. Raises `BadInput` when they leave float16."""
    converted = values.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all():
        raise BadInput(
            "the merged values do not fit float16",
            f"the largest is {values.abs().max():g}, float16 ends at 65504",
            "choose bfloat16 as out_dtype",
        )
    return converted


def _keep_freed_memory() -> None:
    """Have glibc keep what blocks free for the next ones.

    It gives freed memory back to the system, piece by piece, and faults it in again: several times slower than the
    arithmetic. How much it keeps is twice the largest piece that was freed, if that was at most 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def refuse_unless_finite(values: Tensor, whose: str) -> None:
    """Raise `BadInput` when a tensor holds NaN or infinity."""
    if not torch.isfinite(values).all():
        kind = "NaN" if values.isnan().any() else "infinity"
        raise BadInput(f"{whose} cannot be merged", f"it holds {kind}", "use a checkpoint that is whole and finite")
