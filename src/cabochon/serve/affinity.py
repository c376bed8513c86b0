"""Which replica answers a request: the one that knows its beginning, unless that one has much more to do than others.

A replica remembers what it has computed of earlier prompts (`generate/prefix.py`). So the next turn of a conversation,
and a text that begins as an earlier one, go where that was answered.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import orjson

K = TypeVar("K", bound=Hashable)
_BLOCK = 256  # characters of a text that count as one step
_MOST = 64  # steps of one request that are looked at
_SLACK = 8  # requests more than the least busy replica has, for which a known beginning is still worth it
_REMEMBERED = 100_000  # beginnings


def beginnings(body: bytes) -> list[bytes]:
    """Hashes of the beginnings of a request's prompt, shortest first: after each message, or each block of its text."""
    try:
        steps = _steps(orjson.loads(body))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # no JSON, or nested deeper than it can be written again
        return []
    found, hashed = [], hashlib.blake2b(digest_size=16)
    for step in steps:
        hashed.update(step)
        found.append(hashed.digest())
    return found


def _steps(asked: Any) -> Iterable[bytes]:
    if not isinstance(asked, dict):
        return []
    messages = asked.get("messages")
    if isinstance(messages, list):
        # Only role and content: clients send back more, or less, than they got.
        said = [(m.get("role"), m.get("content")) if isinstance(m, dict) else None for m in messages[:_MOST]]
        return [orjson.dumps(one) for one in said]
    text = asked.get("prompt", asked.get("inputs"))
    if not isinstance(text, str):
        return []
    return [text[i : i + _BLOCK].encode("utf-8", "replace") for i in range(0, min(len(text), _BLOCK * _MOST), _BLOCK)]


class Affinity(Generic[K]):
    """Where beginnings were answered, the latest of them."""

    def __init__(self) -> None:
        self._where: OrderedDict[bytes, K] = OrderedDict()

    def choose(self, known: Iterable[bytes], loads: Mapping[K, int]) -> K:
        """One of the replicas whose loads (requests under way) are given, at least one."""
        least = min(loads, key=lambda number: loads[number])
        for beginning in reversed(list(known)):
            number = self._where.get(beginning)
            if number is not None and number in loads and loads[number] <= loads[least] + _SLACK:
                return number
        return least

    def remember(self, known: Iterable[bytes], number: K) -> None:
        """A replica answers a request with these beginnings."""
        for beginning in known:
            self._where[beginning] = number
            self._where.move_to_end(beginning)
        while len(self._where) > _REMEMBERED:
            self._where.popitem(last=False)

    def forget(self, number: K) -> None:
        """A replica has lost its memory."""
        for beginning in [known for known, where in self._where.items() if where == number]:
            del self._where[beginning]
