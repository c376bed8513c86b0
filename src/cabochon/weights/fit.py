"""Whether a model fits the memory that is free, said before a byte of it is read."""

from pathlib import Path

from cabochon.base.errors import MissingResource
from cabochon.base.machine import free_memory
from cabochon.model.config import Gemma2Config
from cabochon.weights.scheme import BITS, Scheme

GIB = 2**30


def refuse_too_large(folder: Path, config: Gemma2Config, form: str, need: int, device: str) -> None:
    """Raises `MissingResource` when the weights alone are larger than the free memory of a device.

    Only then: what else a model needs depends on its use, and memory that others hold may be free a moment later.

    Args:
        form: what the weights are to be loaded as, such as "bfloat16".
        need: their bytes.
    """
    free = free_memory(device)
    if need <= free or free == 0:  # 0: a system that does not tell
        return
    sizes = {bits: Scheme(bits).nbytes(config) for bits in BITS}
    fits = next((bits for bits in BITS if sizes[bits] < min(need, 0.9 * free)), None)
    if fits:
        advice = f'{fits} bits would fit, in {_gib(sizes[fits])}: --weights int{fits} (weights="int{fits}")'
    else:
        advice = f"even 4 bits take {_gib(sizes[4])}: free some memory, or choose a smaller model"
    raise MissingResource(
        f"{folder} does not fit the memory of {device}",
        f"its weights take {_gib(need)} in {form}, and {_gib(free)} are free",
        f"{advice}; --ignore-memory (check_memory=False) tries all the same",
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
