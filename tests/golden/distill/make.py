"""Makes trl.safetensors: what TRL's GKDTrainer computes for logits of a student and a teacher, with gradients.

Run with an environment that has trl 1.16.0 and torch 2.13.0 (`python benchmarks/training.py setup` makes one):

    OMP_NUM_THREADS=1 runs/peers/trl/bin/python tests/golden/distill/make.py

The file holds hidden states and heads, the targets, of which -100 is not counted, and for every setting the gradients
of both of the student's tensors; the losses are in its metadata.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.experimental.gkd import GKDTrainer

TOKENS, VOCAB, STUDENT, TEACHER, SOFT_CAP = 9, 48, 6, 10, 5.0
SETTINGS = [(beta, temperature) for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for temperature in (1.0, 0.9, 2.5)]


def main() -> None:
    """Write the file beside this one."""
    assert (version("trl"), version("torch").partition("+")[0]) == ("1.16.0", "2.13.0")
    torch.manual_seed(2306)
    shapes = {"hidden": (TOKENS, STUDENT), "head": (VOCAB, STUDENT), "teacher_hidden": (TOKENS, TEACHER),
              "teacher_head": (VOCAB, TEACHER)}  # fmt: skip
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["targets"] = torch.randint(VOCAB, (TOKENS,))
    given["targets"][::4] = -100
    tensors, losses = dict(given), {}
    for beta, temperature in SETTINGS:
        hidden, head = (given[name].clone().requires_grad_() for name in ("hidden", "head"))
        student, teacher = hidden @ head.T, given["teacher_hidden"] @ given["teacher_head"].T
        loss = GKDTrainer.generalized_jsd_loss(
            student_logits=(torch.tanh(student / SOFT_CAP) * SOFT_CAP)[None],
            teacher_logits=(torch.tanh(teacher / SOFT_CAP) * SOFT_CAP)[None],
            labels=given["targets"][None],
            beta=beta,
            temperature=temperature,
        )
        loss.backward()
        name = f"{beta} {temperature}"
        losses[name] = loss.item()
        tensors |= {f"{name} hidden": hidden.grad, f"{name} head": head.grad}
    save_file(tensors, Path(__file__).with_name("trl.safetensors"), {"losses": json.dumps(losses)})


if __name__ == "__main__":
    main()
