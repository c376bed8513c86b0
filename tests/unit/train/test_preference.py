"""Preference losses and their gradients against plain autograd over whole logits, and the frozen reference."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.data.config import DataConfig
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.stream import open_stream
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraConfig, adapter_parameters, attach
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.loop import evaluate
from cabochon.train.preference import pair_count, pairs_of, preference, preference_measure
from cabochon.train.preference_config import PreferenceConfig
from cabochon.train.step import Trainer
from cabochon.weights.hub import built_in
from support import SMALL, random_ids, small_model

LENGTHS = [[(3, 4, 6), (2, 5, 1)], [(4, 7, 3)], []]  # of each row's pairs: prompt, chosen, rejected


def pairs_batch(lengths: list[list[tuple[int, int, int]]] = LENGTHS) -> Batch:
    """Rows with two pairs, one and none, each answer behind its prompt."""
    ids = random_ids(SMALL, len(lengths), 32)
    targets, documents = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, pairs in enumerate(lengths):
        at = 0
        for number, (prompt, *answers) in enumerate(pairs):
            for side, answer in enumerate(answers):
                documents[row, at:] = 2 * number + side
                targets[row, at + prompt - 1 : at + prompt - 1 + answer] = ids[row, at + prompt : at + prompt + answer]
                at += prompt + answer
        documents[row, at:] = 2 * len(pairs)
    return Batch(ids, targets, documents)


def plain(config: PreferenceConfig, model: Gemma2, reference: Gemma2, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [P] and log-probability ratios [P, 2] as the papers write them, over whole logits, answer by answer."""

    def logprob(one: Gemma2, row: int, document: int) -> Tensor:
        logits = one(batch.ids[row : row + 1], documents=batch.documents[row : row + 1])[0].double()
        own = (batch.documents[row] == document) & (batch.targets[row] != IGNORED)
        return logits[own].log_softmax(1).gather(1, batch.targets[row][own][:, None]).sum()

    ratios, lengths = [], []
    for row in range(len(batch.ids)):
        for document in range(0, int(batch.documents[row].max()), 2):
            with torch.no_grad():
                before = [logprob(reference, row, document + side) for side in (0, 1)]
            ratios.append(torch.stack([logprob(model, row, document + side) - before[side] for side in (0, 1)]))
            own = batch.targets[row] != IGNORED
            lengths.append([int(((batch.documents[row] == document + side) & own).sum()) for side in (0, 1)])
    both, sizes = torch.stack(ratios), torch.tensor(lengths)
    if config.loss == "ipo":
        mean = both / sizes
        return (mean[:, 0] - mean[:, 1] - 1 / (2 * config.beta)) ** 2, both
    p = 1 / (1 + (-config.beta * (both[:, 0] - both[:, 1])).exp())
    return -(1 - config.label_smoothing) * p.log() - config.label_smoothing * (1 - p).log(), both


def models() -> tuple[Gemma2, Gemma2]:
    """In float64, apart enough for the margins to matter."""
    model, reference = small_model(seed=1).double(), small_model(seed=1).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel() + 1))
    return model, reference


