"""The cache of a step in which each of some sequences gains one token, over tensors that stay where they are.

Everything that changes from step to step, the new tokens, their positions and the pages of each sequence, is written
into one host buffer and copied in one go. What is then computed has the same shapes and addresses at every step, so
that a GPU can replay it as a graph. Rows without a sequence have position -1: they see nothing, and what they store
goes to a page that nobody reads.

Dimension letters: R rows, N query heads, K key-value heads, H head size, P positions of a page.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cabochon.model.attention import attention
from cabochon.model.paged import PAGE, PagedSequence, PagePool
from cabochon.model.visibility import NOTHING, Visibility


class FixedBatch:
    """Room for one new token of each of R sequences. A `Cache` of ids [1, R]."""

    def __init__(self, pool: PagePool, rows: int) -> None:
        self.pool, self.rows, self.length = pool, rows, 0
        device = pool.keys[0].device
        width = -(-pool.config.max_position // PAGE)
        sizes = [rows * width, rows * width, rows, rows]
        host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host, self._there = host, torch.zeros_like(host, device=device)
        self._written = [part.view(rows, -1).numpy() for part in host.split(sizes)]
        self._shown: list[tuple[PagedSequence | None, int]] = [(None, 0)] * rows
        *tables, tokens, positions = self._there.split(sizes)
        self._tokens: Tensor = tokens
        self._positions: Tensor = positions
        self.tables = dict(zip((True, False), (t.view(rows, width) for t in tables), strict=True))  # int32 [R, blocks]
        self.numbers = torch.arange(rows, dtype=torch.int32, device=device)
        self.ones = torch.ones_like(self.numbers)
        self.columns = torch.arange(width * PAGE, device=device)[None]
        self.set([], [])

    def set(self, tokens: Sequence[int], sequences: Sequence[PagedSequence]) -> None:
        """What the next step is about: at most R sequences, whose pages are reserved, and a new token of each."""
        *tables, ids, positions = self._written
        positions[:] = NOTHING
        for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True)):
            ids[row], positions[row] = token, sequence.length
            shown, changes = self._shown[row]
            if shown is not sequence or changes != sequence.changes:
                for table, local in zip(tables, (True, False), strict=True):
                    pages = sequence.blocks[local]
                    table[row, : len(pages)] = pages
                self._shown[row] = sequence, sequence.changes
        self._there.copy_(self._host, non_blocking=True)

    @property
    def ids(self) -> Tensor:
        """int64 [1, R]."""
        return self._tokens[None].long()

    @property
    def positions(self) -> Tensor:
        """int64 [1, R]; -1 for a row without a sequence."""
        return self._positions[None].long()

    def extend(self, positions: Tensor) -> dict[bool, "FixedSight"]:
        """Where either kind of layer finds and puts keys."""
        return {local: FixedSight(self, positions[0], local) for local in (True, False)}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Any,
        *,
        scale: float,
        softcap: float | None,
        backend: str | None,
    ) -> Tensor:
        """Store k and v [1, K, R, H] and mix for q [1, N, R, H] what each row's own sequence holds."""
        keys, values = self.pool.keys[layer // 2], self.pool.values[layer // 2]
        keys[visible.pages, :, visible.offsets] = k[0].transpose(0, 1).to(keys.dtype)
        values[visible.pages, :, visible.offsets] = v[0].transpose(0, 1).to(values.dtype)
        held = visible.table.clamp_min(0).long()
        k, v = (memory[held].transpose(1, 2).flatten(2, 3).to(q.dtype) for memory in (keys, values))
        seen = Visibility(visible.positions[:, None], self.columns.expand(self.rows, -1), visible.window)
        mixed = attention(q.transpose(0, 2), k, v, seen, scale=scale, softcap=softcap, backend=backend)
        return mixed.transpose(0, 2)


class FixedSight:
    """One kind of layer: positions int64 [R], and where the new keys go, pages and offsets int64 [R]."""

    def __init__(self, batch: FixedBatch, positions: Tensor, local: bool) -> None:
        self.positions, self.table = positions, batch.tables[local]
        self.window = batch.pool.config.sliding_window if local else None
        known = positions.clamp_min(0)
        page = self.table.gather(1, (known // PAGE)[:, None])[:, 0].long()
        self.pages, self.offsets = torch.where(positions < 0, batch.pool.spare, page), known % PAGE
