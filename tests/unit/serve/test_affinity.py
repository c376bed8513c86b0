"""Where a request goes."""

import json
from typing import Any

from cabochon.serve.affinity import Affinity, beginnings


def chat(*texts: str) -> list[bytes]:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return beginnings(json.dumps({"messages": messages}).encode())


def test_a_conversation_begins_as_it_did_a_turn_ago() -> None:
    first, later = chat("Hi"), chat("Hi", "Hello!", "Who are you?")
    assert later[:1] == first and len(set(later)) == 3
    assert chat("Hi ")[0] != first[0] and chat("Hi", "Hello.", "Who are you?")[1:] != later[1:]


def test_texts_are_compared_in_blocks() -> None:
    def text(field: str, value: str) -> list[bytes]:
        return beginnings(json.dumps({field: value}).encode())

    assert text("prompt", "x" * 600)[:2] == text("prompt", "x" * 512 + "y")[:2]
    assert text("inputs", "abc") == text("prompt", "abc") and len(text("prompt", "x" * 10**6)) == 64


def test_what_is_no_prompt_has_no_beginning() -> None:
    odd: list[Any] = [5, [], None, {"prompt": [1, 2]}, {"messages": "x"}, {"prompt": None}, {"input": "x"}]
    for body in odd:
        assert beginnings(json.dumps(body).encode()) == []
    assert beginnings(b"{") == beginnings(b"") == []
    deep = b'{"messages": [{"content": ' + b"[" * 300 + b"]" * 300 + b"}]}"  # is read, but not written again
    assert beginnings(deep) == []
    assert len(beginnings(json.dumps({"messages": [5, None, {}, {"content": [{}]}]}).encode())) == 4


def test_a_known_beginning_is_followed_unless_its_replica_is_far_busier() -> None:
    affinity = Affinity()
    affinity.remember(chat("Hi"), 1)
    turn = chat("Hi", "Hello!", "Who?")
    assert affinity.choose(turn, {0: 0, 1: 8}) == 1
    assert affinity.choose(turn, {0: 0, 1: 9}) == 0  # too busy
    assert affinity.choose(turn, {0: 3, 2: 1}) == 2  # it is not there: the least busy one
    assert affinity.choose(chat("Other"), {0: 2, 1: 1}) == 1
    affinity.remember(turn, 0)
    assert affinity.choose(turn, {0: 5, 1: 0}) == 0  # the longest one known decides
    affinity.forget(0)
    assert affinity.choose(turn, {0: 0, 1: 0}) == 0 and affinity.choose(turn, {1: 1, 2: 0}) == 2
