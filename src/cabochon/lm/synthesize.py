"""A teacher writes: answers to a file of prompts, as conversations or preferences that a student can be tuned on.

Sequence-level distillation (arXiv 1606.07947), as Zephyr and OpenHermes were made. Batches of prompts go through the
engine side by side. What is done is on the disk after each batch, and noted beside it, so that a run which was killed
goes on at the next prompt; the same seed then gives the same file.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.base.files import atomic_write
from cabochon.data.prompts import conversation, prompt_rows
from cabochon.data.records import BadRow, Rows
from cabochon.lm.best_of import BestOf
from cabochon.lm.model import LM
from cabochon.text.chat import Message, encode_chat


@dataclass
class Written:
    """What became of the prompts so far: read, written, and left out because of what they or their answers were."""

    read: int = 0
    written: int = 0
    unfinished: int = 0  # the answer came to --max-new-tokens
    repeated: int = 0  # the same prompt had the same answer before
    unusable: int = 0  # no prompt in the row, or too long for the context
    unscored: int = 0  # no answer got a reward
    undecided: int = 0  # all answers got the same reward

    def left_out(self) -> str:
        """How many were left out, and why, in words; empty if none were."""
        counts = {name: count for name, count in asdict(self).items() if name not in ("read", "written") and count}
        return ", ".join(f"{count} {name}" for name, count in counts.items())


@dataclass(frozen=True)
class _Asked:
    """A row, what it asks, and whole answers to it, each once; `failed` is the word for why there is none."""

    row: Mapping[str, Any]
    messages: list[Message]
    answers: list[str]
    failed: str = ""


def synthesize(
    lm: LM,
    sources: Sequence[str],
    out: Path,
    *,
    named: str = "",
    batch: int = 64,
    sampling: Mapping[str, Any] | None = None,
    best: BestOf | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Written:
    """Write one line of JSON for each prompt whose answer came to its end: `{"messages": [...]}`, or as `best` says.

    Args:
        lm: the teacher.
        sources: files or folders whose rows have `prompt` (a text) or `messages`, of which those before the last
            answer are the prompt.
        out: a file; there may be the beginning of the same one.
        named: what the teacher is called; one of another name does not go on with its file.
        batch: prompts side by side.
        sampling: as in `LM.generate`. A seed is changed from prompt to prompt.
        best: draw several answers to each prompt and choose among them; None: one, which is kept.
        report: called with the number of prompts done, after each batch.

    Raises:
        UsageError: the file is there and is something else.
        BadInput: nothing could be written, for instance because no row has a prompt.
        MissingResource: the file cannot be written; what is written stays.
    """
    settings = {"max_new_tokens": 512, **(sampling or {})}
    told = [named, list(sources), batch, settings]
    if best:
        settings["n"] = best.n
        told.append([best.pairs, best.named])
    key = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    rows, note = prompt_rows(sources), out.with_name(f".{out.name}.unfinished")
    try:
        done, seen = _begin(out, note, key)
        waiting = list(conversations(rows))[done.read :]
        for start in range(0, len(waiting), batch):
            part = list(_answered(lm, waiting[start : start + batch], settings, done.read))
            with out.open("ab") as file:
                for found in _chosen(part, best):
                    _count(done, found, seen, file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            _note(note, key, size, done)
            report(len(part))
    except OSError as error:
        hint = "check the path, or free some space, and give the same command again: it goes on"
        raise MissingResource(f"{out} was not written to its end", error.strerror or str(error), hint) from None
    if not done.written:
        out.unlink()
    note.unlink(missing_ok=True)
    if not done.written:
        cause = f"of {done.read} rows {done.left_out()}"
        hint = "answers that are cut need more --max-new-tokens; rows have `prompt`, a text, or `messages`"
        raise BadInput(f"there is nothing to write to {out}", cause, hint)
    return done


def _note(note: Path, key: str, size: int, done: Written) -> None:
    with atomic_write(note) as file:
        file.write(json.dumps({"key": key, "size": size, "done": asdict(done)}).encode())


def _begin(out: Path, note: Path, key: str) -> tuple[Written, set[bytes]]:
    """What an earlier run has done, its unnoted end cut off."""
    if not out.exists():
        _note(note, key, 0, Written())  # before the first line, so that a kill at any moment finds it
        return Written(), set()
    noted = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if noted.get("key") != key:
        raise UsageError(
            f"{out} was not written",
            "there is a file that this command did not begin, or has finished",
            "name another with --out",
        )
    with out.open("r+b") as file:
        file.truncate(noted["size"])
        seen = {_mark(line) for line in file}
    return Written(**noted["done"]), seen


def conversations(
    rows: Sequence[Rows], start: int = 0, stop: int | None = None
) -> Iterator[tuple[Mapping[str, Any], list[Message]]]:
    """Rows from `start` up to `stop` and what they ask, which is nothing where they cannot be used."""
    before = 0
    for part in rows:
        first, last = max(0, start - before), len(part.sizes) if stop is None else min(len(part.sizes), stop - before)
        before += len(part.sizes)
        for number in range(first, last):
            row: Mapping[str, Any] = {}
            try:
                row = part.read(number).row()
                yield row, conversation(row)
            except BadRow:
                yield row, []


def prompt_ids(lm: LM, messages: Sequence[Message]) -> list[int] | None:
    """A conversation as token ids; None for one that cannot be asked."""
    try:
        ids = encode_chat(lm.text_tokenizer, messages) if messages else None
    except CabochonError:
        return None
    return ids if ids and len(ids) < lm.context_length else None


def _answered(
    lm: LM, part: Sequence[tuple[Mapping[str, Any], list[Message]]], settings: Mapping[str, Any], start: int
) -> Iterator[_Asked]:
    """A batch of conversations with their answers."""
    encoded = [prompt_ids(lm, messages) for _, messages in part]
    known = [ids for ids in encoded if ids]
    seed, several = settings.get("seed"), int(settings.get("n", 1))
    changed = settings if seed is None else {**settings, "seed": seed + start}
    found = iter(lm.generate(known, **changed) if known else [])
    for (row, messages), ids in zip(part, encoded, strict=True):
        said = [answer for answer in itertools.islice(found, several if ids else 0) if answer.text.strip()]
        whole = dict.fromkeys(answer.text for answer in said if answer.finish_reason == "stop")
        yield _Asked(row, messages, list(whole), "" if whole else "unfinished" if said else "unusable")


def _chosen(part: Sequence[_Asked], best: BestOf | None) -> Iterator[dict[str, Any] | str]:
    """What is written of each prompt, or the word for why nothing is."""
    if best is None:
        for asked in part:
            yield asked.failed or {"messages": [*asked.messages, {"role": "assistant", "content": asked.answers[0]}]}
        return
    every = [(asked.messages[-1]["content"], text, asked.row) for asked in part for text in asked.answers]
    scores = iter(best.score(every))
    for asked in part:
        scored = [(text, next(scores)) for text in asked.answers]
        yield asked.failed or best.row(asked.messages, scored)


def _count(done: Written, found: dict[str, Any] | str, seen: set[bytes], file: Any) -> None:
    """Write a line that is new, and count what became of it."""
    done.read += 1
    if not isinstance(found, str):
        line = (json.dumps(found, ensure_ascii=False) + "\n").encode()
        found = "repeated" if _mark(line) in seen else "written"
        if found == "written":
            seen.add(_mark(line))
            file.write(line)
    setattr(done, found, getattr(done, found) + 1)


def _mark(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()
