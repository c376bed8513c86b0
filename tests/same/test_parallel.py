"""Several processes compute what one does: losses, weights, averages; and go on from each other's checkpoints."""

import dataclasses
from typing import Any

import pytest
import torch

from cabochon.data.pack import IGNORED, Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.objectives import next_tokens
from cabochon.train.optim import make_optimizers
from cabochon.train.parallel import setup, shard
from cabochon.train.ranks import Ranks
from cabochon.train.step import Trainer
from several import together
from support import SMALL, random_ids, small_model

STEPS, ROWS, LENGTH = 6, 8, 24


def config(**changes: Any) -> TrainConfig:
    """Large rates, so that a wrong gradient shows in the next loss; a clip that bites."""
    settings = {"steps": STEPS, "rows": ROWS, "length": LENGTH, "warmup_steps": 0, "learning_rate": 3e-2,
                "matrix_learning_rate": 2e-2, "precision": "float32", "ema": 0.7, "max_grad_norm": 0.5,
                "schedule": "constant"}  # fmt: skip
    return TrainConfig(**(settings | changes))


def batches(ranks: Ranks, count: int = STEPS) -> list[Batch]:
    """This rank's rows of each batch; rows have few or many targets, and several documents."""
    found = []
    for step in range(count):
        ids = random_ids(SMALL, ROWS, LENGTH + 1, seed=step)
        targets = ids[:, 1:].clone()
        for row in range(ROWS):
            targets[row, : 3 * row] = IGNORED
        documents = (torch.arange(LENGTH) > 10 + step).long().expand(ROWS, LENGTH)
        mine = slice(ranks.part, None, ranks.parts)
        found.append(Batch(ids[mine, :-1], targets[mine], documents[mine]))
    return found


def trainer(settings: TrainConfig, ranks: Ranks) -> Trainer:
    model: Gemma2 = small_model()
    shard(model, ranks, settings.precision)
    return Trainer(model, settings, next_tokens(settings), ranks)


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """A few numbers of each tensor, whole."""
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    return {
        name: [*t.detach().flatten()[:: max(1, t.numel() // 5)].tolist(), float(t.detach().norm())]
        for name, t in whole.items()
    }


def learn(settings: dict[str, Any], tensor_parallel: int = 1) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and what the weights and their averages have become."""
    ranks = setup("cpu", tensor_parallel)
    run = trainer(config(**settings), ranks)
    reports = [dataclasses.asdict(run.step(batch)) for batch in batches(ranks)]
    assert run.average
    return {
        "reports": reports,
        "weights": checksums(dict(run.model.named_parameters())),
        "averages": checksums(run.average.tensors),
    }


def far(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The largest relative distance between losses and gradient norms, and between weights or averages."""
    losses = weights = 0.0
    for a, b in zip(one["reports"], other["reports"], strict=True):
        assert {k: a[k] for k in ("step", "tokens", "positions")} == {k: b[k] for k in ("step", "tokens", "positions")}
        losses = max(losses, *(abs(a[k] - b[k]) / abs(a[k]) for k in ("loss", "grad_norm")))
    for kind in ("weights", "averages"):
        assert one[kind].keys() == other[kind].keys()
        for name, numbers in one[kind].items():
            pairs = list(zip(numbers, other[kind][name], strict=True))
            weights = max(weights, max(abs(a - b) for a, b in pairs) / max(abs(a) for a, _ in pairs))
    return losses, weights


ADAMW, MUON = {"optimizer": "adamw"}, {"optimizer": "muon"}


@pytest.mark.parametrize(
    ("world", "tensor_parallel", "settings"),
    [
        (2, 1, ADAMW | {"recompute": True}),
        pytest.param(4, 1, ADAMW | {"micro_rows": 1}, marks=pytest.mark.slow),
        (4, 2, ADAMW | {"micro_rows": 2}),
        (2, 1, MUON),
        pytest.param(4, 2, MUON, marks=pytest.mark.slow),
    ],
)
def test_many_are_as_one(world: int, tensor_parallel: int, settings: dict[str, Any]) -> None:
    # Muon rounds to bfloat16 on its way, so the last bit of a gradient can decide about more than that: one process
    # with micro-batches differs from itself by as much.
    most = 1e-5 if settings["optimizer"] == "adamw" else 2e-3
    alone = learn(settings)
    for one in together(world, learn, settings, tensor_parallel):
        assert max(far(alone, one)) < most


def muon_steps(tensor_parallel: int) -> list[str]:
    """Of which matrices torch's Muon makes something else, be it the last bit, from the same gradients."""
    ranks = setup("cpu", tensor_parallel)
    run, other = trainer(config(**MUON), ranks), small_model()
    plain = make_optimizers(other, config(**MUON))
    for batch in batches(ranks, 3):
        run.gradients(batch)
        for p, q in zip(other.parameters(), run.model.parameters(), strict=True):
            p.grad = q.grad.full_tensor()
        for optimizer in (*plain, *run.optimizers):
            optimizer.step()
        run.model.zero_grad()
    matrices = {name: p for name, p in other.layers.named_parameters() if p.ndim == 2}
    ours = dict(run.model.layers.named_parameters())
    return [name for name, p in matrices.items() if not torch.equal(p, ours[name].full_tensor())]


@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_muon_takes_the_steps_of_torch(world: int, tensor_parallel: int) -> None:
    assert together(world, muon_steps, tensor_parallel) == [[]] * world


def test_bfloat16_differs_by_its_rounding() -> None:
    settings = ADAMW | {"precision": "bf16"}
    exact, alone = (learn(ADAMW | {"precision": precision})["reports"] for precision in ("float32", "bf16"))
    many = together(2, learn, settings)[0]["reports"]
    for key, most in (("loss", 3e-4), ("grad_norm", 1e-2)):
        # The first step: later ones go on from weights that differ.
        assert abs(many[0][key] - alone[0][key]) / alone[0][key] < most
        assert abs(many[0][key] - exact[0][key]) / exact[0][key] < most
    assert [step["loss"] for step in many] == pytest.approx([step["loss"] for step in alone], rel=0.02)
