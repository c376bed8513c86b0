"""Distillation: from a live teacher, and from one that was stored, against plain autograd over whole logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher import TeacherBatch, open_teacher
from cabochon.data.teacher_format import fingerprint
from cabochon.data.teacher_index import TeacherFacts, TeacherIndex, Totals
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.distill_config import DistillConfig
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.objectives import live_teacher, mixed_teachers, stored_teacher
from cabochon.train.step import Objective
from cabochon.train.teacher_check import check_stored, check_teacher
from cabochon.train.teacher_logits import Stored, say, store_teacher
from cabochon.weights.hub import built_in
from cabochon.weights.quantize import quantize_layers
from support import SMALL, random_ids, small_model
from teachers import Batches

TEACHER = Gemma2Config(
    vocab_size=SMALL.vocab_size, hidden_size=56, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=40, query_pre_attn_scalar=8, sliding_window=7, max_position=320, final_softcap=8.0,
)  # fmt: skip
COUNT = 40.0


def batch(seed: int = 0, rows: int = 2) -> Batch:
    ids = random_ids(SMALL, rows, 30, seed)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = IGNORED
    return Batch(ids, targets, (torch.arange(30) // 12).expand(rows, 30))


def facts(**changed: Any) -> TeacherFacts:
    usual = dict(
        kind="top-k", k=SMALL.vocab_size, vocab_size=SMALL.vocab_size, temperature=1.0, length=30, teacher="t",
        tokenizer="f", data={},
    )  # fmt: skip
    return TeacherFacts(**usual | changed)


@pytest.fixture
def student() -> Gemma2:
    return small_model(seed=1)


@pytest.fixture
def teacher() -> Gemma2:
    return small_model(TEACHER, seed=2)


def gradient(objective: Objective, model: Gemma2, one: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = objective(model, one, COUNT)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(config: DistillConfig, model: Gemma2, teacher: Any, one: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss over whole logits, by autograd."""
    model.zero_grad()
    counted = one.targets != IGNORED
    logits = model(one.ids, documents=one.documents)[counted]
    with torch.no_grad():
        p = (teacher(one.ids, documents=one.documents)[counted] / config.temperature).log_softmax(1)
    q = (logits / config.temperature).log_softmax(1)
    m = torch.logaddexp(p + np.log(config.beta), q + np.log(1 - config.beta))
    losses = {
        "forward-kl": p.exp() * (p - q),
        "reverse-kl": q.exp() * (q - p),
        "jsd": config.beta * p.exp() * (p - m) + (1 - config.beta) * q.exp() * (q - m),
        "tv": (p.exp() - q.exp()).abs() / 2,
    }
    entropy = torch.nn.functional.cross_entropy(logits, one.targets[counted], reduction="sum")
    loss = ((1 - config.ce_share) * losses[config.divergence].sum() + config.ce_share * entropy) / COUNT
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], rtol: float = 1e-3) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    for name, value in wanted[1].items():
        assert (found[1][name] - value).norm() <= rtol * value.norm() + 1e-6, name


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd", "tv"])
@pytest.mark.parametrize("ce_share", [0.0, 0.3])
def test_a_live_teacher(student: Gemma2, teacher: Gemma2, divergence: Any, ce_share: float) -> None:
    config = DistillConfig(divergence=divergence, beta=0.3, temperature=1.5, ce_share=ce_share)
    found = gradient(live_teacher(config, teacher), student, batch())
    agree(found, plain(config, student, teacher, batch()))
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd", "tv"])
def test_several_teachers_are_one_with_their_mean_probabilities(
    student: Gemma2, teacher: Gemma2, divergence: Any
) -> None:
    other, one = small_model(seed=3), batch()
    config = DistillConfig(divergence=divergence, beta=0.3, temperature=1.5)

    def mixed(ids: Tensor, documents: Tensor) -> Tensor:
        parts = [m(ids, documents=documents) / config.temperature for m in (teacher, other)]
        mean = 0.7 * parts[0].double().softmax(-1) + 0.3 * parts[1].double().softmax(-1)
        return mean.log().float() * config.temperature

    found = gradient(mixed_teachers(config, [teacher, other], [0.7, 0.3]), student, one)
    agree(found, plain(config, student, mixed, one))
    assert found[0] != pytest.approx(gradient(live_teacher(config, teacher), student, one)[0], rel=0.01)


