"""A whole file of prompts answered: a line for each, in the same order, in files of a fixed number of them.

A file is there when all of it is, so a run that was killed goes on with those that are missing, and several processes,
or machines that see the same folder, can share the work.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.files import atomic_write
from cabochon.data.prompts import prompt_rows
from cabochon.lm.model import LM
from cabochon.lm.synthesize import conversations, prompt_ids

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Part:
    """Prompts `start` to `stop`, and the file of their answers."""

    start: int
    stop: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is asked and where answers go.

    Attributes:
        sources: files or folders of rows with `prompt` or `messages`.
        out: a folder.
        size: prompts to a file.
        sampling: as in `LM.generate`; a seed is changed from file to file.
        model: what it is called; one of another name does not go on in the same folder.
    """

    sources: Sequence[str]
    out: str
    size: int
    sampling: Mapping[str, Any]
    model: str = ""

    def missing(self) -> list[Part]:
        """The files that are not there yet. Makes the folder.

        Raises `UsageError` when something else was begun in it, and as `prompt_rows`; `OSError` as it comes.
        """
        folder, settings = Path(self.out), {"size": self.size, "sampling": dict(self.sampling)}
        count, told = sum(len(rows.sizes) for rows in prompt_rows(self.sources)), folder / SETTINGS
        settings |= {"sources": list(self.sources), "prompts": count, "model": self.model}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        if not told.exists():
            if folder.exists() and any(folder.iterdir()):
                raise UsageError(f"{folder} was not written", "there is something else in it", "name another folder")
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(told) as file:
                file.write(json.dumps({"key": key, **settings}, default=str, indent=2).encode())
        elif f'"key": "{key}"' not in told.read_text(encoding="utf-8", errors="replace"):
            cause = "it was begun with another model, other prompts or settings"
            raise UsageError(f"{folder} was not gone on with", cause, f"compare with {told}, or name another folder")
        parts = [
            Part(start, min(start + self.size, count), f"part-{start // self.size:06}.jsonl")
            for start in range(0, count, self.size)
        ]
        return [part for part in parts if not (folder / part.file).exists()]

    def answer(self, lm: LM, part: Part) -> None:
        """Write one file: `{"index", "messages", "answer", "finish_reason"}` a line.

        Without an answer, because a row asks nothing or does not fit the context, the last two are null.
        """
        rows = list(conversations(prompt_rows(self.sources), part.start, part.stop))
        asked = [prompt_ids(lm, messages) for _, messages in rows]
        seed = self.sampling.get("seed")
        changed = self.sampling if seed is None else {**self.sampling, "seed": seed + part.start}
        known = [ids for ids in asked if ids]
        answers = iter(lm.generate(known, **changed) if known else [])
        with atomic_write(Path(self.out, part.file)) as file:
            for index, (ids, (_, messages)) in enumerate(zip(asked, rows, strict=True), part.start):
                found = next(answers) if ids else None
                said = {"answer": found.text, "finish_reason": found.finish_reason} if found else {}
                line = {"index": index, "messages": messages, "answer": None, "finish_reason": None, **said}
                # What cannot be asked may have halves of characters, which are text in JSON's escapes alone.
                file.write((json.dumps(line, ensure_ascii=ids is None) + "\n").encode())

    def unwritten(self, error: OSError) -> MissingResource:
        """What to tell a user whose disk is full or whose folder is gone."""
        hint = "free some space and give the same command again: it goes on"
        return MissingResource(f"{self.out} was not written to its end", error.strerror or str(error), hint)