@pytest.mark.parametrize(
    "changed", [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.3}], ids=["dpo", "smooth", "ipo"]
)
@pytest.mark.parametrize("micro_rows", [0, 1])
def test_loss_and_gradients_equal_plain_autograd(changed: Any, micro_rows: int) -> None:
    config = PreferenceConfig(steps=1, precision="float32", micro_rows=micro_rows, **changed)
    (model, reference), batch = models(), pairs_batch()
    losses, ratios = plain(config, model, reference, batch)
    losses.mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = Trainer(model, config, preference(config, reference), counted=pair_count)
    loss, count, measures = trainer.gradients(batch)
    assert count == 3 and loss == pytest.approx(losses.mean().item(), rel=1e-5)
    rewards = config.beta * ratios.detach()
    assert measures["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).double().mean().item())
    assert measures["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean().item(), rel=1e-4)
    assert measures["chosen_reward"] == pytest.approx(rewards[:, 0].mean().item(), rel=1e-4)
    assert measures["rejected_reward"] == pytest.approx(rewards[:, 1].mean().item(), rel=1e-4)
    assert 0 < measures["accuracy"] < 1 and len(wanted) > 10
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-9, name


def test_held_out_pairs_are_measured_without_smoothing() -> None:
    config = PreferenceConfig(steps=1, precision="float32", label_smoothing=0.3)
    (model, reference), batch = models(), pairs_batch()
    losses, ratios = plain(replace(config, label_smoothing=0.0), model, reference, batch)
    found = evaluate(model, iter([batch, batch]), config, measure=preference_measure(config, reference))
    assert found is not None and found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["margin"] == pytest.approx(config.beta * (ratios[:, 0] - ratios[:, 1]).mean().item(), rel=1e-4)


def test_the_reference_of_adapters_is_the_model_beneath_them() -> None:
    config, batch = PreferenceConfig(steps=1, precision="float32"), pairs_batch()
    model, reference = small_model(seed=1), small_model(seed=1)
    attach(model, LoraConfig(rank=2, alpha=8, dropout=0.0))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.normal_(std=0.1, generator=draw)
    found = []
    for beneath in (reference, None):
        trainer = Trainer(model.train(), config, preference(config, beneath), counted=pair_count)
        found.append((trainer.gradients(batch), [p.grad.clone() for p in adapter_parameters(model).values()]))
        model.zero_grad()
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_at_the_start_nothing_is_preferred() -> None:
    config, batch = PreferenceConfig(steps=1, precision="float32"), pairs_batch()
    loss, _, measures = Trainer(small_model(), config, preference(config, small_model()), counted=pair_count).gradients(
        batch
    )
    # Up to rounding: passes with and without gradients take different ways through attention.
    assert loss == pytest.approx(math.log(2), abs=1e-5) and abs(measures["margin"]) < 1e-5


def test_rows_without_a_pair_count_for_nothing() -> None:
    config, empty = PreferenceConfig(steps=1, precision="float32"), pairs_batch([[], []])
    assert pair_count(empty) == 0 and pair_count(pairs_batch()) == 3
    loss, count, measures = Trainer(
        small_model(), config, preference(config, small_model()), counted=pair_count
    ).gradients(empty)
    assert loss == count == 0 and set(measures.values()) == {0.0}


def test_it_learns_to_prefer() -> None:
    config = PreferenceConfig(
        steps=12, warmup_steps=1, learning_rate=3e-3, precision="float32", schedule="constant", weight_decay=0.0
    )
    model, reference, batch = small_model(size=0.1), small_model(size=0.1), pairs_batch()
    trainer = Trainer(model, config, preference(config, reference), counted=pair_count)
    losses = [trainer.step(batch) for _ in range(12)]
    assert losses[-1].loss < 0.5 * losses[0].loss and losses[-1].measures["accuracy"] == 1


def test_pairs_as_data_packs_them(tmp_path: Path) -> None:
    """What the documents of a batch are is what the rows said."""
    tokenizer, file = load_tokenizer(built_in()), tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}" * (1 + i % 3), "rejected": f" {i + 2} no" * (1 + i % 4)}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    data = DataConfig(sources=(str(file),), shape="preference", epochs=1)
    with open_stream(data, tokenizer, rows=3, length=64) as stream:
        for batch in stream:
            pairs, ids = pairs_of(batch), batch.targets.flatten()[pairs_of(batch).counted]
            answers = [ids[pairs.answers == number].tolist() for number in range(2 * len(pairs.lengths))]
            assert [len(answer) for answer in answers] == pairs.lengths.flatten().tolist()
            texts = [tokenizer.decode(answer[:-1]) for answer in answers]
            found += zip(texts[::2], texts[1::2], strict=True)
    assert sorted(found) == sorted((row["chosen"], row["rejected"]) for row in rows)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "hinge"}, "one of dpo, ipo"),
        ({"beta": 0.0}, "above 0"),
        ({"beta": math.nan}, "above 0"),
        ({"label_smoothing": 0.5}, "nothing would be learned"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "no use"),
        ({"z_loss": 1e-4}, "cross-entropy"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PreferenceConfig(**changed)
