"""A judge over HTTP: a server that behaves badly in all known ways, and `cabochon serve` itself."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.cli.main import main
from cabochon.train.judge import TEMPLATE, Judge, JudgeConfig, open_judge, verdict
from cabochon.train.reward_build import open_rewards
from cabochon.train.reward_config import RewardConfig
from cabochon.train.scoring import Failure, Sample


class Fake:
    """Answers with what `answer` gives for a request: (status, body or text of the reply, or its parts, slowly)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> None:
        self.asked: list[tuple[dict[str, Any], Any]] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.asked.append((body, handler.headers))
                    number = len(self.asked)
                status, said = answer(number, body)
                if said is None:  # hang up
                    handler.connection.close()
                    return
                if said is ...:  # break off in the middle of the body
                    handler.wfile.write(b"HTTP/1.1 %d No\r\nContent-Length: 100\r\n\r\nbe" % status)
                    linger = struct.pack("ii", 1, 0)  # with a reset
                    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    handler.close_connection = True
                    return
                if isinstance(said, str):
                    said = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(sum(map(len, said)) if isinstance(said, list) else len(said)))
                if status == 429:
                    handler.send_header("Retry-After", "3")
                handler.end_headers()
                with suppress(ConnectionError):  # who asks may not wait for all of it
                    for part in said if isinstance(said, list) else [said]:
                        handler.wfile.write(part)
                        time.sleep(0.1 if isinstance(said, list) else 0)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def fake(answer: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> Iterator[Fake]:
    server = Fake(answer)
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()


@contextmanager
def judge(url: str, **settings: Any) -> Iterator[tuple[Judge, list[float]]]:
    waited: list[float] = []
    made = Judge(JudgeConfig(url=url, **settings), sleep=waited.append)
    try:
        yield made, waited
    finally:
        made.close()


def samples(*texts: str) -> list[Sample]:
    return [Sample("What is 3 + 4?", text, {"answer": 7}) for text in texts]


def last_word(number: int, body: dict[str, Any]) -> tuple[int, str]:
    """Says the number that the answer under judgement consists of."""
    said = body["messages"][0]["content"].split("Answer: ")[1].split("\n")[0]
    return 200, f"It is fine.\n\nScore: {said}"


def test_scores_come_in_order_and_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "judge.jsonl"
    with fake(last_word) as server:
        with judge(server.url, cache=cache, model="m", key="secret") as (first, _):
            assert first(samples(*map(str, range(10)), "3")) == [n / 10 for n in range(10)] + [0.3]
            assert first(samples("5")) == [0.5]
        assert len(server.asked) == 10
        body, headers = server.asked[0]
        assert body["model"] == "m" and body["temperature"] == 0 and headers["Authorization"] == "Bearer secret"
        with cache.open("a") as file:
            file.write('{"asked": "cut off by a ki')
        with judge(server.url, cache=cache, model="m") as (second, _):
            assert second(samples("7", "5")) == [0.7, 0.5]
        assert len(server.asked) == 10
        with judge(server.url, cache=cache, model="another") as (third, _):  # another judge, another verdict
            assert third(samples("5")) == [0.5]
        assert len(server.asked) == 11
        assert all(json.loads(line) for line in cache.read_text().splitlines())


def test_what_is_busy_is_asked_again_later_and_later() -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        return [(503, b"busy"), (429, b"slow down"), (200, None), (200, "Score: 8")][number - 1]

    with fake(answer) as server, judge(server.url) as (one, waited):
        assert one(samples("x")) == [0.8]
        assert waited == [1, 3, 4]  # the server asked for 3 instead of 2


@pytest.mark.parametrize(
    ("status", "said", "tries", "reason"),
    [
        (500, b"broken", 5, "500"), (401, b"no key", 1, "no key"), (404, b"no such model", 1, "no such model"),
        (200, b"not json", 1, "no chat completion"), (200, b"{}", 1, "no chat completion"), (200, b"[]", 1, "no chat"),
        (200, b'{"choices": []}', 1, "no chat"), (200, b'{"choices": [{"message": {"content": null}}]}', 1, "no chat"),
        (200, "I cannot say", 1, "no number"), (200, "", 1, "no number"), (200, "Score: 11", 1, "scale"),
        (200, None, 5, "cannot be reached"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_a_failure(status: int, said: Any, tries: int, reason: str, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    with fake(lambda number, body: (status, said)) as server, judge(server.url, cache=cache) as (one, waited):
        (found,) = one(samples("x"))
        assert isinstance(found, Failure) and reason in found.reason
        assert len(server.asked) == tries == len(waited) + 1
        assert not cache.exists()  # a run begins in an empty folder


def test_a_refusal_that_breaks_off_is_a_failure() -> None:
    with fake(lambda number, body: (400, ...)) as server, judge(server.url) as (made, _):
        (found,) = made(samples("4"))
        assert isinstance(found, Failure) and "400" in found.reason


def test_a_server_that_hangs_is_given_up() -> None:
    released = threading.Event()

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        released.wait(30)
        return 200, "Score: 1"

    with fake(answer) as server, judge(server.url, seconds=0.1) as (one, _):
        (found,) = one(samples("x"))
        assert isinstance(found, Failure) and "timed out" in found.reason
        released.set()


def test_nobody_there() -> None:
    with judge("http://127.0.0.1:9/v1") as (one, waited):
        (found,) = one(samples("x"))
    assert isinstance(found, Failure) and waited == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        ("Score: 7", 0.7),
        ("**Score:** 10", 1.0),
        ("score = 2.5 of 10", 0.25),
        ("Score: 3\nNo: Score: 4", 0.4),
        ("9", 0.9),
    ],
)
def test_verdicts(said: str, worth: float) -> None:
    assert verdict(said, 10) == worth


def test_the_prompt_is_filled_in_once() -> None:
    template = "{prompt}|{completion}|{answer}|{json}"
    with fake(lambda number, body: (200, "Score: 1")) as server, judge(server.url, template=template) as (one, _):
        one([Sample("{completion}", "{prompt}", {"answer": 7, "json": {"a": 1}})])
        assert server.asked[0][0]["messages"][0]["content"] == "{completion}|{prompt}|7|{'a': 1}"
        (found,) = one([Sample("?", "!", {})])
        assert isinstance(found, Failure) and "'answer'" in found.reason


def test_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no judge"):
        JudgeConfig(url="localhost:8000")
    with pytest.raises(UsageError, match="completion"):
        JudgeConfig(url="http://x", template="How good is {prompt}?")
    with pytest.raises(MissingResource, match="judge-cache"):
        Judge(JudgeConfig(url="http://x", cache=tmp_path))
    with pytest.raises(MissingResource, match="Not a directory"):
        Judge(JudgeConfig(url="http://x", cache=tmp_path / "file" / "deep" / "judge.jsonl"))
    for text in ("hello\n", "hello", '{"asked": "1", "answer": "2"}\nhello'):
        (tmp_path / "other.txt").write_text(text)
        with pytest.raises(BadInput, match="no verdicts"):
            Judge(JudgeConfig(url="http://x", cache=tmp_path / "other.txt"))
        assert (tmp_path / "other.txt").read_text() == text  # it may be somebody's
    with pytest.raises(MissingResource, match="judge-prompt"):
        open_rewards(RewardConfig(reward=("judge:http://x",), judge_prompt=tmp_path / "no"), tmp_path, "cpu")


def test_by_name_with_a_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment\n")  # as a file of secrets gives it
    with fake(last_word) as server:
        rewards = open_rewards(RewardConfig(reward=(f"judge:{server.url}",), judge_scale=5), tmp_path, "cpu")
        assert rewards(samples("4"))[0].total == 0.8
        rewards.close()
        assert server.asked[0][1]["Authorization"] == "Bearer from the environment"
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


def test_a_run_begins_with_a_judge_and_goes_on_with_its_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "What is 3 + 4?"}\n')
    flags = "--steps 2 --prompts-per-step 1 --samples 2 --max-new-tokens 4 --length 64 --sample-temperature 2"
    with fake(lambda number, body: (200, f"Score: {number % 7}")) as server:
        words = ["train", "policy", "--prompts", "prompts.jsonl", "--reward", f"judge:{server.url}", "--out", "run"]
        assert main([*words, *flags.split(), "--device", "cpu"]) == 0
    assert len(Path("run/judge.jsonl").read_text().splitlines()) == len(server.asked) > 1


def test_our_own_server_can_be_the_judge() -> None:
    import cabochon
    from servers import MODEL, running

    # The model inside works sums out; asked for one, the last number that it says is the verdict.
    with running(cabochon.load()) as server:
        config = JudgeConfig(url=f"{server.url}/v1", model=MODEL, template="{completion}", scale=20)
        made = open_judge(config)
        assert made(samples("What is 3 + 4?", "What is 5 + 6?")) == [7 / 20, 11 / 20]
        made.close()


def test_the_usual_prompt_has_places_for_both() -> None:
    assert "{prompt}" in TEMPLATE and "{completion}" in TEMPLATE


def test_an_answer_that_comes_in_drops_is_not_waited_for() -> None:
    with fake(lambda number, body: (200, [b" "] * 20)) as server, judge(server.url, seconds=0.3) as (ask, waited):
        (found,) = ask(samples("7"))
        assert isinstance(found, Failure) and "does not come to an end (5 times)" in found.reason
        assert len(waited) == 4
