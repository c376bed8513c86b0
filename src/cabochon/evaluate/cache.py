"""Finished requests on the disk, by content, so that an interrupted evaluation goes on where it stopped.

One file of JSON lines for each model, where a model is the values of its weights and whatever else changes its answers.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from cabochon.base.errors import MissingResource
from cabochon.lm import LM

Value = Any  # what JSON holds
INTERVAL = 1.0  # seconds of work that may be lost when the process is killed


class Store:
    """Values by key, in memory, and appended to a file if there is one."""

    def __init__(
        self, file: IO[bytes] | None = None, known: dict[str, Value] | None = None, begin: bytes = b""
    ) -> None:
        """`begin`: what is written before the first value."""
        self._file, self._known = file, known or {}
        self._lines = [begin] if begin else []
        self._written = time.monotonic()
        self.reused = 0
        self.trouble = ""  # why nothing more is written

    def get(self, key: str) -> Value | None:
        """What was put under a key; None: nothing."""
        found = self._known.get(key)
        self.reused += found is not None
        return found

    def put(self, key: str, value: Value) -> None:
        """Keep a value, also beyond the end of the process."""
        self._known[key] = value
        self._lines.append(json.dumps([key, value]).encode() + b"\n")
        if time.monotonic() - self._written > INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last time; whole lines at once, so that two processes may share a file."""
        if self._file and self._lines:
            try:
                self._file.write(b"".join(self._lines))
            except OSError as error:  # an evaluation does not need it
                self._file, self.trouble = None, error.strerror or str(error)
        self._lines.clear()
        self._written = time.monotonic()


@contextmanager
def open_store(folder: Path | None, model: str) -> Iterator[Store]:
    """The store of a model in a folder; None keeps nothing. Raises `MissingResource` when it cannot be written."""
    if folder is None:
        yield Store()
        return
    path = folder / f"{model}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read(path)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        cause = error.strerror or str(error)
        raise MissingResource(f"{path} cannot be used", cause, "name another folder, or use --no-cache") from None
    with file:
        store = Store(file, known, b"" if not file.tell() or _ends_a_line(file) else b"\n")
        try:
            yield store
        finally:
            store.flush()


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def _read(path: Path) -> dict[str, Value]:
    """What is there; a line that was cut off, or damaged, is left out."""
    known = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            key, value = json.loads(line)
            known[str(key)] = value
        except (ValueError, TypeError):
            continue
    return known


def request_key(*parts: Any) -> str:
    """One word for a request: everything that its answer depends on beside the model."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def model_key(lm: LM) -> str:
    """One word for the weights of a model, its configuration, and its tokenizer's pieces."""
    parts = [json.dumps(asdict(lm.config), sort_keys=True), str(lm.model.attention_backend), lm.model.device.type]
    for name, tensor in lm.model.state_dict().items():
        parts += [name, str(tensor.dtype), str(list(tensor.shape)), _digest(tensor)]
    if lm.tokenizer:
        pieces = (lm.tokenizer.token_bytes(i) for i in range(lm.tokenizer.vocab_size))
        parts.append(hashlib.sha256(b"\0".join(pieces)).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _digest(tensor: torch.Tensor) -> str:
    found = hashlib.sha256()
    for part in tensor.detach().reshape(-1).view(torch.uint8).split(2**28):
        found.update(part.cpu().numpy())
    return found.hexdigest()
