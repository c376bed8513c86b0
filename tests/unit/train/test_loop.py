"""The plain loop: its loss against plain autograd, its schedule, its refusals, and that it learns."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.model import head as head_module
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import token_losses
from cabochon.train.config import TrainConfig
from cabochon.train.loop import Hooks, Progress, evaluate, train, train_steps
from cabochon.train.objectives import next_tokens
from cabochon.train.schedule import schedule
from cabochon.train.step import Trainer
from support import SMALL, random_ids, small_model


def batch(seed: int = 0) -> Batch:
    ids = random_ids(SMALL, 2, 30, seed)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = IGNORED
    return Batch(ids, targets, (torch.arange(30) // 12).expand(2, 30))


def test_loss_and_gradients_equal_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * SMALL.vocab_size * 7)  # chunks of seven tokens
    model = small_model().double()
    one = batch()
    hidden = model.hidden(one.ids, documents=one.documents).flatten(0, 1)
    losses = token_losses(model.head, hidden, one.targets.flatten(), SMALL.vocab_size)
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(one.ids, documents=one.documents).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, one.targets.flatten(), reduction="none")
    plain.sum().backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.allclose(found[name], p.grad, atol=1e-4), name


def gradients(model: Gemma2, one: Batch, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients as a step finds them."""
    config = TrainConfig(steps=1, **settings)
    loss, _, _ = Trainer(model, config, next_tokens(config)).gradients(one)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, found


def test_the_loss_is_a_mean_over_counted_tokens() -> None:
    model, one = small_model(), batch()
    logits = model(one.ids, documents=one.documents).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, one.targets.flatten())
    assert gradients(model, one)[0] == pytest.approx(expected.item(), rel=0.02)  # products are in bf16


def test_gradients_are_those_of_autograd_up_to_the_rounding_of_products() -> None:
    model, one = small_model(), batch()
    _, found = gradients(model, one)
    logits = model(one.ids, documents=one.documents).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, one.targets.flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and found[name].dtype is torch.float32, name
        assert (found[name] - p.grad).norm() < 0.05 * p.grad.norm(), name


def test_it_learns_what_repeats() -> None:
    model = small_model(size=0.05)
    reports: list[Progress] = []

    def forever() -> Iterator[Batch]:
        while True:
            yield batch()

    config = TrainConfig(steps=40, warmup_steps=4, log_every=10)
    train(model, forever(), config, reports.append)
    assert [r.step for r in reports] == [10, 20, 30, 40]
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert not model.training


def test_schedule_warms_up_stays_and_decays() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_share=0.5, final_share=0.1)
    shares = [schedule(step, config) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == 1 and set(shares[10:49]) == {1}
    assert shares[-1] == pytest.approx(0.1) and shares[50:] == sorted(shares[50:], reverse=True)


@pytest.mark.parametrize("cap", ["attn_softcap", "final_softcap"])
def test_training_without_a_soft_cap_is_refused(cap: str) -> None:
    model = Gemma2(dataclasses.replace(SMALL, **{cap: None}))
    with pytest.raises(UsageError, match="soft cap"):
        train(model, iter([batch()]), TrainConfig(steps=1))


def test_data_that_ends_early_is_an_error() -> None:
    with pytest.raises(UsageError, match="ended at step 1"):
        train(small_model(), iter([batch()]), TrainConfig(steps=2))


def test_evaluation_is_the_mean_over_all_targets_of_all_batches() -> None:
    model, batches = small_model(), [batch(seed) for seed in range(3)]
    batches[1].targets[:, 5:] = IGNORED  # batches with few targets do not count as much as others
    total, count = 0.0, 0
    for one in batches:
        logits = model(one.ids, documents=one.documents).flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, one.targets.flatten(), reduction="sum").item()
        count += one.num_targets
    model.train()
    for micro_rows in (0, 1):
        config = TrainConfig(steps=1, precision="float32", micro_rows=micro_rows)
        assert evaluate(model, iter(batches), config) == {"loss": pytest.approx(total / count, rel=1e-5)}
    assert model.training
    with pytest.raises(UsageError, match="no target"):
        evaluate(model, iter([]), config)


@pytest.mark.parametrize(("done", "saves"), [(0, [1]), (1, [])])
def test_a_run_that_stops_at_a_checkpoint_does_not_write_it_again(done: int, saves: list[int]) -> None:
    config, found = TrainConfig(steps=9, save_every=1), list[int]()
    trainer = Trainer(small_model(), config, next_tokens(config))
    trainer.step_number = done
    stop = Hooks(save=found.append, stop=lambda: trainer.step_number == 1)
    assert not train_steps(trainer, iter([batch()] * 9), stop)
    assert found == saves


def test_steps_are_not_done_before_their_last_evaluation_is() -> None:
    config, found = TrainConfig(steps=2), list[int]()
    trainer = Trainer(small_model(), config, next_tokens(config))
    assert not train_steps(trainer, iter([batch()] * 2), Hooks(save=found.append, evaluate=lambda _: False))
    assert found == [2]
