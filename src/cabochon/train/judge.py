"""A judge: another model, behind any OpenAI-compatible endpoint, that is asked what an answer is worth.

Verdicts are kept in a file by the content of what was asked, so that a run that goes on, or another one, gets the same
ones at no cost. What is only busy or away for a moment is asked again, later and later.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cabochon.base.answers import last_number
from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.train.scoring import Failure, Sample, Score

TEMPLATE = """Here is a question and an answer to it.

Question: {prompt}

Answer: {completion}

How good is the answer? Think of whether it is right, whether it helps, and whether anything in it is superfluous. \
Say why in one sentence. Then write, on a line of its own, a whole number from 0 (useless) to 10 (perfect) as

Score: NUMBER"""

KEY = "CABOCHON_JUDGE_KEY", "OPENAI_API_KEY"  # environment variables, the first that is set
TRIES, FIRST_DELAY, LONGEST_DELAY = 5, 1.0, 30.0  # seconds
SIDE_BY_SIDE = 8
_BEGINNING = b'{"asked": "'  # of a line of the cache
_VERDICT = re.compile(r"score\s*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge is asked.

    Args:
        url: the endpoint, as OpenAI's clients take it: http://localhost:8000/v1.
        model: its name there.
        template: what is asked; {prompt}, {completion} and keys of the row are filled in.
        scale: the verdict that is worth 1.
        seconds: that one request may take.
        cache: a file for verdicts; None: they are kept in memory.
        key: for the endpoint.
    """

    url: str
    model: str = "default"
    template: str = TEMPLATE
    scale: float = 10.0
    seconds: float = 60.0
    cache: Path | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"{self.url!r} is no judge", "it is not an address", "--reward judge:http://HOST:PORT/v1")
        if "completion" not in _PLACE.findall(self.template):
            raise UsageError("the judge would not see the answer", "its prompt has no {completion}", "add it")


def open_judge(config: JudgeConfig) -> "Judge":
    """The judge, with a key from the environment where none is given. Raises as `Judge`."""
    key = config.key or next((found for name in KEY if (found := os.environ.get(name, "").strip())), None)
    return Judge(replace(config, key=key))


class Judge:
    """Scores between 0 and 1, several requests at a time. Raises `MissingResource` when the cache cannot be used."""

    def __init__(self, config: JudgeConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self.sleep = config, sleep
        self.known = _read(config.cache) if config.cache else {}
        self.pool = ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="judge")

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each answer, or why there is none. What is asked twice is asked once."""
        asked = [self._question(sample) for sample in samples]
        questions = dict.fromkeys(q for q in asked if isinstance(q, str) and self._mark(q) not in self.known)
        said = dict(zip(questions, self.pool.map(self._ask, questions), strict=True))
        for question, answer in said.items():
            if isinstance(answer, str) and not isinstance(verdict(answer, self.config.scale), Failure):
                self._keep(question, answer)
        return [self._score(question, said) for question in asked]

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()

    def _question(self, sample: Sample) -> str | Failure:
        values: Mapping[str, Any] = {**sample.row, "prompt": sample.prompt, "completion": sample.completion}
        missing = next((name for name in _PLACE.findall(self.config.template) if name not in values), None)
        if missing:
            return Failure(f"the row has no {missing!r}, which the judge's prompt needs")
        return _PLACE.sub(lambda found: str(values[found[1]]), self.config.template)

    def _score(self, question: str | Failure, said: Mapping[str, str | Failure]) -> Score:
        if isinstance(question, Failure):
            return question
        answer = said[question] if question in said else self.known[self._mark(question)]
        return answer if isinstance(answer, Failure) else verdict(answer, self.config.scale)

    def _mark(self, question: str) -> str:
        return hashlib.sha256(json.dumps([self.config.url, self.config.model, question]).encode()).hexdigest()

    def _keep(self, question: str, answer: str) -> None:
        mark = self._mark(question)
        self.known[mark] = answer
        if self.config.cache:
            try:
                self.config.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.config.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"asked": mark, "answer": answer}) + "\n")
            except OSError as error:
                raise _unusable(self.config.cache, error) from None

    def _ask(self, question: str) -> str | Failure:
        for attempt in range(TRIES):
            try:
                return self._request(question)
            except urllib.error.HTTPError as error:
                failed, wait = f"the server said {error.code} {error.reason}", error.headers.get("Retry-After")
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    return Failure(f"{failed}: {_beginning(error)}")
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
                failed, wait = f"{self.config.url} cannot be reached: {error}", None
            except (ValueError, LookupError, TypeError):
                return Failure("the server's answer is no chat completion")
            if attempt < TRIES - 1:
                self.sleep(_delay(attempt, wait))
        return Failure(f"{failed} ({TRIES} times)")

    def _request(self, question: str) -> str:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 512,
        }
        headers = {"Content-Type": "application/json"}
        if self.config.key:
            headers["Authorization"] = f"Bearer {self.config.key}"
        url = self.config.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        until = time.monotonic() + self.config.seconds
        with urllib.request.urlopen(request, timeout=self.config.seconds) as response:
            said = json.loads(_body(response, until))["choices"][0]["message"]["content"]
        if not isinstance(said, str):
            raise TypeError
        return said


def _beginning(error: urllib.error.HTTPError) -> str:
    """What the server said beside the status, as far as it comes."""
    try:
        return error.read(300).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return "and the rest of its answer did not come"


def _body(response: http.client.HTTPResponse, until: float) -> bytes:
    """All of it. Raises `TimeoutError` where it comes in drops, each of them in time."""
    parts = []
    while part := response.read1(2**16):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError("its answer does not come to an end")
    return b"".join(parts)


def verdict(answer: str, scale: float) -> Score:
    """What a judge's words come to: the last `Score: NUMBER`, or else the last number, divided by the scale."""
    said = _VERDICT.findall(answer)
    number = float(said[-1]) if said else last_number(answer)
    if number is None:
        return Failure(f"the judge named no number: {answer[-80:]!r}")
    if not 0 <= number <= scale:
        return Failure(f"the judge said {number}, and the scale goes from 0 to {scale:g}")
    return float(number) / scale


def _delay(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next try; the server may ask for more, within reason."""
    asked = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
    return min(LONGEST_DELAY, max(asked, FIRST_DELAY * (1 << attempt)))


def _read(path: Path) -> dict[str, str]:
    """Verdicts by what was asked, without a last line that was not finished.

    The file is made with the first verdict, because a run wants an empty folder; that it can be made is asked now.
    """
    known: dict[str, str] = {}
    try:
        _check_writable(path)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            record = json.loads(line)
            known[record["asked"]] = str(record["answer"])
        if content[whole:][: len(_BEGINNING)] != _BEGINNING[: len(content) - whole]:
            raise ValueError
        if whole < len(content):
            os.truncate(path, whole)
    except OSError as error:
        raise _unusable(path, error) from None
    except (ValueError, LookupError, TypeError):
        cause = "it has lines that are no verdicts"
        raise BadInput(f"{path} cannot keep verdicts", cause, "name another file: --judge-cache") from None
    return known


def _check_writable(path: Path) -> None:
    """Raise `OSError` when a file cannot be written, or made in folders that are to be made."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if there.is_dir() == (there == path.absolute()):
        code = errno.EISDIR if there.is_dir() else errno.ENOTDIR
        raise OSError(code, os.strerror(code))
    if not os.access(there, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _unusable(path: Path, error: OSError) -> MissingResource:
    cause = error.strerror or str(error)
    return MissingResource(f"the judge's verdicts cannot be kept in {path}", cause, "name another file: --judge-cache")
