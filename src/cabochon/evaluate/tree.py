"""Texts to be scored, as a tree of what they have in common.

The choices of a question share the question, and questions share their examples: each token of the tree is computed
once. Two continuations of one token after the same context end at the same node, so one pass scores both.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scored:
    """Token ids of a whole text, BOS included, and from which on they are scored (at least the second)."""

    ids: "array[int]"
    start: int

    def __post_init__(self) -> None:
        assert 1 <= self.start <= len(self.ids)


@dataclass(eq=False)
class Node:
    """A run of tokens that all texts through it share, behind the runs of its parents.

    `wanted`: position -> the token behind it -> numbers of the texts that ask for its log-probability there.
    """

    ids: "array[int]"  # of one of these texts
    start: int
    end: int
    children: dict[int, "Node"] = field(default_factory=dict)  # by their first token
    wanted: dict[int, dict[int, list[int]]] = field(default_factory=dict)


def grow(texts: Sequence[Scored]) -> Node:
    """The root, an empty run, of the tree of all texts, the last token of each excepted: it is only predicted."""
    root = Node(array("i"), 0, 0)
    for text in texts:
        _insert(root, text.ids, len(text.ids) - 1)
    for number, text in enumerate(texts):
        _ask(root, text, number)
    return root


def _insert(node: Node, ids: "array[int]", end: int) -> None:
    at = 0
    while at < end:
        child = node.children.get(ids[at])
        if child is None:
            node.children[ids[at]] = Node(ids, at, end)
            return
        stop = min(child.end, end)
        same = at + agreement(child.ids[at:stop], ids[at:stop])
        if same < child.end and same < end:
            _split(node, child, same)
        elif same < child.end:  # the text ends within the run
            return
        node, at = node.children[ids[at]], same


def _split(parent: Node, child: Node, at: int) -> None:
    """Cut a run in two; the second half keeps the children."""
    first = Node(child.ids, child.start, at, {child.ids[at]: child})
    parent.children[child.ids[child.start]] = first
    child.start = at


def _ask(node: Node, text: Scored, number: int) -> None:
    ids, position, end = text.ids, text.start - 1, len(text.ids) - 1
    while position < end:
        node = node.children[ids[node.end]]
        for here in range(position, min(node.end, end)):
            node.wanted.setdefault(here, {}).setdefault(ids[here + 1], []).append(number)
        position = max(position, node.end)


def agreement(a: "array[int]", b: "array[int]") -> int:
    """How many tokens two runs of one length have in common from their beginning."""
    if a == b:
        return len(a)
    low, high = 0, len(a)  # a[:low] agrees, a[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
