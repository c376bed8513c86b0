"""How a server begins and ends, what it turns away, and what becomes of clients that go, stall or never speak."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import httpx
import pytest

from cabochon.base.errors import BadInput, MissingResource
from cabochon.lm import LM
from cabochon.serve.server import listen, serve
from cabochon.serve.settings import ServeSettings
from servers import CHAT, MODEL, Running, asks, events, running, wait_until

ENDLESS: dict[str, Any] = {"regex": "[a-z ]{900,}"}  # an answer that takes a while


def idle(server: Running) -> bool:
    engine = server.bridge.lm.engine
    return not engine.active and not engine.waiting and not server.bridge.pending


def held(server: Running) -> int:
    """Pages that requests hold, those of the memory of prompts left out."""
    engine = server.bridge.lm.engine
    engine.prefixes.clear()
    return engine.pool.pages - engine.pool.free


def figure(client: httpx.Client, name: str) -> float:
    return float(re.search(rf"^cabochon_{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)[1])


def test_loading_then_ready(lm: LM) -> None:
    gate = threading.Event()

    def load() -> LM:
        gate.wait(20)
        return LM(lm.model, lm.tokenizer)

    server = Running(load, ServeSettings(port=0))
    with server.client() as client:
        assert client.get("/health").status_code == 200
        for response in (client.get("/ready"), client.post(CHAT, json=asks("Hi")), client.get("/v1/models")):
            assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        gate.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
    server.drain()
    server.join()


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> LM:
        raise BadInput("no model", "it is not there", "look elsewhere")

    with pytest.raises(BadInput, match="no model"):
        serve(load, ServeSettings(port=0))


def test_an_address_that_is_taken() -> None:
    with listen(ServeSettings(port=0)) as taken, pytest.raises(MissingResource, match="port"):
        listen(ServeSettings(port=taken.getsockname()[1]))


def test_a_full_queue_turns_away(lm: LM) -> None:
    with running(lm, max_running=2, max_waiting=2) as server, server.client() as client:
        with ThreadPoolExecutor(16) as pool:
            body = asks("Hi", temperature=1, max_tokens=300, **ENDLESS)
            responses = list(pool.map(lambda _: client.post(CHAT, json=body), range(16)))
        codes = [r.status_code for r in responses]
        assert set(codes) == {200, 429} and codes.count(200) >= 4
        refused = next(r for r in responses if r.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) >= 1
        assert figure(client, "refused_total") == codes.count(429)
        assert client.post(CHAT, json=asks("Hi", n=5)).status_code == 400  # it would never fit
        assert client.post(CHAT, json=asks("Hi", n=4, max_tokens=2)).status_code == 200


def test_many_streams_at_once_are_each_what_they_would_be_alone(server: Running) -> None:
    questions = [f"What is {i}+{i % 7}?" for i in range(256)]
    with httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=300)) as client:

        def stream(question: str) -> str:
            parts = events(client, CHAT, asks(question, stream=True, max_tokens=16))
            assert parts[-1] == "[DONE]" and parts[-2]["choices"][0]["finish_reason"]
            return "".join(p["choices"][0]["delta"].get("content", "") for p in parts[:-1])

        with ThreadPoolExecutor(256) as pool:
            together = list(pool.map(stream, questions))
        picked = range(0, 256, 16)
        assert [together[i] for i in picked] == [stream(questions[i]) for i in picked]
    wait_until(lambda: idle(server))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(lm: LM, stream: bool) -> None:
    with running(lm) as server:
        content = json.dumps(asks("Hi", stream=stream, **ENDLESS)).encode()
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head % (CHAT.encode(), len(content)) + content)
                wait_until(lambda: bool(server.bridge.lm.engine.active))
                if stream:
                    assert connection.recv(100)
            begun = time.monotonic()
            wait_until(lambda: idle(server))
            assert time.monotonic() - begun < 5  # what it takes is measured elsewhere
        with server.client() as client:
            assert figure(client, "cancelled_total") == 20
            assert client.post(CHAT, json=asks("Hi", max_tokens=2)).status_code == 200
        wait_until(lambda: idle(server))
        assert held(server) == 0


def test_a_deadline_ends_an_answer(lm: LM) -> None:
    with running(lm, deadline_seconds=0.2) as server, server.client() as client:
        late = client.post(CHAT, json=asks("Hi", **ENDLESS))
        assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
        *_, error, done = events(client, CHAT, asks("Hi", stream=True, **ENDLESS))
        assert error["error"]["code"] == "timeout" and done == "[DONE]"
        wait_until(lambda: idle(server))


def test_what_runs_is_finished_before_the_end(lm: LM) -> None:
    with running(lm, deadline_seconds=60) as server, server.client() as client, ThreadPoolExecutor(33) as pool:
        body = asks("Hi", stream=True, max_tokens=200, temperature=1, **ENDLESS)
        streams = [pool.submit(events, client, CHAT, body) for _ in range(32)]
        wait_until(lambda: len(server.bridge.lm.engine.active) == 32)
        server.drain()
        wait_until(lambda: server.bridge.draining)
        for response in (client.get("/ready"), client.post(CHAT, json=asks("Hi"))):
            assert response.status_code == 503 and response.json()["error"]["code"] == "draining"
        assert client.get("/health").status_code == 200
        for stream in streams:
            parts = stream.result()
            assert parts[-1] == "[DONE]" and parts[-2]["choices"][0]["finish_reason"] == "length"
        server.join()


def test_a_step_that_breaks_takes_only_its_requests_along(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lm) as server, server.client() as client:
        engine, once = server.bridge.lm.engine, [True]
        forward = engine._forward

        def broken(works: Any) -> Any:
            if once and once.pop():
                raise RuntimeError("out of memory")
            return forward(works)

        monkeypatch.setattr(engine, "_forward", broken)
        failed = client.post(CHAT, json=asks("Hi"))
        assert failed.status_code == 503 and failed.json()["error"]["code"] == "engine_failed"
        assert "memory" not in failed.text
        assert client.post(CHAT, json=asks("Hi")).status_code == 200
        monkeypatch.setattr(engine, "_forward", lambda works: 1 / 0)
        for _ in range(3):
            assert client.post(CHAT, json=asks("Hi")).status_code == 503
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/ready").status_code == 503
        assert client.post(CHAT, json=asks("Hi")).json()["error"]["code"] == "engine_dead"


def test_a_connection_whose_request_was_answered_early_serves_the_next(server: Running) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"  # 415: of no content type
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        answers = connection.makefile("rb")
        for _ in range(2):
            connection.sendall(head)
            assert status(answers) == 415
            connection.sendall(b"body")
            time.sleep(1.3)  # longer than the rest of a body may take
        connection.sendall(head + b"body" + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status(answers) == 415 and status(answers) == 200


def status(answers: BinaryIO) -> int:
    """The status of the next answer, which is read to its end."""
    said = answers.readline()
    length = 0
    while (line := answers.readline()).strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    assert len(answers.read(length)) == length
    return int(said.split()[1])


def test_clients_that_never_finish_speaking(lm: LM) -> None:
    limits = {"header_seconds": 0.3, "body_seconds": 0.3, "idle_seconds": 1.0}
    with running(lm, **limits) as server, server.client() as client:
        slow = [b"", b"GET", b"GET /health HTTP/1.1\r\nHost: local", b"\r\n",
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{",
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]  # fmt: skip
        for begun in slow:
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(begun)
                said = connection.recv(4000)
                assert said.startswith(b"HTTP/1.1 408"), begun
                while connection.recv(4000):
                    pass
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:  # answered before its end
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
            assert connection.recv(4000).startswith(b"HTTP/1.1 415")
            with pytest.raises(OSError):
                for _ in range(500):
                    connection.sendall(b" ")
                    time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
            )
            with pytest.raises(OSError):
                for _ in range(500):
                    connection.sendall(b"trailer: 1\r\n" * 100)
                    time.sleep(0.01)
        drops = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        ended = False
        for byte in b"GET /health HTTP/1.1\r\n" + b"x-long: 1\r\n" * 100:
            try:
                drops.sendall(bytes([byte]))
            except OSError:
                ended = True
                break
            time.sleep(0.01)
        assert ended
        assert client.get("/health").status_code == 200
        wait_until(lambda: len(server.server.server_state.connections) <= 1)


def test_a_client_that_stops_reading_is_left(lm: LM) -> None:
    with running(lm, write_seconds=0.5) as server:
        content = json.dumps(asks("Hi", n=8, stream=True, logprobs=True, top_logprobs=20, temperature=1, **ENDLESS))
        request = (
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request % (CHAT.encode(), len(content), content.encode()))
            wait_until(lambda: bool(server.bridge.lm.engine.active))
            wait_until(lambda: not server.server.server_state.connections and idle(server))


def test_connections_beyond_the_limit(lm: LM) -> None:
    with running(lm, max_connections=3) as server:
        kept = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3)]
        wait_until(lambda: len(server.server.server_state.connections) == 3)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one_more:
            assert one_more.recv(100).startswith(b"HTTP/1.1 503")
        for connection in kept:
            connection.close()
        wait_until(lambda: not server.server.server_state.connections)
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_requests_that_follow_each_other_without_waiting(server: Running) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(one * 3)
        said = b""
        while said.count(b'{"status":"ok"}') < 3:
            said += connection.recv(4000)
    assert said.count(b"HTTP/1.1 200") == 3


def test_figures(server: Running) -> None:
    with server.client() as client:
        before = figure(client, "generated_tokens_total")
        client.post(CHAT, json=asks("Hi", max_tokens=3))
        assert figure(client, "generated_tokens_total") == before + 3
        assert figure(client, "requests_running") == figure(client, "requests_waiting") == 0
        assert 0 < figure(client, "cache_used_ratio") < 1
        assert figure(client, "time_to_first_token_seconds_count") >= 1
        text = client.get("/metrics").text
    names = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", text, re.MULTILINE)
    assert len(names) == len({name for name, _ in names}) >= 12
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line), line


def test_the_command(tmp_path: Any) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nsecret-1\n")
    command = [sys.executable, "-m", "cabochon", "serve", "--port", "0", "--api-keys", str(keys)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr
        url = process.stderr.readline().split()[-1]
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret-1"}, timeout=60) as client:
            wait_until(lambda: client.get("/ready").status_code == 200)
            assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret-2"}).status_code == 401
            with client.stream("POST", CHAT, json=asks("Hi", stream=True, max_tokens=400, **ENDLESS)) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: client.get("/ready").status_code == 503)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0
        assert '"event":"ended"' in process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--max-n", "0"], "--max-n"), (["--api-keys", "/nowhere/keys"], "api-keys"), (["--port", "x"], "port")],
)
def test_flags_that_make_no_sense(flags: list[str], said: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "cabochon", "serve", *flags], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and said in ended.stderr
