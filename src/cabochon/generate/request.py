"""What the engine knows of one request, and what it reports: token ids only."""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cabochon.generate.sampling import SamplingParams, TokenLogprob
from cabochon.model.paged import PagedSequence


class Matcher(Protocol):
    """What an answer has to look like; see `constrain.py`."""

    def mask(self) -> Tensor:
        """bool [V]: the tokens that may come next."""

    def accept(self, token: int) -> None:
        """Go on behind a token."""


@dataclass(frozen=True)
class Sampled:
    """One new token of a request; `last` says why the answer ended with it, if it did: "stop" or "length"."""

    request: "Request"
    token: int
    logprob: TokenLogprob | None
    last: str | None


@dataclass(eq=False)
class Request:
    """One answer on its way: from `Engine.submit` until `done`."""

    prompt: list[int]
    params: SamplingParams
    limit: int  # tokens that the answer may have
    draw: torch.Generator
    matcher: Matcher | None = None
    generated: list[int] = field(default_factory=list)
    events: deque[Sampled] = field(default_factory=deque)  # not yet taken by whoever asked
    sequence: PagedSequence | None = None  # None while it waits
    reused: int = 0  # tokens of the prompt that were known already
    remembered: int = 0  # full pages that later prompts can find
    done: bool = False
    failure: Exception | None = None  # why it ended without an answer, where it did

    @property
    def tokens(self) -> list[int]:
        """The prompt and the answer so far."""
        return self.prompt + self.generated

    @property
    def length(self) -> int:
        """Their number."""
        return len(self.prompt) + len(self.generated)

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not there yet; the newest of them gives the next logits."""
        return self.length - (self.sequence.length if self.sequence else 0)
