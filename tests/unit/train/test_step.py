"""One step: parts that weigh by token, precision, spikes, the average of weights, what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig, TuneConfig
from cabochon.train.objectives import next_tokens
from cabochon.train.schedule import schedule
from cabochon.train.spikes import LEAST, SpikeWatch
from cabochon.train.step import Measured, Stopped, Trainer
from support import SMALL, random_ids, small_model


def uneven(rows: int = 4, length: int = 24, seed: int = 0) -> Batch:
    """Rows with more and fewer targets."""
    ids = random_ids(SMALL, rows, length, seed)
    targets = ids.roll(-1, 1)
    for row in range(rows):
        targets[row, row * length // rows :] = IGNORED
    targets[0, 0] = ids[0, 1]
    return Batch(ids, targets, (torch.arange(length) // 9).expand(rows, length))


def trainer(model: Gemma2 | None = None, **changed) -> Trainer:
    config = TrainConfig(**dict(steps=10, warmup_steps=2, precision="float32") | changed)
    return Trainer(model or small_model(size=0.1), config, next_tokens(config))


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(micro_rows: int, recompute: bool) -> None:
    batch, found = uneven(), []
    for changed in (dict(), dict(micro_rows=micro_rows, recompute=recompute)):
        one = trainer(small_model().double(), **changed)
        loss, count, _ = one.gradients(batch)
        found.append((loss, count, [p.grad for p in one.model.parameters()]))
    (loss, count, whole), (again, same, parts) = found
    assert loss == pytest.approx(again, rel=1e-6) and count == same == batch.num_targets
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_rows", [0, 1, 2])
def test_what_an_objective_measures_is_a_mean_over_what_is_counted(micro_rows: int) -> None:
    counts: list[float] = []

    def objective(model: Gemma2, part: Batch, count: float) -> Measured:
        counts.append(count)
        loss = (model.embedding.weight.sum() * 0 + len(part.ids)) / count
        return Measured(loss, {"positions": part.ids.numel() / count})

    batch = uneven()
    config = TrainConfig(steps=1, precision="float32", micro_rows=micro_rows)
    report = Trainer(small_model(), config, objective, counted=lambda one: 2 * len(one.ids)).step(batch)
    rows, length = batch.ids.shape
    assert set(counts) == {2 * rows} and report.tokens == 2 * rows
    assert report.loss == 0.5 and report.measures == {"positions": length / 2}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_is_that_of_torch(optimizer: str) -> None:
    plain = small_model(size=0.1).double()
    one = trainer(small_model(size=0.1).double(), optimizer=optimizer)
    batch = uneven()
    for _ in range(3):
        one.step(batch)
    matrices = [p for n, p in plain.named_parameters() if p.ndim == 2 and n != "embedding.weight"]
    vectors = [p for n, p in plain.named_parameters() if p.ndim == 1]
    adam = dict(lr=3e-3, betas=(0.9, 0.98))
    if optimizer == "muon":
        others = [{"params": [plain.embedding.weight, *vectors], "weight_decay": 0.0}]
        optimizers = [torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01), torch.optim.AdamW(others, **adam)]
    else:
        groups = [
            {"params": [plain.embedding.weight, *matrices], "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizers = [torch.optim.AdamW(groups, **adam)]
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    for step in range(3):
        logits = plain(batch.ids, documents=batch.documents).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for o, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(o.param_groups, lrs, strict=True):
                group["lr"] = lr * schedule(step, one.config)
            o.step()
            o.zero_grad()
    # Muon's orthogonal matrices are made in bfloat16: a last bit of a gradient can move them.
    tolerance = 0.1 if optimizer == "muon" else 1e-4
    start = small_model(size=0.1).double()
    for (name, p), q, before in zip(one.model.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < tolerance * (q - before).norm(), name


def test_a_stop_between_parts_changes_nothing() -> None:
    one = trainer(micro_rows=1)
    before = [p.detach().clone() for p in one.model.parameters()]
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(Stopped):
        one.step(uneven(), stop)
    assert one.step_number == 0 and all(p.grad is None for p in one.model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), before, strict=True))


def test_the_average_is_the_recurrence() -> None:
    one = trainer(ema=0.75)
    expected = [p.detach().clone() for p in one.model.parameters()]
    for seed in range(4):
        one.step(uneven(seed=seed))
        for e, p in zip(expected, one.model.parameters(), strict=True):
            e.mul_(0.75).add_(p.detach(), alpha=0.25)
    assert one.average is not None
    weights = [p.detach().clone() for p in one.model.parameters()]
    one.average.swap(one.model)
    for e, p in zip(expected, one.model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-5, atol=1e-6)
    one.average.swap(one.model)
    assert all(torch.equal(p, w) for p, w in zip(one.model.parameters(), weights, strict=True))


def test_a_spike_is_left_out_and_the_next_step_is_not() -> None:
    one, batch = trainer(ema=0.5, learning_rate=1e-5, matrix_learning_rate=1e-5), uneven()
    for _ in range(LEAST):
        assert not one.step(batch).skipped
    before = [p.detach().clone() for p in one.model.parameters()]
    objective = one.objective
    one.objective = lambda *args: 30 * objective(*args)
    report = one.step(batch)
    assert report.skipped and report.loss > 50 and one.step_number == LEAST + 1
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), before, strict=True))
    one.objective = objective
    assert not one.step(batch).skipped


def test_a_loss_that_is_no_number_ends_the_run_after_a_while() -> None:
    one = trainer(max_skipped=2)
    one.objective = lambda model, batch, count: model.embedding.weight.sum() * math.nan
    before = one.model.embedding.weight.detach().clone()
    assert one.step(uneven()).skipped and one.step(uneven()).skipped
    with pytest.raises(BadInput, match="not a number"):
        one.step(uneven())
    assert torch.equal(one.model.embedding.weight, before)


@given(st.lists(st.floats(0.5, 3), min_size=LEAST, max_size=80), st.floats(0, 100))
@settings(deadline=None)
def test_a_spike_is_far_above_the_last_losses(losses: list[float], jump: float) -> None:
    watch = SpikeWatch(TrainConfig(steps=1, max_skipped=10**6))
    for loss in losses:
        watch.leave_out(loss, 1.0)
    kept = sorted(watch.losses)
    assert not watch.leave_out(kept[len(kept) // 2], 1.0)  # what is usual is never one
    high = max(losses) + jump
    if high > 2 * max(losses) + 6 * 1.4826 * 3:
        assert watch.leave_out(high, 1.0)


def test_a_higher_level_is_believed_after_a_while() -> None:
    watch = SpikeWatch(TrainConfig(steps=1, max_skipped=3, spike_window=20))
    for step in range(20):
        watch.leave_out(1 + 0.01 * (step % 3), 1.0)
    assert [watch.leave_out(9.0, 1.0) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@given(steps=st.integers(1, 300), warmup=st.integers(0, 40), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_schedules_stay_between_their_ends(kind: str, steps: int, warmup: int, share: float) -> None:
    config = TrainConfig(steps=steps, warmup_steps=warmup, final_share=share, schedule=kind)
    shares = [schedule(step, config) for step in range(steps)]
    assert all(0 <= one <= 1 for one in shares)
    if steps > warmup + 1 and kind != "constant":
        assert shares[-1] == pytest.approx(share)
        assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    if kind == "constant" and steps > warmup:
        assert shares[-1] == 1


@pytest.mark.parametrize("name", ["steps", "rows", "ema", "beta1", "decay_share", "max_grad_norm", "learning_rate"])
def test_values_without_sense_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        TrainConfig(**dict(steps=1) | {name: -1})
    with pytest.raises(UsageError, match=name):
        TuneConfig(**{name: math.nan})
    if name != "max_grad_norm":  # inf: gradients are left as they are
        with pytest.raises(UsageError, match=name):
            TuneConfig(**{name: math.inf})


def test_half_precision_weights_are_not_trained() -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        trainer(small_model().bfloat16())
    with pytest.raises(UsageError, match="none of its weights"):
        trainer(small_model().requires_grad_(False))
