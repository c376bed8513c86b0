"""Files that a model is measured on: texts, or questions with answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.data.format import chat_example
from cabochon.data.pack import Example
from cabochon.lm.likelihood import STRETCH, answer_example, stretches
from cabochon.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Examples:
    """Examples and the bytes of what is learned in them. `answers`: each has one, so right ones can be counted."""

    examples: list[Example]
    nbytes: int
    answers: bool


def read_examples(path: Path, tokenizer: Tokenizer, context: int) -> Examples:
    """Read a file.

    Args:
        path: of a `.jsonl` file, whose rows have `text`, or `prompt` and `completion`, or `messages` (a chat, in which
            the model's turns are the answers); every other file is one text.
        tokenizer: of the model.
        context: tokens that it can read at once.

    Raises:
        MissingResource: the file cannot be read.
        BadInput: it is empty or not what it should be; rows are named.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check the path") from None
    length = min(context, STRETCH)
    if path.suffix != ".jsonl":
        text = _text(raw, str(path))
        found = Examples(stretches(tokenizer, text, length), len(text.encode()), False)
    else:
        rows = [(n, line) for n, line in enumerate(raw.splitlines(), 1) if line.strip()]
        parts = [_row(line, f"{path}:{number}", tokenizer, length) for number, line in rows]
        if len({part.answers for part in parts}) > 1:
            raise BadInput(f"{path} cannot be used", "some rows have answers and some are texts", "give two files")
        examples = [example for part in parts for example in part.examples]
        found = Examples(examples, sum(part.nbytes for part in parts), bool(parts) and parts[0].answers)
    if not found.examples:
        raise BadInput(f"{path} cannot be used", "there is no text in it", "name a file with some text")
    return found


def _row(line: bytes, where: str, tokenizer: Tokenizer, length: int) -> Examples:
    try:
        row: Any = json.loads(_text(line, where))
    except (ValueError, RecursionError):
        raise BadInput(f"{where} cannot be used", "it is not a line of JSON", "write one object in each line") from None
    row = row if isinstance(row, dict) else {}
    try:
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return Examples(
                [answer_example(tokenizer, row["prompt"], row["completion"])], _size(row["completion"]), True
            )
        if isinstance(row.get("messages"), list):
            example = chat_example(tokenizer, row["messages"])
            said = [m["content"].strip() for m in row["messages"] if m["role"] in ("model", "assistant")]
            if said:
                return Examples([example], sum(map(_size, said)), True)
        if isinstance(row.get("text"), str):
            return Examples(stretches(tokenizer, row["text"], length), _size(row["text"]), False)
    except CabochonError as error:
        raise BadInput(f"{where} cannot be used", error.cause, error.hint) from None
    raise BadInput(
        f"{where} cannot be used",
        "it has no text, no prompt with a completion, and no messages with an answer",
        'write {"text": "..."}, or {"prompt": "...", "completion": "..."}',
    )


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} cannot be used", f"byte {error.start} is not UTF-8", "convert it first") from None


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
