"""Tensors of which this rank may have only a part: where it lies, how it is filled, how long all of it is.

Sharded ones are DTensors. What those are made of takes a second to import, so they are told by what they can do.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

T = TypeVar("T", bound=Tensor)


def own_part(target: Tensor, whole: Tensor) -> Tensor:
    """Of a whole tensor, what this rank has of `target`."""
    return whole[slices(*box(target))]


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Set what this rank has of `target`, sharded or not, from the whole tensor."""
    local(target).copy_(own_part(target, whole))


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, as a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing what those are made of."""
    return hasattr(tensor, "device_mesh")


def box(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Where in the whole tensor this rank's part begins, and its size, by dimension."""
    if not is_sharded(tensor):
        return [0] * tensor.ndim, list(tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return list(chunk.offsets), list(chunk.sizes)


def slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """What a box is of a whole tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def let_go(model: nn.Module) -> None:
    """Shard again what a forward pass gathered that no backward pass followed."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def alike(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors in lists, those that lie on the same devices in one; operations on several need that."""
    found: dict[object, list[T]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def clip(parameters: Iterable[Tensor], longest: float) -> float:
    """Shorten the gradients of all parameters together to a length; gives what it was, over all ranks."""
    groups = alike(p for p in parameters if p.grad is not None)
    norms = [_length([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        clip_grads_with_norm_(group, longest, norm)
    return float(norm)


def _length(gradients: Sequence[Tensor]) -> Tensor:
    """Of several gradients that lie on the same devices, over all of these."""
    own = get_total_norm([local(gradient) for gradient in gradients])
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is None:
        return own
    square = own.square()
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
    return square.sqrt()
