"""Worker: llama.cpp through llama-cpp-python's low-level interface, the one that can decode several streams at once.

Everything that is not set here is llama.cpp's default: memory-mapped weights that are repacked where it has a faster
layout, flash attention where it finds it supported, a cache of 16-bit floats.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np
from peer_measure import Job, Peer, Span, work

Row = tuple[int, int, int, bool]  # token, position, stream, whether its logits are wanted


class Llama:
    """A GGUF file. Prompts that are answered together are read one after the other and decoded together."""

    def __init__(self, job: Job) -> None:
        self._job, self._context, self._streams = job, None, 0
        ll.llama_backend_init()
        self._model: Any = ll.llama_model_load_from_file(job.model.encode(), ll.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {job.model}")
        self._vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._batch = ll.llama_batch_init(max(job.prompt, job.stream_prompt, job.streams), 0, 1)

    @property
    def facts(self) -> dict[str, str]:
        """What was measured, as the file and the library tell it."""
        fields = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
        told = {name: self._metadata(f"gemma2.{name}") for name in fields}
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(Path(self._job.model)).tensors}
        told |= {"embedding and head": types["token_embd.weight"], "matrices": types["blk.0.ffn_up.weight"]}
        built = " ".join(re.findall(r"(\w+) = 1", ll.llama_print_system_info().decode()))
        return {"version": ll.__version__, **told, "built with": built}

    def answer(self, prompts: list[list[int]], new: int) -> list[Span]:
        self._open(len(prompts))
        started = time.perf_counter()
        tokens = [self._read(ids, stream) for stream, ids in enumerate(prompts)]
        first = time.perf_counter() - started
        for step in range(new - 1):
            self._decode([(t, len(prompts[i]) + step, i, True) for i, t in enumerate(tokens)])
            tokens = [int(self._logits(i).argmax()) for i in range(len(tokens))]
        return [Span(first, time.perf_counter() - started, new)] * len(prompts)

    def logits(self, ids: list[int]) -> Sequence[float]:
        self._open(1)
        self._read(ids, 0)
        values: list[float] = self._logits(len(ids) - 1).tolist()
        return values

    def _open(self, streams: int) -> None:
        """A context with an empty cache; a new one when the number of streams changes."""
        if self._context is not None and self._streams == streams:
            ll.llama_memory_clear(ll.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            ll.llama_free(self._context)
        params = ll.llama_context_default_params()
        length = self._job.prompt if streams == 1 else self._job.stream_prompt
        params.n_ctx = streams * -(-(length + self._job.new) // 256) * 256  # it rounds each stream's share up to 256
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = self._job.threads
        self._context, self._streams = ll.llama_init_from_model(self._model, params), streams
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make room for {streams} streams")

    def _read(self, ids: list[int], stream: int) -> int:
        """Prefill one stream; its first token."""
        self._decode([(token, i, stream, i == len(ids) - 1) for i, token in enumerate(ids)])
        return int(self._logits(len(ids) - 1).argmax())

    def _decode(self, rows: list[Row]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if code := ll.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode answered {code}")

    def _logits(self, row: int) -> "np.ndarray[Any, Any]":
        """A view of the logits of one row of the last batch; the next batch overwrites it."""
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self._context, row), shape=(self._vocabulary,))

    def _metadata(self, key: str) -> str:
        text = ll.ctypes.create_string_buffer(64)
        ll.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return text.value.decode()


def open_peer(job: Job) -> Peer:
    """Load the model."""
    return Llama(job)


if __name__ == "__main__":
    work(open_peer)
