"""What the server adds to the engine, and what it withstands, with the model inside. Prints a table.

    python benchmarks/serving.py [--aborts 10000] [--soak 20000]

The bare engine and the server, a process of its own, are measured in turn on the same machine; clients are a third
process. All three share the cores, so on two cores throughput counts the clients against the server.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import cabochon
from cabochon.generate.engine import EngineConfig
from cabochon.generate.sampling import SamplingParams
from cabochon.lm import LM
from cabochon.text.chat import encode_chat

STREAMS, TOKENS = 64, 256
END = {"1": -100, "107": -100}  # so that every answer has its full length
CLIENT = Path(__file__).with_name("serving_client.py")


def question(number: int) -> str:
    return f"What is {number}+{number % 7}?"


def body(number: int, tokens: int = TOKENS) -> dict[str, Any]:
    said = [{"role": "user", "content": question(number)}]
    asked = {"messages": said, "temperature": 0, "max_tokens": tokens, "logit_bias": END}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}}  # an event may hold several tokens


def bare(lm: LM, count: int) -> tuple[float, list[float], list[str]]:
    """Tokens per second of the engine alone, seconds to each first token, and the answers."""
    own = LM(lm.model, lm.tokenizer, EngineConfig(max_requests=64))
    tokenizer, bias = own.text_tokenizer, {int(k): float(v) for k, v in END.items()}
    params = SamplingParams(max_new_tokens=TOKENS, logit_bias=bias)
    begun, first, tokens = time.perf_counter(), {}, 0
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question(i)}]) for i in range(count)]
    requests = [own.engine.submit(prompt, params) for prompt in prompts]
    while not own.engine.idle:
        for sampled in own.engine.step():
            first.setdefault(sampled.request, time.perf_counter() - begun)
            tokens += 1
    rate = tokens / (time.perf_counter() - begun)
    return rate, sorted(first.values()), [tokenizer.decode(r.generated) for r in requests]


class Served:
    """A server process."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "cabochon", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.url = self.process.stderr.readline().split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        # Its log is read by nobody else; a full pipe would stop it.
        self._log = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        while not self.ready():
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/ready").status == 200
        except OSError:
            return False

    def figure(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"cabochon_{name} "))

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def load(self, bodies: list[dict[str, Any]], starts: list[float] | None = None) -> dict[str, Any]:
        plan = json.dumps({"bodies": bodies, "starts": starts or [0.0] * len(bodies)})
        command = [sys.executable, str(CLIENT), str(self.port)]
        done = subprocess.run(command, input=plan, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self._log.wait()


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def added(lm: LM, server: Served, rounds: int) -> dict[str, str]:
    """Throughput and time to first token, beside the bare engine's in the same minute."""
    ratios, waits = [], []
    for _ in range(rounds):
        rate, firsts, _ = bare(lm, STREAMS)
        got = server.load([body(i) for i in range(STREAMS)])
        tokens = sum(r["tokens"] for r in got["results"])
        ratios.append(tokens / got["seconds"] / rate)
        waits.append(p99([r["first"] for r in got["results"]]) - p99(firsts))
    return {
        "throughput of the bare engine, at 64 streams": f"{statistics.median(ratios):.0%}",
        "added to the p99 of the first token, at 64 streams": f"{1000 * statistics.median(waits):.0f} ms",
    }


def crowd(lm: LM, server: Served) -> dict[str, str]:
    """256 streams, each compared with what the engine says alone."""
    _, _, expected = bare(lm, 256)
    got = server.load([body(i) for i in range(256)])["results"]
    right = sum(r["whole"] and r["status"] == 200 and r["text"] == e for r, e in zip(got, expected, strict=True))
    return {"of 256 streams at once, whole and right": str(right)}


def overload(rate: float) -> dict[str, str]:
    """Three times what the server can do, for half a minute: what is finished, and how soon the rest is told.

    Filling up and running empty count as well, which is why it has to last.
    """
    server = Served("--max-waiting", "64")
    try:
        per_second = 3 * rate / TOKENS
        count = int(30 * per_second)
        got = server.load([body(i) for i in range(count)], [i / per_second for i in range(count)])
        answered = [r for r in got["results"] if r["status"] == 200]
        refused = [r["head"] for r in got["results"] if r["status"] == 429]
        goodput = sum(r["tokens"] for r in answered) / got["seconds"]
        return {
            "goodput at 3 x capacity, of the peak": f"{goodput / rate:.0%}",
            "429 at 3 x capacity, p99": f"{1000 * p99(refused):.0f} ms ({len(refused)} of {count})",
        }
    finally:
        server.end()


def aborts(server: Served, count: int) -> dict[str, str]:
    """Clients that go in the middle of an answer."""
    content = json.dumps({**body(0, 900), "n": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(content) + content
    slowest = 0.0
    for number in range(count):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            connection.recv(10)
        if number % 100 == 99:
            begun = time.perf_counter()
            while server.figure("requests_running") + server.figure("requests_waiting"):
                time.sleep(0.002)
            slowest = max(slowest, time.perf_counter() - begun)
    return {f"places free after clients went, slowest ({count} went)": f"{1000 * slowest:.0f} ms"}


def soak(server: Served, count: int) -> dict[str, str]:
    """Memory before and after many answers.

    Before is when the server has all that it is going to keep: earlier prompts have taken all pages for keys and
    values, and the last 2000 requests added less than half a percent.
    """

    def answer(number: int) -> tuple[int, int]:
        """Ask 2000 times; the answers, and the memory then."""
        got = server.load([body(number + i, 4) for i in range(2000)], [i / 200 for i in range(2000)])
        return sum(r["status"] == 200 for r in got["results"]), server.memory()

    asked, warm, memory, grown = 0, 0, 0, 1
    while asked < 20_000 and (grown > 0.005 * memory or server.figure("cache_used_ratio") < 0.99):
        answered, now = answer(asked)
        asked, warm, grown, memory = asked + 2000, warm + answered, now - memory, now
    before, done = memory, 0
    while done < count:
        answered, memory = answer(asked)
        asked, done = asked + 2000, done + answered
    name = f"memory after {done} answers, from {before / 2**20:.0f} MiB when {warm} had filled the cache"
    return {name: f"{memory / before - 1:+.1%}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--soak", type=int, default=20_000)
    chosen = parser.parse_args()
    lm = cabochon.load()
    server = Served()
    table: dict[str, str] = {}
    try:
        server.load([body(i) for i in range(8)])
        table |= added(lm, server, chosen.rounds) | crowd(lm, server)
        peak = server.load([body(i) for i in range(256)])
        rate = sum(r["tokens"] for r in peak["results"]) / peak["seconds"]
        table |= aborts(server, chosen.aborts) | soak(server, chosen.soak)
    finally:
        server.end()
    table |= overload(rate)
    print("| | |\n|---|---|")
    for name, value in table.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
