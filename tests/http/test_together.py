"""Tokens of several steps that reach the event loop together: when they go, and that none is lost."""

from typing import Any

import httpx
import pytest

from cabochon.lm import LM
from cabochon.serve import worker
from servers import CHAT, Running, asks, events, running

BODY = asks("Tell me of the sea.", stream=True, max_tokens=12, logit_bias={"1": -100, "107": -100}, logprobs=True)


def told(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that the loop is told from now on, one for each time."""
    counts: list[int] = []
    deliver = server.bridge.delivered

    def delivered(batch: worker.Batch) -> None:
        counts.append(sum(len(pieces) for _, pieces in batch))
        deliver(batch)

    monkeypatch.setattr(server.bridge, "delivered", delivered)
    return counts


@pytest.mark.parametrize(("rate", "expected"), [(float("inf"), [1] * 12), (1e-9, [1, 11])])
def test_the_first_and_the_last_do_not_wait(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, rate: float, expected: list[int]
) -> None:
    answer = client.post(CHAT, json=BODY | {"stream": False}).json()["choices"][0]
    monkeypatch.setattr(worker, "EVENTS", rate)
    counts = told(server, monkeypatch)
    parts = [part["choices"][0] for part in events(client, CHAT, BODY)[:-1]]
    assert counts == expected
    assert "".join(part["delta"].get("content", "") for part in parts) == answer["message"]["content"]
    logprobs = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
    assert logprobs == answer["logprobs"]["content"]
    # The role before them, the reason for the end after them; a stream that is slow to wake finds several at once.
    assert 3 <= len(parts) <= len(expected) + 2


def test_one_that_ends_does_not_send_the_others(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "EVENTS", 1e-9)
    counts = told(server, monkeypatch)
    with client.stream("POST", CHAT, json=BODY | {"max_tokens": 200}) as long:
        lines = long.iter_lines()
        next(lines)
        events(client, CHAT, BODY)
        list(lines)
    assert sorted(counts) == [1, 1, 11, 199]


def test_a_step_that_breaks_does_not_take_along_what_waited(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "EVENTS", 1e-9)
    with running(lm) as server, server.client() as client:
        engine, steps = server.bridge.lm.engine, iter(range(6))
        forward = engine._forward

        def breaking(works: Any) -> Any:
            if next(steps) == 5:
                raise RuntimeError("out of memory")
            return forward(works)

        monkeypatch.setattr(engine, "_forward", breaking)
        counts = told(server, monkeypatch)
        parts = events(client, CHAT, BODY)
        assert counts == [1, 4] and parts[-2]["error"]["code"] == "engine_failed"
