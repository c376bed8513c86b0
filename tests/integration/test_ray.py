"""The application of Ray Serve on a local Ray: two engines, one of which is killed under load; then one to two."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from cabochon.lm import LM
from servers import CHAT, asks, events, wait_until

pytestmark = pytest.mark.slow
LONG: dict[str, Any] = {"regex": "[a-z ]{900,}", "temperature": 1, "model": "cabochon"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "CABOCHON_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    import ray
    from ray import serve

    from cabochon.deploy.ray_app import RayConfig, build

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = RayConfig(min_replicas=2, max_replicas=2, cache_gib=0.05)
        serve.run(build(config), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ["CABOCHON_API_KEY"]


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    key = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=url, headers=key, timeout=120, limits=httpx.Limits(max_connections=100)) as client:
        yield client


def engines() -> set[int]:
    ours = psutil.Process().children(recursive=True)  # those of other Rays on this machine are not
    return {process.pid for process in ours if any(":Engine" in part for part in named(process))}


def named(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_it_answers_as_the_server_does(client: httpx.Client, lm: LM) -> None:
    expected = lm.chat([{"role": "user", "content": "What is 2+3?"}], max_new_tokens=100).text
    body = asks("What is 2+3?", model="cabochon")
    assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == expected
    parts = events(client, CHAT, {**body, "stream": True})
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts[:-1]) == expected
    assert client.get("/ready").status_code == client.get("/metrics").status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "none"}).status_code == 401
    assert client.post(CHAT, json={"messages": []}).json()["error"]["param"] == "messages"
    assert client.get("/").text.startswith("<!")
    assert client.get("/nowhere").status_code == 404


def test_a_conversation_stays_where_it_began(client: httpx.Client) -> None:
    """The engine says how much of a prompt it knew already: with two of them, a turn elsewhere would know nothing."""
    for talk in range(4):
        messages = [{"role": "user", "content": f"Tell me a fact about the number {talk}. " * 4}]
        for turn in range(4):
            body = {"messages": messages, "temperature": 0, "max_tokens": 8}
            got = client.post(CHAT, json=body).json()
            if turn:
                assert got["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            said = got["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Another one."}]


def outcome(client: httpx.Client, number: int) -> str:
    text = f"What is {number}+3?"
    if number % 2:
        got = client.post(CHAT, json=asks(text, max_tokens=150, **LONG))
        assert got.status_code == 200, got.text
        return "whole" if got.json()["usage"]["completion_tokens"] == 150 else "short"
    *_, last, done = events(client, CHAT, asks(text, stream=True, max_tokens=150, **LONG))
    assert done == "[DONE]"
    if "error" in last:
        assert last["error"]["code"] == "replica_lost"
        return "lost"
    return "whole" if last["choices"][0]["finish_reason"] == "length" else "short"


def test_a_killed_engine_takes_only_its_streams_along(client: httpx.Client) -> None:
    before = engines()
    assert len(before) == 2
    with ThreadPoolExecutor(32) as pool:
        waiting = [pool.submit(outcome, client, i) for i in range(32)]
        time.sleep(1)  # until all are under way; how far they are does not matter
        os.kill(min(before), signal.SIGKILL)
        found = [one.result() for one in waiting]
    assert found.count("whole") + found.count("lost") == 32, found
    assert all(result == "whole" for result in found[1::2])
    assert found.count("lost") <= 16
    wait_until(lambda: len(engines()) == 2, 90)
    wait_until(lambda: client.post(CHAT, json=asks("Hi", model="cabochon", max_tokens=2)).status_code == 200)


def test_there_are_more_engines_while_they_are_busy(client: httpx.Client) -> None:
    from ray import serve

    from cabochon.deploy.ray_app import RayConfig, build

    serve.delete("default")  # another configuration alone would begin with as many as there are
    one = RayConfig(min_replicas=1, max_replicas=2, max_running=2, cache_gib=0.05)
    serve.run(build(one), route_prefix="/")
    wait_until(lambda: len(engines()) == 1)
    with ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> str:
            while len(engines()) < 2:
                assert outcome(client, number) == "whole"
            return outcome(client, number)

        assert list(pool.map(ask, range(1, 16, 2))) == ["whole"] * 8
