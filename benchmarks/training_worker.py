"""One training step, measured in a process of its own: `training_worker.py CANDIDATE STEPS THREADS`.

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

Step = Callable[[], torch.Tensor]  # forward and backward; the loss


def settings(size: int) -> dict[str, int]:
    """The shape of a model with this hidden size, by the names of our configuration."""
    return dict(
        vocab_size=VOCAB, hidden_size=size, num_layers=4, num_heads=size // 64, num_kv_heads=size // 128, head_dim=64,
        intermediate_size=4 * size, query_pre_attn_scalar=64,
    )  # fmt: skip


def tokens(rows: int, length: int) -> torch.Tensor:
    """Ids int64 [rows, length + 1]: inputs, and targets one further on."""
    return torch.randint(200, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))


def filled(model: Any) -> Any:
    """A model with small random weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


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


def cabochon() -> Step:
    """Weights in bfloat16, as transformers' are."""
    from cabochon.train.losses.fused import cross_entropy

    model, ids = ours(STUDENT, torch.bfloat16), tokens(ROWS, LENGTH)

    def step() -> torch.Tensor:
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return finished(cross_entropy(hidden, head_of(model), ids[:, 1:].flatten(), ROWS * LENGTH))

    return with_model(model, step)


def cabochon_mixed() -> Step:
    """What `train` does: weights in float32, products in bfloat16."""
    from cabochon.data.pack import Batch
    from cabochon.train.loop import batch_loss

    model, ids = ours(STUDENT, torch.float32), tokens(ROWS, LENGTH)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros(ROWS, LENGTH, dtype=torch.int64))
    return with_model(model, lambda: finished(batch_loss(model, batch)))


def cabochon_distill() -> Step:
    """Jensen-Shannon divergence from a live teacher."""
    from cabochon.train.losses.divergences import JensenShannon
    from cabochon.train.losses.fused import distill
    from cabochon.train.losses.teachers import LiveTeacher

    student, teacher = ours(STUDENT, torch.bfloat16), ours(TEACHER, torch.bfloat16)
    ids = tokens(DISTILL_ROWS, DISTILL_LENGTH)[:, :-1]

    def step() -> torch.Tensor:
        with torch.no_grad():
            live = LiveTeacher(teacher.hidden(ids).flatten(0, 1), head_of(teacher))
        hidden = student.hidden(ids).flatten(0, 1)
        return finished(distill(hidden, head_of(student), live, ids.numel(), JensenShannon(BETA)))

    return with_model(student, step)


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


def transformers() -> Step:
    """Weights in bfloat16."""
    model, ids = theirs(STUDENT, torch.bfloat16), tokens(ROWS, LENGTH)[:, :-1]
    return with_model(model, lambda: finished(model(input_ids=ids, labels=ids).loss))


def transformers_mixed() -> Step:
    """Weights in float32, products in bfloat16 under autocast."""
    model, ids = theirs(STUDENT, torch.float32), tokens(ROWS, LENGTH)[:, :-1]

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        return finished(loss)

    return with_model(model, step)


def trl_distill() -> Step:
    """What TRL's GKDTrainer computes for rows that are given: both models' logits, then its Jensen-Shannon loss."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = theirs(STUDENT, torch.bfloat16), theirs(TEACHER, torch.bfloat16)
    ids = tokens(DISTILL_ROWS, DISTILL_LENGTH)
    labels = ids[:, 1:]

    def step() -> torch.Tensor:
        logits = student(input_ids=ids).logits
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
        loss = GKDTrainer.generalized_jsd_loss(
            student_logits=logits[:, :-1], teacher_logits=wanted[:, :-1], labels=labels, beta=BETA
        )
        del logits, wanted
        return finished(loss)

    return with_model(student, step)


# Measuring


def finished(loss: torch.Tensor) -> torch.Tensor:
    """The loss, after its backward."""
    loss.backward()
    return loss.detach()


def with_model(model: Any, step: Step) -> Step:
    """The step, after gradients of the last one were let go."""
    model.train()

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return step()

    return run


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
    """Time the steps; the first one, in which libraries prepare themselves, is left out of the times if there are more.

    Memory is the peak above what lay there when the model was made, over all steps.
    """
    torch.set_num_threads(threads)
    step = CANDIDATES[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here: making the model does not count
    before, times, loss = status("VmRSS"), [], 0.0
    for _ in range(steps):
        started = time.perf_counter()
        loss = step().item()
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(times[1:] or times), "bytes": status("VmHWM") - before, "loss": loss}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
