"""Worker: this package, through its public surface."""

import importlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from peer_measure import Job, Peer, Span, work

import cabochon


class Cabochon:
    """`cabochon.load` and `LM.generate`. The option `weights` rounds a bf16 folder while it loads."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._lm: Any = cabochon.load(job.model, device="cpu", **job.options)
        self.facts = {"version": cabochon.__version__, "torch": torch.__version__, **job.options}

    def answer(self, prompts: list[list[int]], new: int) -> list[Span]:
        """Several prompts are read first, then all timed at once: the engine would answer some meanwhile."""
        started = time.perf_counter()
        if len(prompts) > 1:
            self._lm.generate(prompts, max_new_tokens=1, temperature=0.0)
        read = time.perf_counter() - started
        use = [a.usage for a in self._lm.generate(prompts, max_new_tokens=new, temperature=0.0)]
        spans = [Span(read + u.first_token_seconds, read + u.seconds, u.completion_tokens) for u in use]
        if any(span.tokens != new for span in spans):
            raise SystemExit("an answer ended early: choose another seed")
        return spans

    def logits(self, ids: list[int]) -> Sequence[float]:
        values: list[float] = self._lm.logits([ids])[0, -1].tolist()
        return values


def open_peer(job: Job) -> Peer:
    """Load the model."""
    return Cabochon(job)


if __name__ == "__main__":
    importlib.import_module("cabochon.lm")  # loads on first use otherwise, within the time of loading the model
    work(open_peer)
