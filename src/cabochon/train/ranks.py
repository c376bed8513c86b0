"""The processes of a run, and what they tell each other between steps. One process is the usual case, and free.

A process is a rank. Ranks that share the layers' matrices between them (tensor parallelism) read the same rows; `part`
counts groups of such ranks. What is exchanged here is small and lies on the CPU: counts, losses, JSON. It goes through
gloo, whatever the tensors of the model go through.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cabochon.base.errors import CabochonError, Elsewhere, MissingResource

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the run. Every method is called by all of them, at the same point.

    Args:
        rank: of this process, from 0.
        world: how many processes there are.
        device: of this process.
        tensor_parallel: how many ranks, one after the other, share the matrices of the layers.
        mesh: of devices, "data" x "tensor"; None in a world of 1.
        group: the way to the others; None: the usual one.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    tensor_parallel: int = 1
    mesh: Any = None
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """Which part of the rows this process reads."""
        return self.rank // self.tensor_parallel

    @property
    def parts(self) -> int:
        """Into how many parts the rows are cut."""
        return self.world // self.tensor_parallel

    def total(self, value: float) -> float:
        """The sum over the parts, the same bits on all ranks."""
        if self.world == 1:
            return value
        out = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(out, group=self.group)
        return float(out) / self.tensor_parallel  # ranks that share a part have said the same

    def most(self, value: int) -> int:
        """The largest over all ranks."""
        if self.world == 1:
            return value
        out = torch.tensor(value)
        torch.distributed.all_reduce(out, torch.distributed.ReduceOp.MAX, self.group)
        return int(out)

    def gather(self, value: Any) -> list[Any]:
        """What JSON can hold, from every rank in order; a number that is not finite stays what it is."""
        if self.world == 1:
            return [value]
        raw = json.dumps(value).encode()
        padded = torch.zeros(self.most(len(raw)), dtype=torch.uint8)
        padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        out = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(out, padded, self.group)
        return [json.loads(each.numpy().tobytes().rstrip(b"\0")) for each in out]

    def on_first(self, action: Callable[[], T]) -> T:
        """What an action of the first process gives, which JSON can hold; the others wait for it.

        Raises what the action raises there, and `Elsewhere` on the other ranks.
        """
        if self.world == 1:
            return action()
        result: Any = None
        failed: BaseException | None = None
        if self.first:
            try:
                result = action()
            except Exception as error:
                failed = error
        code = failed.exit_code if isinstance(failed, CabochonError) else int(failed is not None)
        code, result = self.gather([code, result])[0]
        if failed is not None:
            raise failed
        if code:
            raise Elsewhere(code)
        return result  # type: ignore[no-any-return]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block, that another process has gone is an error with a hint. Raises `MissingResource`."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _lost(error):
                raise
            raise MissingResource(
                "training stopped: another process of the run is gone",
                re.sub(r"^\[.*?\] ", "", str(error)).splitlines()[0].partition(". ")[0],
                "see what it said last, then start the same command again: it goes on from the last checkpoint",
            ) from error


SINGLE = Ranks()


def _lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process is not there any more."""
    said = str(error).lower()
    signs = "connection", "broken pipe", "timed out", "timeout", "remote process exited"
    return isinstance(error, torch.distributed.DistNetworkError) or any(sign in said for sign in signs)
