"""What the harness says in strings, as token ids: with BOS exactly once, and chats in Gemma's format.

The harness passes prompts on as text, chats too. The control pieces of a chat's format are marked in that text, so that
they become control ids and whatever an item spells stays text.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from cabochon.text.chat import check_messages
from cabochon.text.tokenizer import Tokenizer

MARK = "\ufdd0"  # a code point that no text has: Unicode keeps it for uses like this one
_CONTROL = re.compile(f"{MARK}<(bos|start_of_turn|end_of_turn)>")


def render(messages: Sequence[Mapping[str, Any]], *, answer_begins: bool) -> str:
    """A conversation as text with marked control pieces.

    Args:
        messages: turns; a last one of the model is the beginning of its answer unless `answer_begins`.
        answer_begins: whether the model's turn comes next.

    Raises `BadInput` as `text.chat.check_messages`.
    """
    turns = check_messages([{**m, "content": str(m["content"]).replace(MARK, "")} for m in messages])
    text = f"{MARK}<bos>"
    for number, turn in enumerate(turns, 1):
        goes_on = number == len(turns) and not answer_begins
        end = "" if goes_on else f"{MARK}<end_of_turn>\n"
        text += f"{MARK}<start_of_turn>{turn['role']}\n{turn['content'].strip()}{end}"
    return text + (f"{MARK}<start_of_turn>model\n" if answer_begins else "")


def shown(text: str) -> str:
    """A prompt without its marks."""
    return text.replace(MARK, "")


class Encoder:
    """Prompts and continuations to token ids, as the harness divides them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The choices of one item have one context and come one after the other.
        self._context = lru_cache(maxsize=4)(self.encode)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """A prompt, one BOS in front unless the caller has it."""
        if not text.startswith(MARK):
            return self._tokenizer.encode(text, bos=bos)
        control = {
            "bos": self._tokenizer.bos_id,
            "start_of_turn": self._tokenizer.start_of_turn_id,
            "end_of_turn": self._tokenizer.end_of_turn_id,
        }
        ids: list[int] = []
        for number, part in enumerate(_CONTROL.split(text)):
            piece = control[part] if number % 2 else None
            ids += self._tokenizer.encode(part, bos=False) if piece is None else [piece]
        return ids

    def pair(self, context: str, continuation: str) -> tuple["array[int]", int]:
        """Token ids of both together, and where the continuation begins.

        They are encoded as one text, and divided where the context's own tokens end; blanks at its end belong to the
        continuation.
        """
        if not context:
            ids = self._tokenizer.encode(continuation)
            return array("i", ids), 1
        kept = context.rstrip()
        start = len(self._context(kept))
        return array("i", self.encode(context + continuation)), start
