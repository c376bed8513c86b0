"""Worker: transformers, in bf16 with its eager attention, the only one of its kinds that keeps the soft cap.

Tokens are chosen in a loop of our own over its cache, because `generate` does not say when the first one came.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peer_measure import Job, Peer, Span, work
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    """The model of a folder. Prompts that are answered together have one length, so none needs padding."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True
        ).eval()
        config = self._model.config
        self.facts = {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "attention": config._attn_implementation,
            "caps": f"{config.attn_logit_softcapping} {config.final_logit_softcapping}",
        }

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], new: int) -> list[Span]:
        started = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        ids = self._next(torch.tensor(prompts), cache)
        first = time.perf_counter() - started
        for _ in range(new - 1):
            ids = self._next(ids, cache)
        return [Span(first, time.perf_counter() - started, new)] * len(prompts)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Sequence[float]:
        values: list[float] = self._model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().tolist()
        return values

    def _next(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        best: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return best


def open_peer(job: Job) -> Peer:
    """Load the model."""
    return Transformers(job)


if __name__ == "__main__":
    work(open_peer)
