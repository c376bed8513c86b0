"""The memory of earlier prompts and answers: what a new request shares with one of them is not computed again.

A tree whose nodes are pages of up to 32 tokens; a path from the root is a text that was once processed. Nodes hold
their pages beside the sequences that use them, and are forgotten, least recently used first, when pages are needed.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cabochon.model.paged import LET_GO, PAGE, OutOfPages, PagedSequence, PagePool


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]  # fewer than a page: the end of a text
    pages: dict[bool, int]  # global (False), and local (True) unless its window had passed
    parent: "_Node | None"
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    texts: list[tuple[int, ...]] = field(default_factory=list)  # the children's, sorted

    def add(self, tokens: tuple[int, ...]) -> "_Node":
        """A new child."""
        insort(self.texts, tokens)
        self.children[tokens] = child = _Node(tokens, {True: LET_GO, False: LET_GO}, self)
        return child

    def remove(self, tokens: tuple[int, ...]) -> None:
        """Forget a child."""
        del self.children[tokens], self.texts[bisect_left(self.texts, tokens)]

    def nearest(self, wanted: tuple[int, ...]) -> "tuple[_Node, int] | None":
        """The child that agrees with a text for the most tokens, and how many these are: a neighbour in the order."""
        at = bisect_left(self.texts, wanted)
        near = [(agreement(text, wanted), text) for text in self.texts[max(0, at - 1) : at + 1]]
        used, text = max(near, default=(0, ()))
        return (self.children[text], used) if used else None


class PrefixMemory:
    """Finds the longest known beginning of a prompt."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._root = _Node((), {}, None)
        self._order: OrderedDict[int, _Node] = OrderedDict()  # by id, least recently used first

    def __len__(self) -> int:
        return len(self._order)

    def recall(self, prompt: Sequence[int]) -> PagedSequence:
        """A sequence that begins with all that is known of a prompt, its last token excepted (its logits are needed).

        The end of a page has to be copied; where no page is free for that, it is left out.
        """
        path = self._known(prompt[:-1])
        # What the copies push out of memory may be a node of this very path: its pages are held until all is read.
        held = [page for node, _ in path for page in node.pages.values() if page != LET_GO]
        for node, _ in path:
            self._order.move_to_end(id(node))
        for page in held:
            self.pool.share(page)
        try:
            return self._begun(path)
        except OutOfPages:
            return self._begun(self._usable([(node, used) for node, used in path if used == PAGE]))
        finally:
            for page in held:
                self.pool.give(page)

    def _begun(self, path: list[tuple[_Node, int]]) -> PagedSequence:
        """A sequence of what is held along a path. Raises `OutOfPages` when none is free for a copy."""
        sequence = PagedSequence(self.pool)
        try:
            for node, used in path:
                own = used < PAGE  # what comes next is written behind it: on a copy
                for local, pages in sequence.blocks.items():
                    page = node.pages[local]
                    if page == LET_GO:
                        pages.append(LET_GO)
                    else:
                        pages.append(self._copy(page) if own else self.pool.share(page))
                sequence.length += used
        except OutOfPages:
            sequence.close()
            raise
        return sequence

    def _copy(self, page: int) -> int:
        """A copy of a page that is held; forgets old nodes if none is free. Raises `OutOfPages`."""
        if not self.pool.free:
            self.forget(1)
        return self.pool.copy(page)

    def remember(self, tokens: Sequence[int], sequence: PagedSequence, *, whole: bool) -> None:
        """Note what a sequence holds: full pages, and with `whole` the begun last one too (it writes no more)."""
        node = self._root
        end = sequence.length if whole else sequence.length // PAGE * PAGE
        for start in range(0, end, PAGE):
            part = tuple(tokens[start : min(start + PAGE, end)])
            child = node.children.get(part)
            if child is None:
                child = node.add(part)
                self._order[id(child)] = child
            self._order.move_to_end(id(child))
            for local, held in sequence.blocks.items():
                page = held[start // PAGE]
                if child.pages[local] == LET_GO and page != LET_GO:
                    child.pages[local] = self.pool.share(page)
            node = child

    def forget(self, pages: int) -> None:
        """Drop the oldest nodes without children until so many pages are free, or nothing is left to drop."""
        while self.pool.free < pages:
            leaf = next((node for node in self._order.values() if not node.children), None)
            if leaf is None:
                return
            self._drop(leaf)

    def clear(self) -> None:
        """Forget everything: the weights have changed, or the memory is wanted."""
        for node in list(self._order.values())[::-1]:
            if not node.children:
                self._drop(node)
        if self._order:
            self.clear()

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None
        node.parent.remove(node.tokens)
        del self._order[id(node)]
        for page in node.pages.values():
            if page != LET_GO:
                self.pool.give(page)

    def _known(self, tokens: Sequence[int]) -> list[tuple[_Node, int]]:
        """Nodes from the root on and how many tokens of each agree; only as far as the window's pages are there."""
        path: list[tuple[_Node, int]] = []
        node, start = self._root, 0
        while start < len(tokens):
            wanted = tuple(tokens[start : start + PAGE])
            found = node.nearest(wanted)
            if found is None:
                break
            path.append(found)
            (node, used), start = found, start + found[1]
            if used < PAGE:
                break
        return self._usable(path)

    def _usable(self, path: list[tuple[_Node, int]]) -> list[tuple[_Node, int]]:
        """A path as far as the pages that the window reaches from its end are there."""
        while path and not self._window_is_there(path):
            path.pop()
        return path

    def _window_is_there(self, path: list[tuple[_Node, int]]) -> bool:
        length = sum(used for _, used in path)
        first = max(0, length - self.pool.config.sliding_window + 1) // PAGE
        return all(node.pages[True] != LET_GO for node, _ in path[first:])


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
