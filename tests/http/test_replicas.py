"""Several engines behind one address: where requests go, and what becomes of them when an engine is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cabochon.lm import LM
from servers import CHAT, MODEL, asks, events, wait_until

LONG: dict[str, Any] = {"regex": "[a-z ]{900,}", "temperature": 1}


class Served:
    """`cabochon serve` in a process of its own, and the lines of its log."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "cabochon", "serve", "--port", "0", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr
        self.url = self.process.stderr.readline().split()[-1]
        self.lines: list[str] = []
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(lambda: self.lines.extend(iter(self.process.stderr.readline, "")))

    def client(self, **named: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=200), **named)

    def log(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, list(self.lines)) if line["event"] == event]

    def pids(self) -> dict[int, int]:
        """The newest process of each replica."""
        return {line["replica"]: line["process"] for line in self.log("replica_ready")}


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    server = Served(*flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        server._pool.shutdown()


def figures(client: httpx.Client, name: str) -> dict[str, float]:
    """The samples of a metric by their labels."""
    text = client.get("/metrics").text
    return {m[1] or "": float(m[2]) for m in re.finditer(rf"^cabochon_{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Served]:
    with served("--replicas", "2") as server:
        wait_until(lambda: len(server.pids()) == 2, 180)
        yield server


def test_it_answers_as_a_single_engine_does(fleet: Served, lm: LM) -> None:
    with fleet.client() as client:
        expected = lm.chat([{"role": "user", "content": "What is 2+3?"}], max_new_tokens=100).text
        got = client.post(CHAT, json=asks("What is 2+3?"), headers={"x-request-id": "mine"})
        assert got.json()["choices"][0]["message"]["content"] == expected and got.headers["x-request-id"] == "mine"
        parts = events(client, CHAT, asks("What is 2+3?", stream=True))
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts[:-1]) == expected
        assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert client.get("/").text.startswith("<!") and client.head("/").status_code == 200
        assert client.get("/static/nothing.js").status_code == 404
        assert client.post("/v1/models").status_code == 405
        assert client.post(CHAT, json={"messages": []}).json()["error"]["param"] == "messages"
        assert client.post("/generate", json={"inputs": 5}).json()["error_type"] == "validation"


def test_a_conversation_stays_where_it_began(fleet: Served) -> None:
    with fleet.client() as client:
        cached = figures(client, "cached_prompt_tokens_total")
        prompts = figures(client, "prompt_tokens_total")
        messages = [{"role": "user", "content": "Tell me a fact about the number 7. " * 4}]
        for _ in range(4):
            body = {"messages": messages, "temperature": 0, "max_tokens": 8}
            said = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Another one."}]
        grown = {k: v - prompts[k] for k, v in figures(client, "prompt_tokens_total").items()}
        known = {k: v - cached[k] for k, v in figures(client, "cached_prompt_tokens_total").items()}
        assert sorted(grown.values())[0] == 0 and sum(known.values()) > sum(grown.values()) / 2


def test_conversations_are_spread(fleet: Served) -> None:
    with fleet.client() as client, ThreadPoolExecutor(8) as pool:
        before = figures(client, "answer_tokens_count")
        list(pool.map(lambda i: client.post(CHAT, json=asks(f"Hi {i}", max_tokens=200, **LONG)), range(8)))
        grown = [v - before[k] for k, v in figures(client, "answer_tokens_count").items()]
        assert sum(grown) == 8 and min(grown) >= 2


def test_figures_of_all_replicas(fleet: Served) -> None:
    with fleet.client() as client:
        text = client.get("/metrics").text
        assert figures(client, "replicas_ready") == {"": 2}
        assert set(figures(client, "cache_used_ratio")) == {'replica="0"', 'replica="1"'}
    names = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert len(names) == len(set(names)) >= 15
    current = ""
    for line in text.splitlines():
        current = line.split()[2] if line.startswith("# HELP") else current
        assert line.startswith(("# ", current)), line  # every sample stands below what explains it
    assert 'route="/v1/chat/completions",status="200"} ' in text and 'replica="0",route' not in text


def test_a_client_that_goes_is_noticed_by_its_replica(fleet: Served) -> None:
    with fleet.client() as client:
        before = sum(figures(client, "cancelled_total").values())
        with client.stream("POST", CHAT, json=asks("Hi", stream=True, **LONG)) as response:
            next(response.iter_lines())
        wait_until(lambda: sum(figures(client, "cancelled_total").values()) == before + 1)
        wait_until(lambda: sum(figures(client, "requests_running").values()) == 0)


def streams(number: int) -> bool:
    """Whether a request is a stream: pairs of them, since neighbours go to different replicas, which get both kinds."""
    return number % 4 < 2


def outcome(client: httpx.Client, number: int) -> str:
    """What came of a request while an engine is killed: "whole", or "lost" for a stream that says so."""
    text = f"What is {number}+3?"
    if not streams(number):
        got = client.post(CHAT, json=asks(text, max_tokens=150, **LONG))
        assert got.status_code == 200, got.text
        return "whole" if got.json()["usage"]["completion_tokens"] == 150 else "short"
    *_, last, done = events(client, CHAT, asks(text, stream=True, max_tokens=150, **LONG))
    assert done == "[DONE]"
    if "error" in last:
        assert last["error"]["code"] == "replica_lost"
        return "lost"
    return "whole" if last["choices"][0]["finish_reason"] == "length" else "short"


def test_a_killed_engine_takes_only_its_streams_along(fleet: Served) -> None:
    with fleet.client() as client, ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(outcome, client, i) for i in range(40)]
        wait_until(lambda: min(figures(client, "requests_running").values()) >= 15)
        wait_until(lambda: min(figures(client, "generated_tokens_total").values()) > 0)
        victim = fleet.pids()[0]
        os.kill(victim, signal.SIGKILL)
        found = [one.result() for one in waiting]
        assert found.count("whole") + found.count("lost") == 40
        streamed = [result for number, result in enumerate(found) if streams(number)]
        others = [result for number, result in enumerate(found) if not streams(number)]
        assert all(result == "whole" for result in others), found  # what had not begun to stream was asked again
        assert 1 <= found.count("lost") <= 15 and streamed.count("whole") >= 5
        assert figures(client, "requests_moved_total")[""] >= 5
        wait_until(lambda: fleet.pids()[0] != victim, 60)  # started again
        wait_until(lambda: figures(client, "replicas_ready") == {"": 2})
        assert figures(client, "replicas_lost_total") == {"": 1}
        assert client.post(CHAT, json=asks("Hi", max_tokens=2)).status_code == 200
    assert [line["replica"] for line in fleet.log("replica_lost")] == [0]


def test_beginning_keys_and_end(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with served("--replicas", "2", "--api-keys", str(keys)) as server:
        with server.client() as client:
            assert client.get("/health").status_code == 200
            assert client.get("/ready").json()["error"]["code"] == "loading"
            wait_until(lambda: client.get("/ready").status_code == 200, 60)
            assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401
            client.headers["authorization"] = "Bearer secret"
            assert client.get("/v1/models").status_code == 200
            with client.stream("POST", CHAT, json=asks("Hi", stream=True, max_tokens=300, **LONG)) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                wait_until(lambda: client.get("/ready").status_code == 503)
                assert client.post(CHAT, json=asks("Hi")).json()["error"]["code"] == "draining"
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(20) == 0


def test_replicas_end_with_whoever_started_them() -> None:
    with served("--replicas", "2") as server:
        wait_until(lambda: len(server.pids()) == 2, 180)
        pids = server.pids().values()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"  # Z: has ended, too


@pytest.mark.parametrize("flags", [["--replicas", "0"], ["/nowhere", "--replicas", "2"]])
def test_what_cannot_start_says_why(flags: list[str]) -> None:
    command = [sys.executable, "-m", "cabochon", "serve", "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode in (2, 3, 4) and "error: " in ended.stderr and "Traceback" not in ended.stderr
