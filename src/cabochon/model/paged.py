"""Keys and values in pages of 32 positions that sequences of any length share: the cache of the engine.

A page belongs to one block of positions of one sequence, for all local layers or for all global layers. Both kinds are
of one size, since a model has as many layers of the one as of the other (or one more), so one pool serves both. A
sequence lets the local pages go that its window has passed; global pages it keeps. Pages are counted, so that several
sequences, and the memory of old prompts (`generate/prefix.py`), may hold the same one.

Dimension letters: T tokens of a step, N query heads, K key-value heads, H head size, P positions of a page.
"""

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from cabochon.model.attention import attention
from cabochon.model.config import Gemma2Config
from cabochon.model.kernels import cuda
from cabochon.model.kernels.attend import attend_pages
from cabochon.model.visibility import NOTHING, Visibility

PAGE = 32
LET_GO = -1  # in place of a page number: its positions have left the window


class OutOfPages(Exception):
    """Every page is held by a sequence; somebody has to wait or to give way. Never reaches a user."""


class PagePool:
    """The memory of all pages, and who holds which.

    Args:
        pages: how many there are; `page_bytes` tells what one takes. Untouched pages of a CPU pool cost nothing.
    """

    def __init__(
        self, config: Gemma2Config, pages: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.pages = config, pages
        self.spare = pages  # one more, which nobody gets: where rows without a sequence put their keys
        shape = (pages + 1, config.num_kv_heads, PAGE, config.head_dim)
        slots = range((config.num_layers + 1) // 2)  # layer 2i lies in local pages at slot i, 2i + 1 in global ones
        self.keys = [_zeros(shape, dtype, torch.device(device)) for _ in slots]
        self.values = [_zeros(shape, dtype, torch.device(device)) for _ in slots]
        self.holders: Counter[int] = Counter()
        self._free = list(range(pages))[::-1]

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A page for one holder. Raises `OutOfPages`."""
        if not self._free:
            raise OutOfPages
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more holder for a page."""
        self.holders[page] += 1
        return page

    def give(self, page: int) -> None:
        """One holder less; the last one frees the page."""
        self.holders[page] -= 1
        if not self.holders[page]:
            del self.holders[page]
            self._free.append(page)

    def copy(self, source: int) -> int:
        """A page of one's own with the same content. Raises `OutOfPages`."""
        page = self.take()
        for memory in (*self.keys, *self.values):
            memory[page] = memory[source]
        return page


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since a masked value still takes part with a weight of 0, and 0 * nan is nan; untouched ones are free."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, count * dtype.itemsize)  # the system gives zeros page by page, when they are touched
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def page_bytes(config: Gemma2Config, dtype: torch.dtype) -> int:
    """Bytes of one page."""
    slots = (config.num_layers + 1) // 2
    return slots * 2 * config.num_kv_heads * PAGE * config.head_dim * dtype.itemsize


def pages_for(config: Gemma2Config, length: int) -> int:
    """The most pages that a sequence of this many positions holds at once."""
    blocks = -(-length // PAGE)
    return blocks + min(blocks, config.sliding_window // PAGE + 3)


@dataclass
class PagedSequence:
    """What one sequence holds: a page for each block of positions, of either kind (local True, global False)."""

    pool: PagePool
    length: int = 0  # positions whose keys and values are there
    blocks: dict[bool, list[int]] = field(default_factory=lambda: {True: [], False: []})
    changes: int = 0  # how often pages came or went

    def reserve(self, length: int) -> None:
        """Take pages for all positions below `length`. Raises `OutOfPages`; what was taken by then is kept."""
        for pages in self.blocks.values():
            while len(pages) * PAGE < length:
                pages.append(self.pool.take())
                self.changes += 1

    def advance(self, length: int) -> None:
        """The first `length` positions are there and hold; what lies beyond, or behind the window, is let go."""
        self.length = length
        for pages in self.blocks.values():
            for page in pages[-(-length // PAGE) :]:
                self.pool.give(page)
                self.changes += 1
            del pages[-(-length // PAGE) :]
        # One page more than the window is kept, so that a few guessed tokens can still be taken back.
        local, passed = self.blocks[True], length - self.pool.config.sliding_window - PAGE
        for block in range(passed // PAGE if passed > 0 else 0):
            if local[block] != LET_GO:
                self.pool.give(local[block])
                local[block] = LET_GO

    def close(self) -> None:
        """Let everything go."""
        for pages in self.blocks.values():
            for page in pages:
                if page != LET_GO:
                    self.pool.give(page)
            pages.clear()
        self.length = 0


@dataclass(frozen=True)
class Segment:
    """`count` new tokens of a sequence, whose pages have been reserved, from position `start` on."""

    sequence: PagedSequence
    start: int
    count: int

    @property
    def positions(self) -> range:
        """Of the new tokens."""
        return range(self.start, self.start + self.count)


class PagedBatch:
    """The cache of one forward pass over ids [1, T]: the tokens of several sequences one after the other."""

    def __init__(self, pool: PagePool, segments: Sequence[Segment]) -> None:
        self.pool, self.segments = pool, list(segments)
        self.length = 0
        device = pool.keys[0].device
        self.positions = torch.tensor([[p for s in self.segments for p in s.positions]], device=device)
        self._rows = torch.tensor([row for row, s in enumerate(self.segments) for _ in s.positions], device=device)
        self._offsets = self.positions[0] % PAGE
        self._sights = {local: _Sight(self, local) for local in (True, False)}

    def extend(self, positions: Tensor) -> dict[bool, "_Sight"]:
        """What the new queries of either kind of layer see; positions are those given by the segments."""
        return self._sights

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
        """Store k and v [1, K, T, H] and mix for q [1, N, T, H] what each query's own sequence holds."""
        keys, values = self.pool.keys[layer // 2], self.pool.values[layer // 2]
        rows, k, v = (part[0].transpose(0, 1).contiguous() for part in (q, k, v))  # [T, heads, H]
        settings: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if backend is None and cuda.usable(rows, k, v, keys):
            from cabochon.model.kernels.cuda import attend as kernels

            kernels.store(k, v, keys, values, visible.written, self._offsets)
            where = (visible.pages, self._gpu_blocks, self.positions[0])
            return kernels.attend(rows, keys, values, *where, window=visible.window, **settings)[None].transpose(1, 2)
        keys[visible.written, :, self._offsets] = k.to(keys.dtype)
        values[visible.written, :, self._offsets] = v.to(values.dtype)
        mixed = attend_pages(
            rows, keys, values, visible.pages, self._rows, self.positions[0], window=visible.window, **settings
        )
        if mixed is None:
            parts = [_attend_group(rows[g.part], keys, values, g, backend=backend, **settings) for g in visible.groups]
            mixed = torch.cat(parts)
        return mixed[None].transpose(1, 2)

    @cached_property
    def _gpu_blocks(self) -> Any:
        """All queries in blocks for the kernel, see `kernels/cuda/attend.py`."""
        from cabochon.model.kernels.cuda.attend import Blocks, queries_together

        most = queries_together(self.pool.config.group_size, self.pool.keys[0].dtype)
        starts = accumulate((s.count for s in self.segments), initial=0)
        found = [
            (row, token + done, min(most, s.count - done))
            for row, (s, token) in enumerate(zip(self.segments, starts, strict=False))
            for done in range(0, s.count, most)
        ]
        rows, tokens, counts = torch.tensor(found, dtype=torch.int32, device=self.positions.device).T.contiguous()
        longest = max(s.start + s.count for s in self.segments)
        return Blocks(rows, tokens, counts, max(count for *_, count in found), longest)


@dataclass(frozen=True)
class _Group:
    """Neighbouring segments of one length, computed side by side."""

    part: slice  # of the tokens of the batch
    pages: Tensor  # int64 [segments, blocks]; any page where a sequence has no more
    visible: Visibility


class _Sight:
    """Where one kind of layer finds and puts its keys: worked out once a step and used in every such layer."""

    def __init__(self, batch: PagedBatch, local: bool) -> None:
        # Not the batch itself: a circle would keep the tensors of each step until Python looks for circles.
        self.segments, self.positions, self.local = batch.segments, batch.positions, local
        self.window = batch.pool.config.sliding_window if local else None
        device = batch.positions.device
        blocks = [s.sequence.blocks[local] for s in batch.segments]
        written = [pages[p // PAGE] for pages, s in zip(blocks, batch.segments, strict=True) for p in s.positions]
        self.written = torch.tensor(written, device=device)
        self.pages = torch.tensor(_table(blocks), dtype=torch.int32, device=device)

    @cached_property
    def groups(self) -> list[_Group]:
        """All segments, in order."""
        found, place = [], 0
        for count, run in groupby(self.segments, key=lambda s: s.count):
            segments = list(run)
            for some in [segments] if count == 1 else [[s] for s in segments]:
                part, place = slice(place, place + count * len(some)), place + count * len(some)
                found.append(self._group(some, part, count))
        return found

    def _group(self, segments: list[Segment], part: slice, count: int) -> _Group:
        """Pages from the first that the window of any segment reaches to the last."""
        device = self.positions.device
        start, end = min(s.start for s in segments), max(s.start for s in segments) + count
        first = max(0, start - self.window + 1) // PAGE if self.window else 0
        table = _table([s.sequence.blocks[self.local][first : -(-end // PAGE)] for s in segments])
        columns = torch.arange(first * PAGE, (first + len(table[0])) * PAGE, device=device)
        ends = torch.tensor([[s.start + count] for s in segments], device=device)
        # Behind its end a page holds nothing yet; what the window has passed is masked like any key outside it.
        keys = torch.where(columns < ends, columns, NOTHING)
        queries = self.positions[0, part].view(len(segments), count)
        pages = torch.tensor(table, device=device).clamp_min(0)
        return _Group(part, pages, Visibility(queries, keys, self.window))


def _table(rows: list[list[int]]) -> list[list[int]]:
    """Rows of page numbers made equally long."""
    widest = max(map(len, rows))
    return [row + [LET_GO] * (widest - len(row)) for row in rows]


def _attend_group(q: Tensor, keys: Tensor, values: Tensor, group: _Group, **settings: Any) -> Tensor:
    """q [segments * count, N, H] over gathered pages [segments, blocks, K, P, H]: as q."""
    k, v = (memory[group.pages].transpose(1, 2).flatten(2, 3).to(q.dtype) for memory in (keys, values))
    mixed = attention(q.view(len(group.pages), -1, *q.shape[1:]).transpose(1, 2), k, v, group.visible, **settings)
    return mixed.transpose(1, 2).flatten(0, 1)
