"""Rows that ask something: conversations up to where an answer begins, for whatever is going to answer them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.format import check_shape, folded, turns_of
from cabochon.data.records import BadRow, Joined, Rows
from cabochon.data.sources import open_source
from cabochon.text.chat import Message, encode_chat
from cabochon.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer begins, and the row that they come from."""

    ids: list[int]
    row: Mapping[str, Any]


class Prompts(Sequence[Prompt]):
    """All prompts of some sources as token ids; rows are read again when they are asked for.

    Args:
        rows: of the sources.
        numbers: of the rows that can be used.
        ids: of each of them.
        too_long: how many had more tokens than they may.
        complaints: why other rows cannot be used.
    """

    def __init__(
        self,
        rows: Joined,
        numbers: Sequence[int],
        ids: Sequence[npt.NDArray[np.int32]],
        too_long: int,
        complaints: Sequence[str],
    ) -> None:
        self._rows, self._numbers, self._ids = rows, numbers, ids
        self.too_long, self.complaints = too_long, complaints

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        return Prompt(self._ids[number].tolist(), self._rows.read(self._numbers[number]).row())

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(map(len, self._ids))

    def identity(self) -> str:
        """Hash of all their tokens."""
        found = hashlib.sha256()
        for ids in self._ids:
            found.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return found.hexdigest()

    def remarks(self) -> list[str]:
        """What was left out, in sentences."""
        found = []
        if self.too_long:
            found.append(f"{self.too_long} prompts were too long and left out")
        if self.complaints:
            found.append(f"{len(self.complaints)} rows without a usable prompt left out: {self.complaints[0]}")
        return found


def prompt_rows(sources: Sequence[str]) -> list[Rows]:
    """The rows of files and folders. Raises as `open_source`, and `UsageError` for a source that only passes by."""
    found: list[Rows] = []
    for source in sources:
        rows = open_source(source, 1024)
        if not isinstance(rows, list):
            raise UsageError(f"{source} cannot hold prompts", "it can be read only once", "save it to a file first")
        found += rows
    return found


def conversation(row: Mapping[str, Any], *, fold: bool = False) -> list[Message]:
    """What a row asks: its `prompt`, a text or messages, or its `messages` up to the last of the user.

    `fold`: a system message goes before the user's. Raises `BadRow` when there is nothing to be answered.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    keys = [key for key in ("prompt", "conversations", "messages") if isinstance(row.get(key), list)]
    if isinstance(prompt, str) and not keys:
        raise BadRow("its prompt is empty")
    known = turns_of(row, keys[0] if keys else "messages")
    while known and known[-1]["role"] != "user":
        known.pop()
    if not known:
        raise BadRow("there is nothing in it to be answered")
    return folded(known, fold)[0]


def open_prompts(
    sources: Sequence[str], tokenizer: Tokenizer, *, longest: int, fold: bool = False, max_bad_rows: int = 10
) -> Prompts:
    """The prompts of files and folders in Gemma's chat format.

    Args:
        sources: files or folders of rows as `conversation` takes them.
        tokenizer: of the model that answers.
        longest: tokens that a prompt may have; longer ones are left out and counted.
        fold: as in `conversation`.
        max_bad_rows: rows without a usable prompt that may be left out.

    Raises:
        UsageError, MissingResource: as `prompt_rows`.
        BadInput: no prompt can be used, too many rows have none, or the tokenizer cannot write conversations.
    """
    check_shape(tokenizer, "messages")
    rows = Joined(prompt_rows(sources))
    numbers, ids, complaints, too_long = [], [], [], 0
    for number in range(len(rows.sizes)):
        record = rows.read(number)
        try:
            found = encode_chat(tokenizer, conversation(record.row(), fold=fold))
        except (BadRow, BadInput) as error:
            complaints.append(f"{record.place}: {error.cause if isinstance(error, BadInput) else error}")
            continue
        if len(found) > longest:
            too_long += 1
        else:
            numbers.append(number)
            ids.append(np.array(found, np.int32))
    _check(numbers, too_long, complaints, longest, max_bad_rows)
    return Prompts(rows, numbers, ids, too_long, complaints)


def _check(numbers: list[int], too_long: int, complaints: list[str], longest: int, most: int) -> None:
    if len(complaints) > most or not (numbers or too_long):
        raise BadInput(
            f"{len(complaints)} rows have no prompt that can be used",
            complaints[0],
            "rows have `prompt`, a text, or `messages`: rename the keys",
        )
    if not numbers:
        raise BadInput(
            "no prompt can be used",
            f"all {too_long} have more than {longest} tokens",
            "make rows longer (--length), or answers shorter (--max-new-tokens)",
        )
