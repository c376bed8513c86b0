"""One training step, measured in a process of its own: `training_worker.py CANDIDATE STEPS THREADS [cuda]`.

Only the candidate's library is imported. Every candidate gets weights of the same distribution and the same tokens;
a step is forward and backward, without the optimizer. The answer is one line of JSON, the last that is printed.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 256_000
ROWS, LENGTH = 2, 1024  # of a training step
DISTILL_ROWS, DISTILL_LENGTH = 8, 209
STUDENT, TEACHER = 256, 512  # hidden sizes
BETA = 0.5
DEVICE = "cuda" if sys.argv[4:5] == ["cuda"] else "cpu"
if DEVICE == "cuda":  # the 2b's width, four layers deep
    ROWS, LENGTH, DISTILL_ROWS, DISTILL_LENGTH, STUDENT, TEACHER = 4, 2048, 4, 1024, 2304, 3584

# A model, and a function from ids [rows, length + 1] to the loss of predicting each from those before it.
Candidate = tuple[Any, Callable[[torch.Tensor], torch.Tensor]]


def settings(size: int) -> dict[str, int]:
    """The shape of a model with this hidden size, by the names of our configuration."""
    return dict(
        vocab_size=VOCAB, hidden_size=size, num_layers=4, num_heads=size // 64, num_kv_heads=size // 128, head_dim=64,
        intermediate_size=4 * size, query_pre_attn_scalar=64,
    )  # fmt: skip


def filled(model: Any) -> Any:
    """A model with small random weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.train().to(DEVICE)


# Ours


def ours(size: int, dtype: torch.dtype) -> Any:
    """Our model."""
    from cabochon.model.config import Gemma2Config
    from cabochon.model.gemma2 import Gemma2

    return filled(Gemma2(Gemma2Config(**settings(size))).to(dtype))


def head_of(model: Any) -> Any:
    """The head of our model, as losses take it."""
    from cabochon.train.losses.teachers import Head

    return Head(model.embedding.weight, model.config.final_softcap)


def cabochon() -> Candidate:
    """Weights in bfloat16, as transformers' are."""
    from cabochon.train.losses.fused import cross_entropy

    model = ours(STUDENT, torch.bfloat16)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden, targets = model.hidden(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        return cross_entropy(hidden, head_of(model), targets, len(targets))

    return model, loss


def cabochon_mixed() -> Candidate:
    """What `train` does: weights in float32, products in bfloat16."""
    from cabochon.data.pack import Batch
    from cabochon.train.config import TrainConfig
    from cabochon.train.objectives import next_tokens
    from cabochon.train.step import precision

    model, config = ours(STUDENT, torch.float32), TrainConfig(steps=1)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]))
        with precision(model, config):
            return next_tokens(config)(model, batch, batch.num_targets)

    return model, loss


def cabochon_distill() -> Candidate:
    """Jensen-Shannon divergence from a live teacher."""
    from cabochon.train.losses.divergences import JensenShannon
    from cabochon.train.losses.fused import distill
    from cabochon.train.losses.teachers import LiveTeacher

    student, teacher = ours(STUDENT, torch.bfloat16), ours(TEACHER, torch.bfloat16)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            live = LiveTeacher(teacher.hidden(ids[:, :-1]).flatten(0, 1), head_of(teacher))
        hidden = student.hidden(ids[:, :-1]).flatten(0, 1)
        return distill(hidden, head_of(student), live, len(hidden), JensenShannon(BETA))

    return student, loss


# Theirs


def theirs(size: int, dtype: torch.dtype) -> Any:
    """transformers' model of the same shape, with the attention that has the soft cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = settings(size)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=size, num_hidden_layers=4, num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"], head_dim=64, intermediate_size=4 * size, query_pre_attn_scalar=64,
        attn_implementation="eager", use_cache=False, attention_dropout=0.0,
    )  # fmt: skip
    return filled(Gemma2ForCausalLM(config).to(dtype))


def transformers() -> Candidate:
    """Weights in bfloat16."""
    model = theirs(STUDENT, torch.bfloat16)
    return model, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss


def transformers_mixed() -> Candidate:
    """Weights in float32, products in bfloat16 under autocast."""
    model = theirs(STUDENT, torch.float32)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            value: torch.Tensor = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        return value

    return model, loss


def trl_distill() -> Candidate:
    """What TRL's GKDTrainer computes for rows that are given: both models' logits, then its Jensen-Shannon loss."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = theirs(STUDENT, torch.bfloat16), theirs(TEACHER, torch.bfloat16)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = student(input_ids=ids).logits
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
        value: torch.Tensor = GKDTrainer.generalized_jsd_loss(
            student_logits=logits[:, :-1], teacher_logits=wanted[:, :-1], labels=ids[:, 1:], beta=BETA
        )
        return value

    return student, loss


# Measuring


def step(candidate: Candidate, ids: torch.Tensor) -> float:
    """Forward and backward, after gradients of the last step were let go; the loss."""
    model, loss = candidate
    model.zero_grad(set_to_none=True)
    value = loss(ids)
    value.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return value.item()


def tokens(rows: int, length: int) -> torch.Tensor:
    """Random ids int64 [rows, length + 1]."""
    return torch.randint(200, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def status(key: str) -> int:
    """A size of this process in bytes, from the system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


CANDIDATES = {
    "cabochon": cabochon,
    "transformers": transformers,
    "cabochon-mixed": cabochon_mixed,
    "transformers-mixed": transformers_mixed,
    "cabochon-distill": cabochon_distill,
    "trl-distill": trl_distill,
}


def main(name: str, steps: int, threads: int) -> None:
    """Print the fastest of some steps, and the most memory that they took above models and code.

    A step of a few tokens comes first: it brings the code of the libraries into memory.
    """
    torch.set_num_threads(threads)
    candidate = CANDIDATES[name]()
    step(candidate, tokens(1, 8))
    candidate[0].zero_grad(set_to_none=True)
    ids = tokens(DISTILL_ROWS, DISTILL_LENGTH) if "distill" in name else tokens(ROWS, LENGTH)
    if DEVICE == "cuda":
        step(candidate, ids)  # compiles for this shape
        candidate[0].zero_grad(set_to_none=True)
    peak, times, loss = peak_memory(), [], 0.0
    for _ in range(steps):
        started = time.perf_counter()
        loss = step(candidate, ids)
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(times), "bytes": peak(), "loss": loss}))


def peak_memory() -> Callable[[], int]:
    """A function that says how much memory was taken at most since this call, above what was taken then."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    return lambda: status("VmHWM") - before


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
