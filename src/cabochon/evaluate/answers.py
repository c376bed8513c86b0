"""Answers to many prompts, each handed over as it ends; the engine reads what they have in common once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.lm import LM
from cabochon.text.detokenize import StreamDecoder


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids, and how its answer is drawn."""

    ids: Sequence[int]
    params: SamplingParams


def answer(lm: LM, asked: Sequence[Asked]) -> Iterator[tuple[int, str]]:
    """Number and text of each answer, in the order in which they end. Raises what the engine does."""
    # Prompts with the same beginning one after the other, so that it is still there when the next one comes.
    waiting = sorted(range(len(asked)), key=lambda n: list(asked[n].ids))[::-1]
    live: dict[int, tuple[int, Request, StreamDecoder]] = {}  # by id of the request
    engine, most = lm.engine, 2 * lm.engine_config.max_requests
    try:
        while waiting or live:
            while waiting and len(live) < most:
                number = waiting.pop()
                request = engine.submit(asked[number].ids, asked[number].params)
                live[id(request)] = number, request, StreamDecoder(lm.text_tokenizer, asked[number].params.stop)
            for sampled in engine.step():
                if id(sampled.request) not in live:  # guessed behind a stop text
                    continue
                number, request, decoder = live[id(sampled.request)]
                request.events.clear()
                if sampled.last != "stop":
                    decoder.push(sampled.token)
                if sampled.last or decoder.stopped:
                    decoder.finish()
                    engine.cancel(request)
                    del live[id(request)]
                    yield number, decoder.text
    finally:
        for _, request, _ in live.values():
            engine.cancel(request)
