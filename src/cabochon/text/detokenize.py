"""Text out of a stream of token ids: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from cabochon.base.errors import UsageError
from cabochon.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns the ids of one answer into text as they come.

    What `push` and `finish` return, put together, is `tokenizer.decode(ids)` cut before the stop string that is
    complete first (of two that end at the same character, before the one that begins first). How the text is
    spread over tokens makes no difference. Text is held back only while it may still be the beginning of a stop
    string, and bytes only while they may still be the beginning of a character.

    Attributes:
        stopped: whether a stop string has come; from then on ids are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        if not all(stop):
            raise UsageError("a stop string is empty", "every text contains it", "leave it out")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._emitted: list[str] = []

    def push(self, token_id: int) -> str:
        """Take the next id; the text that is now certain, possibly none."""
        return self._take(self._tokenizer.token_bytes(token_id), final=False)

    def finish(self) -> str:
        """The text that was held back, after the last id."""
        return self._take(b"", final=True)

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._emitted)

    def _take(self, new: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        before = len(self._held)
        self._held += self._characters.decode(new, final)
        cut = first_stop(self._held, self._stop, before)
        if cut is not None:
            self.stopped = True
            safe, self._held = cut, ""
            return self._emit(safe)
        keep = 0 if final else may_begin(self._held, self._stop)
        split = len(self._held) - keep
        safe, self._held = self._held[:split], self._held[split:]
        return self._emit(safe)

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text


def first_stop(text: str, stops: Sequence[str], searched: int = 0) -> str | None:
    """The text before the stop string that is complete first, or None when there is none.

    No stop string ends within the first `searched` characters.
    """
    found = []
    for stop in stops:
        start = text.find(stop, max(0, searched - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), start))
    return text[: min(found)[1]] if found else None


def may_begin(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins without being complete."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
