"""Evaluation beside the harness's own Hugging Face backend: the same requests of the mini suite, the same weights.

    cabochon init --preset 2b --out random-2b && cp src/cabochon/models/tiny/tokenizer* random-2b/
    python benchmarks/evaluation.py random-2b --tasks mini_facts,mini_arithmetic --limit 10 --dtype bfloat16

Run it with the environment of the tests, on a machine that does nothing else. Both backends answer the requests of each
task in turn, in one process; loading and the making of requests are not counted. A model with random weights writes to
the end of its room, so its answers take --answer tokens. Scores differ by rounding alone in float32; in bfloat16 each
backend has its own rounding.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import cabochon
from cabochon.evaluate.harness import Backend
from cabochon.evaluate.run import Options, Tasks
from cabochon.evaluate.suites import Entry


def requests(tasks: Tasks, name: str, limit: int, answer: int | None) -> list[Instance]:
    """What the harness asks for a task, 5 examples before each item where the task has examples."""
    (task,) = tasks.load(Entry(name, name, ""))["tasks"].values()
    if answer and task.OUTPUT_TYPE == "generate_until":
        task.config.generation_kwargs["max_gen_toks"] = answer
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(task.instances)


def timed(backend: Any, asked: Sequence[Instance]) -> tuple[float, list[Any]]:
    """Seconds and answers."""
    started = time.perf_counter()
    answers = getattr(backend, asked[0].request_type)(list(asked))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, answers


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """The largest one of log-probabilities, or the share of answers that are the same."""
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} answers the same"
    pairs = zip(ours, theirs, strict=True)
    values = [abs(a[0] - b[0]) if isinstance(a, tuple) else abs(a - b) for a, b in pairs]
    return f"largest difference {max(values):.2g}"


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", default="mini_facts,mini_completion,mini_pronouns,mini_arithmetic,mini_prose")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=int, default=None, help="tokens of an answer, in place of what tasks say")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=8, help="of the Hugging Face backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args()
    names = options.tasks.split(",")
    tasks = Tasks(names, Options(), options.cache)
    lm = cabochon.load(options.model, dtype=options.dtype, device=options.device)
    # Rolling texts begin with one BOS only so; the other requests of this suite are not changed by it.
    theirs = {
        bos: HFLM(
            pretrained=str(options.model),
            dtype=options.dtype,
            device=options.device,
            batch_size=options.batch_size,
            add_bos_token=bos,
        )
        for bos in sorted({name not in ("mini_code", "mini_prose") for name in names})
    }
    for name in names:
        asked = requests(tasks, name, options.limit, options.answer)
        peer = theirs[name not in ("mini_code", "mini_prose")]
        rounds = []
        for _ in range(options.rounds):
            mine, answers = timed(Backend(lm), asked)  # without a store: nothing is known from the round before
            lm.engine.prefixes.clear()
            other, expected = timed(peer, asked)
            rounds.append((mine, other))
        ours, hugging_face = (statistics.median(one[i] for one in rounds) for i in (0, 1))
        row = {"task": name, "requests": len(asked), "seconds": ours, "hugging_face_seconds": hugging_face}
        print(json.dumps({**row, "ratio": hugging_face / ours, "scores": difference(answers, expected)}), flush=True)


if __name__ == "__main__":
    main()
