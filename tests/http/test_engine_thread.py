"""The engine's thread outlives whatever a request does to it, and serves answers and other work side by side."""

import errno
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cabochon.base.errors import BadInput
from cabochon.lm import LM
from cabochon.serve import openai
from cabochon.serve.settings import ServeSettings
from servers import CHAT, asks, running, wait_until

ENDLESS: dict[str, Any] = {"regex": "[a-z ]{900,}"}  # an answer that takes a while


def test_answers_of_one_request_that_fail_in_the_same_step(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lm) as server, server.client() as client:
        engine = server.bridge.lm.engine
        sample = engine._sample

        def failing(request: Any, *arguments: Any) -> Any:
            if request.matcher and len(request.generated) == 5:
                raise BadInput("the answer cannot go on", "its grammar leads nowhere", "ask for another one")
            return sample(request, *arguments)

        monkeypatch.setattr(engine, "_sample", failing)
        failed = client.post(CHAT, json=asks("Hi", n=3, **ENDLESS))
        assert failed.status_code >= 400 and "leads nowhere" in failed.text
        assert client.post(CHAT, json=asks("Hi", max_tokens=3)).status_code == 200
        assert server.bridge.pending == 0 and client.get("/health").status_code == 200


def test_a_defect_in_the_thread_is_told_and_nobody_waits(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lm) as server, server.client() as client:
        monkeypatch.setattr(server.bridge._thread, "_piece", lambda *_: {}["nothing"])
        assert client.post(CHAT, json=asks("Hi")).json()["error"]["code"] == "engine_failed"
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.post(CHAT, json=asks("Hi")).json()["error"]["code"] == "engine_dead"
        assert server.bridge.pending == 0


def test_texts_to_embed_do_not_hold_up_answers(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, calls = [0], [0]
    with running(lm) as server, server.client() as client:
        engine = server.bridge.lm.engine
        step: Callable[[], Any] = engine.step

        def counted() -> Any:
            steps[0] += 1
            return step()

        def slow(*_: Any) -> list[float]:
            calls[0] += 1
            time.sleep(0.01)
            return [0.0]

        monkeypatch.setattr(engine, "step", counted)
        monkeypatch.setattr(openai, "embed", slow)
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(client.post, "/v1/embeddings", json={"input": ["x"] * 64}) for _ in range(3)]
            wait_until(lambda: calls[0] > 0)
            before = calls[0]
            assert client.post(CHAT, json=asks("Hi", max_tokens=40, logit_bias={"1": -100, "107": -100})).is_success
            assert calls[0] - before <= steps[0] + 3  # one between two steps
            assert all(one.result().status_code == 200 for one in work)


def test_who_goes_while_texts_are_embedded_ends_that(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def slow(*_: Any) -> list[float]:
        calls[0] += 1
        time.sleep(0.05)
        return [0.0]

    monkeypatch.setattr(openai, "embed", slow)
    with running(lm) as server, server.client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/embeddings", json={"input": ["x"] * 64}, timeout=0.3)
        wait_until(lambda: server.bridge.pending == 0)
        assert calls[0] < 60


class Full(io.StringIO):
    """A disk without space."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_stops_nothing(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lm) as server, server.client() as client, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Full())
        assert client.post(CHAT, json=asks("Hi", max_tokens=3)).status_code == 200
        server.drain()
        server.join()


def test_a_schema_is_as_deep_as_it_may_be_on_every_route(lm: LM) -> None:
    deepest = ServeSettings().max_schema_depth
    schema = '{"type":"array","items":' * (deepest + 1) + "{}" + "}" * (deepest + 1)
    with running(lm) as server, server.client() as client:
        for value in (schema, json.loads(schema)):
            asked = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": value}}}
            refused = client.post("/generate", json=asked)
            assert refused.status_code == 422 and "levels" in refused.json()["error"]
        bad = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": "{"}}}
        assert client.post("/generate", json=bad).status_code == 422
