"""The one kind of error that a user sees: what failed, the cause, and a hint that says what to type.

Everything that can go wrong because of an input (a file, a flag, a prompt, a network) raises a
`CabochonError`; a traceback means a bug of ours.
"""

import difflib
from collections.abc import Iterable


class CabochonError(Exception):
    """Base of all user-facing errors. `str(error)` is exactly three lines."""

    exit_code = 1

    def __init__(self, what: str, cause: str, hint: str) -> None:
        super().__init__(what, cause, hint)
        self.what, self.cause, self.hint = (" ".join(part.split()) for part in (what, cause, hint))

    def __str__(self) -> str:
        return f"error: {self.what}\n  cause: {self.cause}\n  hint: {self.hint}"


class UsageError(CabochonError):
    """The command line or the arguments of a call are wrong. Exit code 2."""

    exit_code = 2


class BadInput(CabochonError):
    """A file, prompt or conversation cannot be used as it is. Exit code 3."""

    exit_code = 3


class MissingResource(CabochonError):
    """Something needed is not there: a file, a network, a permission, memory. Exit code 4."""

    exit_code = 4


class Elsewhere(CabochonError):
    """Another process of the same run has failed and says why; this one only ends, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the run has failed", "another of its processes says why", "look at what that one printed")
        self.exit_code = exit_code


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was most likely meant to be, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)), None)
