"""Log-probabilities of many continuations: each token of their common tree is computed once, a chunk at a time.

Keys and values lie in the engine's pages, so that texts share what they have in common until the page where they part.
Logits are made for scored tokens alone, and for a chunk of those at a time (`model/head.py`).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.base.errors import MissingResource
from cabochon.evaluate.tree import Node, Scored, grow
from cabochon.lm import LM
from cabochon.model.head import logit_chunks
from cabochon.model.paged import LET_GO, PAGE, OutOfPages, PagedBatch, PagedSequence, Segment

CHUNKS = {"cpu": 512, "cuda": 4096}  # tokens of a pass
SEGMENTS = 256  # the most runs of tokens in a pass


@dataclass(frozen=True)
class Found:
    """The score of text `number`: log-probability in nats, and whether each token is the likeliest one."""

    number: int
    logprob: float
    is_greedy: bool


def score(lm: LM, texts: Sequence[Scored]) -> Iterator[Found]:
    """The score of each text, in the order in which they are ready.

    The engine has to be idle; what it remembers of earlier prompts is forgotten. Raises `MissingResource` when its
    cache cannot hold one text.
    """
    assert lm.engine.idle
    lm.engine.prefixes.clear()
    yield from _Scoring(lm, texts).run()


@dataclass(eq=False)
class _Held:
    """What a finished run left, and how many runs are still to go on from there."""

    sequence: PagedSequence
    users: int


@dataclass(eq=False)
class _Work:
    node: Node
    parent: _Held | None  # None: a first run
    sequence: PagedSequence | None = None  # None until it has begun


class _Scoring:
    def __init__(self, lm: LM, texts: Sequence[Scored]) -> None:
        self.model, self.pool = lm.model, lm.engine.pool
        self.chunk = CHUNKS["cuda" if lm.model.device.type == "cuda" else "cpu"]
        self.missing = [len(text.ids) - text.start for text in texts]
        self.total, self.greedy = [0.0] * len(texts), [True] * len(texts)
        # The newest first: what a run left is used up before the next is begun, so that little memory is held.
        self.stack = [_Work(child, None) for child in grow(texts).children.values()][::-1]

    def run(self) -> Iterator[Found]:
        yield from (Found(n, 0.0, True) for n, missing in enumerate(self.missing) if not missing)
        try:
            while self.stack:
                yield from self._step()
        finally:
            for work in self.stack:
                if held := _held(work):
                    held.close()

    @torch.inference_mode()
    def _step(self) -> list[Found]:
        works, segments = self._plan()
        batch = PagedBatch(self.pool, segments)
        spans = [(work.node, s.start, s.start + s.count) for work, s in zip(works, segments, strict=True)]
        ids = [i for node, start, end in spans for i in node.ids[start:end]]
        hidden = self.model.hidden(torch.tensor([ids], device=self.model.device), batch.positions, cache=batch)[0]
        found = self._read(hidden, spans)
        for work, segment in zip(works, segments, strict=True):
            segment.sequence.advance(segment.start + segment.count)
            if segment.sequence.length < work.node.end:
                self.stack.append(work)
            else:
                self._branch(work, segment.sequence)
        return found

    def _plan(self) -> tuple[list[_Work], list[Segment]]:
        """The next runs, or parts of them; pages for all are reserved. Of about one length beside each other."""
        chosen: list[tuple[_Work, Segment]] = []
        room = self.chunk
        while self.stack and room and len(chosen) < SEGMENTS:
            work = self.stack.pop()
            try:
                segment = self._begin(work, room)
            except OutOfPages:
                self.stack.append(work)
                if chosen:
                    break
                self._evict(work)
                continue
            room -= segment.count
            chosen.append((work, segment))
        chosen.sort(key=lambda one: one[1].count)
        return [work for work, _ in chosen], [segment for _, segment in chosen]

    def _begin(self, work: _Work, room: int) -> Segment:
        """A part of a run with its pages. Raises `OutOfPages`."""
        if work.sequence is None:
            if work.parent is None:
                work.sequence = PagedSequence(self.pool)
            else:
                last = work.parent.users == 1
                work.sequence = work.parent.sequence if last else fork(work.parent.sequence)
                work.parent.users -= 1
                work.parent = None
        start = work.sequence.length
        count = min(room, work.node.end - start)
        work.sequence.reserve(start + count)
        return Segment(work.sequence, start, count)

    def _evict(self, needy: _Work) -> None:
        """Let go of what the runs that come last hold; they are read again from the beginning."""
        ours = _held(needy)
        others = (held for work in self.stack if (held := _held(work)) is not ours)
        # Its own beginning last, if others go on from there too: it would then be read again for each.
        for held in (*others, None if needy.sequence else ours):
            if held is not None and held.length:
                held.close()
                return
        raise MissingResource(
            "the cache is too small for this text",
            f"{needy.node.end} tokens do not fit {self.pool.pages} pages of {PAGE}",
            "free some memory, or give the engine more (cache_bytes)",
        )

    def _branch(self, work: _Work, sequence: PagedSequence) -> None:
        children = list(work.node.children.values())
        if not children:
            sequence.close()
        held = _Held(sequence, len(children))
        self.stack += [_Work(child, held) for child in children[::-1]]

    def _read(self, hidden: Tensor, spans: Sequence[tuple[Node, int, int]]) -> list[Found]:
        """Log-probabilities of the tokens that are wanted behind hidden [T, D], and the texts that are now whole."""
        rows: list[int] = []  # of hidden, those with something to read
        asked: list[tuple[int, int, list[int]]] = []  # place in rows, token, texts
        offset = 0
        for node, start, end in spans:
            for position in sorted(p for p in node.wanted if start <= p < end):
                asked += [(len(rows), token, texts) for token, texts in node.wanted[position].items()]
                rows.append(offset + position - start)
            offset += end - start
        if not rows:
            return []
        places, tokens = (torch.tensor([one[i] for one in asked], device=hidden.device) for i in (0, 1))
        values, likeliest = self._logprobs(hidden[rows], [one[0] for one in asked], places, tokens)
        found = []
        for (_, _, texts), value, best in zip(asked, values, likeliest, strict=True):
            for number in texts:
                self.total[number] += value
                self.greedy[number] &= best
                self.missing[number] -= 1
                if not self.missing[number]:
                    found.append(Found(number, self.total[number], self.greedy[number]))
        return found

    def _logprobs(
        self, hidden: Tensor, order: Sequence[int], places: Tensor, tokens: Tensor
    ) -> tuple[list[float], list[bool]]:
        """Of tokens [N] behind hidden [places], `order` being places as a sorted list."""
        values, likeliest = list[float](), list[bool]()
        first = done = 0
        for logits in logit_chunks(self.model.head, hidden, self.model.config.vocab_size):
            end = bisect_left(order, first + len(logits), done)
            at, wanted = places[done:end] - first, tokens[done:end]
            values += (logits[at, wanted] - logits.logsumexp(-1)[at]).tolist()
            likeliest += (logits.argmax(-1)[at] == wanted).tolist()
            first, done = first + len(logits), end
        return values, likeliest


def _held(work: _Work) -> PagedSequence | None:
    """What a run keeps: what it has of its own, or else what it is to go on from."""
    return work.sequence or (work.parent.sequence if work.parent else None)


def fork(sequence: PagedSequence) -> PagedSequence:
    """Another sequence that goes on from the same place: full pages are shared, a begun one is copied.

    Raises `OutOfPages`; then nothing is held.
    """
    pool, whole = sequence.pool, sequence.length // PAGE
    other = PagedSequence(pool, sequence.length)
    try:
        for local, pages in sequence.blocks.items():
            other.blocks[local] += [page if page == LET_GO else pool.share(page) for page in pages[:whole]]
            for page in pages[whole:]:
                other.blocks[local].append(pool.copy(page))
    except OutOfPages:
        other.close()
        raise
    return other
