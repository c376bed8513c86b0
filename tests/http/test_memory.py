"""What a server keeps of the requests that it has answered."""

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from cabochon.generate.request import Request
from cabochon.model.paged import PagedBatch
from cabochon.serve.job import Job
from servers import CHAT, Running, asks, events, wait_until


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, httpx.Client]]:
    """A server of its own, so that all memory is the server's: its process id, and a client."""
    command = [sys.executable, "-m", "cabochon", "serve", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr
        url = server.stderr.readline().split()[-1]
        with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
            with httpx.Client(base_url=url, timeout=60) as client:
                wait_until(lambda: client.get("/ready").status_code == 200)
                yield server.pid, client
            server.kill()
    finally:
        server.kill()
        server.wait()


def memory(pid: int) -> float:
    """MiB, without the pages for keys and values, which are shared memory and end where they were told to."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_prompts_of_every_length(process: tuple[int, httpx.Client], path: str, field: str) -> None:
    """oneDNN writes code for each shape of matrices: half a MiB, five times for each number of tokens in a step."""
    pid, client = process

    def ask(lengths: Iterable[int]) -> float:
        for length in lengths:
            body = {field: [length + i for i in range(length)]}  # begins as no other
            assert client.post(path, json=body | ({"max_tokens": 1} if field == "prompt" else {})).status_code == 200
        return memory(pid)

    before = ask(range(20, 300, 4))  # all numbers of rows that they are rounded to, and more code than is kept
    assert ask(range(22, 300, 4)) - before < 25


def test_nothing_of_an_answer_waits_for_the_collector(server: Running, client: httpx.Client) -> None:
    """What is part of a circle stays until Python looks for circles, here for hundreds of steps."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        events(client, CHAT, asks("Hi", stream=True, max_tokens=5))
        client.post(CHAT, json=asks("Hello", max_tokens=5, n=2))
        wait_until(lambda: not server.bridge.pending and server.bridge.lm.engine.idle)
        gc.collect()
        left = [one for one in gc.garbage if isinstance(one, torch.Tensor | PagedBatch | Request | Job)]
        assert not left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
