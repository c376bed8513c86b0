"""Steps in which every request gains one token, on a GPU as CUDA graphs: one launch instead of hundreds.

There is a graph for each of a few numbers of rows; a step takes the smallest that holds its requests. A graph belongs
to the weights and pages that were there when it was captured: `forget` drops them all.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cabochon.model.decode import step
from cabochon.model.fixed import FixedBatch
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import PagedSequence, PagePool

ROWS = (1, 2, 4, 8, 16, 32, 64)


class DecodeSteps:
    """Next logits for sequences that each gained one token. Where a graph cannot be captured, kernel by kernel."""

    def __init__(self, model: Gemma2, pool: PagePool) -> None:
        self.model, self.pool = model, pool
        self._steps: dict[int, _Step] = {}
        self._capturing = model.device.type == "cuda"
        self._memory: Any = None  # what all graphs share: no two run at once

    @property
    def sizes(self) -> set[int]:
        """Of the steps that there were."""
        return set(self._steps)

    @property
    def graphs(self) -> int:
        """How many there are."""
        return sum(prepared.captured for prepared in self._steps.values())

    def holds(self, rows: int) -> bool:
        """Whether so many rows fit a step."""
        return 0 < rows <= ROWS[-1]

    def __call__(self, tokens: Sequence[int], sequences: Sequence[PagedSequence]) -> tuple[Tensor, list[int]]:
        """Logits float32 [rows, V], which last until the next step, and the likeliest token of each."""
        rows = next(size for size in ROWS if size >= len(tokens))
        if rows not in self._steps:
            self._steps[rows] = self._prepared(rows)
        prepared = self._steps[rows]
        prepared.batch.set(tokens, sequences)
        logits, likeliest = prepared()
        return logits[: len(tokens)], likeliest[: len(tokens)].tolist()

    def forget(self) -> None:
        """The weights are others: graphs refer to those that were."""
        self._steps.clear()

    def _prepared(self, rows: int) -> "_Step":
        prepared = _Step(self.model, FixedBatch(self.pool, rows))
        if self._capturing:
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            try:
                prepared.capture(self._memory)
            except RuntimeError:  # a layer that looks at its values, such as one of the caller's own
                torch.cuda.synchronize(self.model.device)
                self._capturing = False
        return prepared


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: products keep 32 MiB of memory for every stream that they have ever been on."""
    return torch.cuda.Stream(device)


class _Step:
    """A step of a fixed number of rows."""

    def __init__(self, model: Gemma2, batch: FixedBatch) -> None:
        self.model, self.batch = model, batch
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Logits and the likeliest tokens of all rows, of which those without a sequence mean nothing."""
        if self._graph is None or self._results is None:
            return self._compute()
        self._graph.replay()
        return self._results

    @property
    def captured(self) -> bool:
        """Whether it is replayed."""
        return self._graph is not None

    def capture(self, memory: Any) -> None:
        """Record the step: no row has a sequence yet, so that it changes nothing. Raises `RuntimeError`."""
        side, current = _side_stream(self.model.device), torch.cuda.current_stream(self.model.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are compiled and chosen before anything is recorded
            for _ in range(2):
                self._compute()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, stream=side, capture_error_mode="thread_local"):
            results = self._compute()
        self._graph, self._results = graph, results

    def _compute(self) -> tuple[Tensor, Tensor]:
        logits = step(self.model, self.batch)
        return logits, logits.argmax(-1)