def test_label_smoothing_of_the_share_of_cross_entropy(student: Gemma2, teacher: Gemma2) -> None:
    config, one = DistillConfig(ce_share=0.4), batch()
    smooth = gradient(live_teacher(config, teacher, CrossEntropy(0.2)), student, one)[0]
    without = gradient(live_teacher(DistillConfig(), teacher), student, one)[0]
    counted = one.targets != IGNORED
    logits = student(one.ids, documents=one.documents)[counted]
    entropy = torch.nn.functional.cross_entropy(logits, one.targets[counted], label_smoothing=0.2, reduction="sum")
    assert smooth == pytest.approx(0.6 * without + 0.4 * entropy.item() / COUNT, rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_live_teacher_with_quantised_layers(student: Gemma2, teacher: Gemma2, bits: int) -> None:
    quantize_layers(teacher, bits, 32)
    config = DistillConfig()
    agree(gradient(live_teacher(config, teacher), student, batch()), plain(config, student, teacher, batch()))


def test_a_teacher_whose_head_is_packed_or_whose_cap_is_off(teacher: Gemma2) -> None:
    quantize_layers(teacher, 8, 32, embedding=True)
    with pytest.raises(UsageError, match="its embedding"):
        live_teacher(DistillConfig(), teacher)
    uncapped = Gemma2(Gemma2Config(**{**vars(TEACHER), "attn_softcap": None}))
    with pytest.raises(UsageError, match="soft cap"):
        live_teacher(DistillConfig(), uncapped)


def stored(folder: Path, teacher: Gemma2, one: Batch, known: TeacherFacts, seed: int = 0) -> TeacherBatch:
    """A batch as it comes back from the disk."""
    store_teacher(teacher, Batches([one]), folder, known, key={}, seed=seed)
    with open_teacher(folder, rows=len(one.ids), epochs=1, shuffle=False) as stream:
        return next(stream)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jsd", "tv"])
def test_all_ids_stored_are_the_live_teacher(student: Gemma2, teacher: Gemma2, tmp_path: Path, divergence: Any) -> None:
    config = DistillConfig(divergence=divergence, temperature=2.0, ce_share=0.2)
    read = stored(tmp_path / "t", teacher, batch(), facts(temperature=2.0))
    # Probabilities are stored to 1/2048, and so is the loss.
    agree(gradient(stored_teacher(config), student, read), plain(config, student, teacher, batch()), rtol=2e-3)


@pytest.mark.parametrize("k", [1, 12, 60])
def test_the_likeliest_stored_are_never_more_than_the_live_teacher(
    student: Gemma2, teacher: Gemma2, tmp_path: Path, k: int
) -> None:
    live, _ = plain(DistillConfig(), student, teacher, batch())
    read = stored(tmp_path / "t", teacher, batch(), facts(k=k))
    assert read.teacher_ids.shape == (2, 30, k)
    assert 0 < gradient(stored_teacher(DistillConfig()), student, read)[0] < live


def test_parts_of_a_stored_batch_add_up(student: Gemma2, teacher: Gemma2, tmp_path: Path) -> None:
    read = stored(tmp_path / "t", teacher, batch(rows=3), facts(k=9, kind="sampled"))
    objective = stored_teacher(DistillConfig())
    parts = [gradient(objective, student, part) for part in read.split(2)]
    whole = gradient(objective, student, read)
    agree((parts[0][0] + parts[1][0], {n: parts[0][1][n] + parts[1][1][n] for n in whole[1]}), whole)


def test_the_gradient_of_a_sample_is_unbiased(student: Gemma2, teacher: Gemma2) -> None:
    """Over many draws its mean approaches the live gradient as the root of their number; that of the top k does not."""
    one, config, draws = batch(rows=1), DistillConfig(), 300
    wanted = _flat(plain(config, student, teacher, one)[1])
    objective = stored_teacher(config)
    found = [
        _flat(gradient(objective, student, _spoken(one, teacher, facts(k=8, kind="sampled"), seed))[1])
        for seed in range(draws)
    ]
    gradients = torch.stack(found).double()
    mean, errors = gradients.mean(0), gradients.std(0) / draws**0.5
    # The squared distance is what the variance says: a sum of so many errors that luck hardly matters.
    assert 0.5 < (mean - wanted).square().sum() / errors.square().sum() < 2
    assert ((mean - wanted).abs() > 3 * errors + 1e-9).double().mean() < 0.02
    top = _flat(gradient(objective, student, _spoken(one, teacher, facts(k=8), 0))[1])
    assert (top - wanted).square().sum() > 20 * errors.square().sum()


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in gradients.values()]).double()


