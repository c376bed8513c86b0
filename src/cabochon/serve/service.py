"""What every route needs: the settings, the model once it is there, and the checks that all requests share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cabochon.base.errors import CabochonError
from cabochon.base.version import package_version
from cabochon.generate.sampling import SamplingParams
from cabochon.serve.bridge import Bridge
from cabochon.serve.errors import ApiError, unavailable
from cabochon.serve.metrics import Metrics
from cabochon.serve.settings import ServeSettings

_QUICK = 2000  # characters that are split into tokens at once, in a millisecond
_LONGEST_PIECE = 128  # characters; a text with more of them for each token of the context is not even split


@dataclass
class Service:
    """A server's state. `bridge` is None until the model is loaded."""

    settings: ServeSettings
    metrics: Metrics = field(default_factory=Metrics)
    bridge: Bridge | None = None
    version: str = field(default_factory=package_version)
    started: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str | None = None) -> Bridge:
        """The model, under one of its names. Raises `ApiError`: 503 while it is loading, 404 for another name."""
        if self.bridge is None:
            raise unavailable("the model is being loaded", "loading")
        if name is not None and name not in self.settings.names:
            known = ", ".join(self.settings.names)
            raise ApiError(404, f"there is no such model; there is {known}", code="model_not_found", param="model")
        return self.bridge

    def free_model(self, name: str | None = None) -> Bridge:
        """The same for a request that wants an answer: 429 or 503 at once where there is no room for another."""
        bridge = self.model(name)
        bridge.check_room()
        return bridge

    async def encode(self, function: Callable[[], list[int]], characters: int, param: str) -> list[int]:
        """Token ids of a prompt. Raises `ApiError` for one that is empty or does not fit with one token of answer."""
        bridge = self.model()
        too_long = characters > bridge.longest * _LONGEST_PIECE
        ids = [] if too_long else function() if characters <= _QUICK else await bridge.text(function)
        if too_long or len(ids) >= bridge.longest:
            length = f"{len(ids)} tokens" if ids else f"{characters} characters"
            said = f"the prompt has {length}; with one token of answer the context holds {bridge.longest}"
            raise ApiError(400, said, code="context_length_exceeded", param=param)
        return ids

    async def encode_text(self, text: str | Sequence[int], param: str, *, room: int = 0) -> list[int]:
        """Token ids of a plain text, one BOS in front; ids are checked and used as they are."""
        bridge = self.model()
        if isinstance(text, str):
            return await self.encode(lambda: bridge.tokenizer.encode(text), len(text), param)
        vocabulary = bridge.lm.config.vocab_size
        if any(i >= vocabulary for i in text):
            raise ApiError(400, f"{param}: ids end at {vocabulary - 1}", code="invalid_value", param=param)
        if not text:
            raise ApiError(400, f"{param}: there are no tokens", code="invalid_value", param=param)
        ids = list(text)
        return await self.encode(lambda: ids, 0, param)

    def params(self, *, max_tokens: int | None, prompts: Sequence[Sequence[int]], **sampling: Any) -> SamplingParams:
        """Sampling parameters whose answers fit. Raises `ApiError` for more answers than the server takes on."""
        bridge, settings = self.model(), self.settings
        n = sampling.get("n", 1)
        if n > settings.max_n:
            raise ApiError(400, f"n: at most {settings.max_n}", code="invalid_value", param="n")
        if n * len(prompts) > bridge.capacity:
            raise ApiError(400, f"at most {bridge.capacity} answers at a time", code="invalid_value", param="n")
        limits = [limit for limit in (max_tokens, settings.max_new_tokens) if limit is not None]
        limits.append(bridge.longest - max(map(len, prompts)))
        biased = sampling.get("logit_bias") or {}
        if any(token >= bridge.lm.config.vocab_size for token in biased):
            raise ApiError(400, "logit_bias: no such token", code="invalid_value", param="logit_bias")
        try:
            return SamplingParams(max_new_tokens=min(limits), **sampling)
        except CabochonError as error:
            raise ApiError(400, f"{error.what}: {error.cause}", code="invalid_value") from None
