"""Worker: OpenVINO GenAI on a model whose attention soft cap was kept (`peer_openvino_files.py`).

Its default engine pages the cache and wants the fused attention operation, which has no soft cap, so this asks for
the other engine: a model with state. The rest is default: on processors with bf16 instructions it computes in bf16.
The option `precision` (f32) changes that.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from peer_measure import Job, Peer, Span, work


class OpenVINO:
    """A folder. Prompts that are answered together have one length and are computed as one batch."""

    def __init__(self, job: Job) -> None:
        self._folder = Path(job.model)
        self._properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads}
        if "precision" in job.options:
            self._properties["INFERENCE_PRECISION_HINT"] = job.options["precision"]
        self._pipeline = genai.LLMPipeline(job.model, "CPU", ATTENTION_BACKEND="SDPA", **self._properties)

    @property
    def facts(self) -> dict[str, str]:
        """What was measured. Soft caps are hyperbolic tangents: the activation is one operation of its own."""
        core, key = ov.Core(), "INFERENCE_PRECISION_HINT"
        graph = core.read_model(self._folder / "openvino_model.xml").get_ops()
        caps = sum(node.get_type_name() == "Tanh" for node in graph)
        precision = self._properties.get(key) or core.get_property("CPU", key).get_type_name()
        return {"version": genai.__version__, "soft caps in the graph": str(caps), "precision": precision}

    def answer(self, prompts: list[list[int]], new: int) -> list[Span]:
        ids = ov.Tensor(np.array(prompts, dtype=np.int64))
        mask = ov.Tensor(np.ones_like(ids.data))
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        started = time.perf_counter()
        answer = self._pipeline.generate(genai.TokenizedInputs(ids, mask), config)
        last = time.perf_counter() - started
        if any(len(tokens) != new for tokens in answer.tokens):
            raise SystemExit("OpenVINO ended an answer early")
        return [Span(answer.perf_metrics.get_ttft().mean / 1000, last, new)] * len(prompts)

    def logits(self, ids: list[int]) -> Sequence[float]:
        """From the model without the pipeline, which gives tokens only."""
        model = ov.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._properties)
        size = len(ids)
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, size), dtype=np.int64),
            "position_ids": np.arange(size)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        values: list[float] = model(inputs)["logits"][0, -1].astype(np.float32).tolist()
        return values


def open_peer(job: Job) -> Peer:
    """Load the model."""
    return OpenVINO(job)


if __name__ == "__main__":
    work(open_peer)
