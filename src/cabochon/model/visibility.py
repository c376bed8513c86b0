"""Which key each query may see, decided by positions alone.

Masks follow from the position that every query and key carries, never from where it lies in a tensor. So a
padded batch cannot move the window, a ring cache may hold its keys in any order, and packed documents may
restart their positions.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

RUNS_BLOCK = 256  # queries whose mask is looked at together
NOTHING = -1  # the position of padding: seen by nobody, sees nothing


@dataclass
class Visibility:
    """Query i sees key j when j <= i, j > i - window, both exist, and both lie in the same document.

    Shapes: query_positions, query_documents int64 [B, T]; key_positions, key_documents int64 [B, S].
    `window` counts keys, the query's own included; None sees all. Documents of None: one document a row.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int | None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    in_order: bool = False  # whether key j is known to lie at position j in every row
    _ranges: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """bool [B, T, S] over the given queries and keys, True where the key is seen."""
        q, k = self.query_positions[:, queries, None], self.key_positions[:, None, keys]
        seen = (k <= q) & (k > NOTHING)
        if self.window is not None:
            seen &= k > q - self.window
        if self.query_documents is not None and self.key_documents is not None:
            seen &= self.query_documents[:, queries, None] == self.key_documents[:, None, keys]
        return seen

    def key_range(self, start: int, end: int) -> tuple[int, int]:
        """The smallest run of key columns [low, high) that holds every key which queries [start, end) see."""
        if (start, end) not in self._ranges:  # the same for every layer of this kind: worked out once
            q, k = self.query_positions[:, start:end], self.key_positions
            seen = (k > NOTHING) & (k <= q.amax(-1, keepdim=True))
            if self.window is not None:
                oldest = q.masked_fill(q == NOTHING, torch.iinfo(q.dtype).max).amin(-1, keepdim=True)
                seen &= k > oldest - self.window
            columns = seen.any(0).nonzero()
            low, high = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 1)
            self._ranges[start, end] = (low, high)
        return self._ranges[start, end]

    @cached_property
    def runs(self) -> tuple[Tensor, Tensor] | None:
        """First key column and the one behind the last that each query sees, int32 [B, T] each; equal: it sees none.

        None when some query sees keys with others between them.
        """
        low, high = (torch.zeros_like(self.query_positions, dtype=torch.int32) for _ in range(2))
        columns = torch.arange(self.key_positions.shape[1], dtype=torch.int32, device=low.device)
        for start in range(0, low.shape[1], RUNS_BLOCK):
            part = slice(start, start + RUNS_BLOCK)
            begin, end = self.key_range(start, min(start + RUNS_BLOCK, low.shape[1]))
            seen = self.mask(part, slice(begin, end))
            here = columns[begin:end].expand_as(seen)
            high[:, part] = torch.where(seen, here + 1, 0).amax(-1)
            low[:, part] = torch.where(seen, here, high[:, part, None]).amin(-1)
            if not torch.equal(seen.sum(-1), high[:, part] - low[:, part]):
                return None
        return low, high

    @cached_property
    def block_mask(self) -> "BlockMask":
        """The same rule for flex_attention, which skips whole blocks that nobody sees."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, queries = self.query_positions.shape
        q_pos, k_pos, window = self.query_positions, self.key_positions, self.window
        q_doc, k_doc = self.query_documents, self.key_documents

        def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k_pos[b, k] <= q_pos[b, q]) & (k_pos[b, k] > NOTHING)
            if window is not None:
                seen = seen & (k_pos[b, k] > q_pos[b, q] - window)
            if q_doc is not None and k_doc is not None:
                seen = seen & (q_doc[b, q] == k_doc[b, k])
            return seen

        return create_block_mask(rule, batch, None, queries, k_pos.shape[1], device=str(q_pos.device))