def _spoken(one: Batch, teacher: Gemma2, known: TeacherFacts, seed: int) -> TeacherBatch:
    """What a teacher says, without the rounding of the disk: a hundredth of a standard error after 300 draws."""
    said, _ = say(teacher, one, known, seed=(seed, 0))
    where = one.targets != IGNORED
    weights = np.maximum(said.probabilities, said.last[:, None]) if known.kind == "sampled" else None
    dense = []
    for values in (said.ids, said.probabilities, weights):
        out = torch.zeros(*one.ids.shape, known.k, dtype=torch.int32 if values is said.ids else torch.float32)
        if values is not None:
            out[where] = torch.from_numpy(values).to(out.dtype)
        dense.append(out)
    return TeacherBatch(one.ids, one.targets, one.documents, dense[0], dense[1], None if weights is None else dense[2])


# Storing


def test_what_storing_reports(teacher: Gemma2, tmp_path: Path) -> None:
    seen: list[Stored] = []
    made = [batch(seed) for seed in range(3)]
    index = store_teacher(teacher, Batches(made), tmp_path / "t", facts(k=7), key={}, report=seen.append)
    assert [stored.batches for stored in seen] == [0, 1, 2, 3] and seen[-1].totals == index.totals
    assert index.totals.tokens == sum(one.num_targets for one in made) and index.totals.rows == 6
    p = torch.cat([teacher(one.ids, documents=one.documents)[one.targets != IGNORED] for one in made]).softmax(1)
    assert index.per_token()["left_out"] == pytest.approx(1 - p.topk(7).values.sum(1).mean().item(), rel=1e-4)
    assert index.per_token()["entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-4)


def test_only_so_many_batches(teacher: Gemma2, tmp_path: Path) -> None:
    stream = Batches([batch(seed) for seed in range(5)])
    index = store_teacher(teacher, stream, tmp_path / "t", facts(k=7), key={}, batches=2)
    assert (stream.place, index.totals.rows) == (2, 4)


def test_a_bad_row_does_not_throw_away_what_is_there(teacher: Gemma2, tmp_path: Path) -> None:
    class Failing(Batches):
        def __next__(self) -> Batch:
            if self.place == 2:
                raise BadInput("row 5 is bad", "it is empty", "--max-bad-rows")
            return super().__next__()

    made = [batch(seed) for seed in range(4)]
    with pytest.raises(BadInput, match="row 5"):
        store_teacher(teacher, Failing(made), tmp_path / "t", facts(k=7), key={}, shard_bytes=1)
    assert not (tmp_path / "t").exists()
    seen: list[Stored] = []
    store_teacher(teacher, Batches(made), tmp_path / "t", facts(k=7), key={}, shard_bytes=1, report=seen.append)
    assert [stored.batches for stored in seen] == [2, 3, 4]
    store_teacher(teacher, Batches(made), tmp_path / "at once", facts(k=7), key={}, shard_bytes=1)
    for file in (tmp_path / "at once").iterdir():
        assert file.read_bytes() == (tmp_path / "t" / file.name).read_bytes(), file.name


def test_other_settings_begin_anew(teacher: Gemma2, tmp_path: Path) -> None:
    class Interrupted(Batches):
        def __next__(self) -> Batch:
            if self.place == 2:
                raise KeyboardInterrupt
            return super().__next__()

    made = [batch(seed) for seed in range(3)]
    for number, changed in enumerate([dict(key={"weights": "int8"}), dict(seed=1)]):
        out = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            store_teacher(teacher, Interrupted(made), out, facts(k=7), key={}, shard_bytes=1)
        seen: list[Stored] = []
        settings: dict[str, Any] = dict(key={}) | changed
        store_teacher(teacher, Batches(made), out, facts(k=7), shard_bytes=1, report=seen.append, **settings)
        assert seen[0].batches == 0


def test_nothing_to_learn_is_an_error(teacher: Gemma2, tmp_path: Path) -> None:
    one = batch()
    nothing = Batch(one.ids, torch.full_like(one.targets, IGNORED), one.documents)
    with pytest.raises(BadInput, match="nothing to store"):
        store_teacher(teacher, Batches([nothing]), tmp_path / "t", facts(k=7), key={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(k=0), "k cannot be 0"),
        (dict(k=212), "it has 211 ids"),
        (dict(temperature=0.0), "not positive"),
        (dict(temperature=float("nan")), "not positive"),
        (dict(length=321), "context of 320"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(teacher: Gemma2, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store_teacher(teacher, Batches([batch()]), tmp_path / "t", facts(**changed), key={})


# Whether a teacher fits


def test_a_teacher_of_other_pieces_is_refused() -> None:
    ours, other = load_tokenizer(built_in()), load_tokenizer(built_in())
    tiny = Gemma2Config.preset("tiny")
    check_teacher(ours, tiny, other, tiny, "t")
    with pytest.raises(UsageError, match="knows 4095 ids, the student 4096"):
        check_teacher(ours, tiny, other, tiny.with_vocabulary(4095), "t")
    first, second = other._backend.ids["a"], other._backend.ids["b"]
    other._pieces[first], other._pieces[second] = "b", "a"
    other._bytes.clear()
    with pytest.raises(UsageError, match="other pieces under the same ids") as caught:
        check_teacher(ours, tiny, other, tiny, "t")
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    ("changed", "asked", "message"),
    [
        ({}, {}, None),
        (dict(temperature=2.0), dict(temperature=2.0), None),
        (dict(temperature=2.0), {}, "temperature 2.0, not 1.0"),
        (dict(kind="sampled"), {}, None),
        (dict(kind="sampled"), dict(divergence="jsd"), "estimates forward-kl alone, not jsd"),
        (dict(length=2000), {}, "2000 positions"),
        (dict(tokenizer="f"), {}, "other pieces"),
        (dict(vocab_size=5000), {}, "knows 5000 ids"),
    ],
    ids=str,
)
def test_whether_a_stored_teacher_fits(changed: dict[str, Any], asked: dict[str, Any], message: str | None) -> None:
    tokenizer, tiny = load_tokenizer(built_in()), Gemma2Config.preset("tiny")
    usual = dict(k=5, vocab_size=4096, tokenizer=fingerprint(tokenizer))
    index = TeacherIndex(facts(**usual | changed), Totals(), ())
    if message is None:
        check_stored(index, DistillConfig(**asked), tokenizer, tiny, "t")
    else:
        with pytest.raises(UsageError, match=message):
            check_stored(index, DistillConfig(**asked), tokenizer, tiny, "t")


@pytest.mark.parametrize(
    "changed",
    [dict(divergence="kl"), dict(beta=1.1), dict(beta=-0.1), dict(temperature=0.0), dict(temperature=float("inf")),
     dict(temperature=float("nan")), dict(ce_share=1.0), dict(ce_share=-0.1)],
    ids=str,
)  # fmt: skip
def test_values_without_sense_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changed))):
        DistillConfig(**changed)
