"""WARP's loop and its front: what is trained from where, what is merged to what, and going on where it stopped."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from cabochon.base.errors import BadInput, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.recipe import warp as module
from cabochon.recipe.front import (
    PLAIN,
    WARP,
    Measured,
    best_share,
    front_table,
    measured_run,
    measured_shares,
    summary,
    write_front,
)
from cabochon.recipe.warp import Policy, baseline, begin, policies, train_and_merge, write_result
from cabochon.recipe.warp_config import WarpConfig
from cabochon.weights.folder import load_model
from cabochon.weights.save import save_model
from support import small_model

CONFIG = Gemma2Config(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=24,
    query_pre_attn_scalar=16, sliding_window=8, max_position=32,
)  # fmt: skip
TOLD = WarpConfig(steps=(4, 2), iterations=2, policies=3, held_out=("rows.jsonl",), eta=0.4, save_dtype="float32")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    save_model(small_model(CONFIG, seed=3), tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


class Trained:
    """In the place of training: each policy is its start with noise of its seed, as long as its steps."""

    def __init__(self, die_at: int = -1) -> None:
        self.calls: list[list[Policy]] = []
        self.die_at, self.count = die_at, 0

    def __call__(self, asked: Sequence[Policy]) -> None:
        self.calls.append(list(asked))
        for policy in asked:
            self.count += 1
            if self.count == self.die_at:
                raise KeyboardInterrupt
            model = load_model(policy.start, dtype=torch.float32)
            draw = torch.Generator().manual_seed(policy.seed)
            with torch.no_grad():
                for p in model.parameters():
                    p += 1e-3 * policy.steps * torch.randn(p.shape, generator=draw)
            save_model(model, policy.out)
            save_model(model, policy.out / "checkpoints" / f"{policy.steps:06d}")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in load_model(folder, dtype=torch.float32).named_parameters()}


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    angle = torch.arccos((a @ b) / (a.norm() * b.norm()))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def merged(base: dict[str, Tensor], models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Task vectors on the sphere, a layer at a time, and an embedding and a norm for itself, in float64."""
    groups: dict[str, list[str]] = {}
    for name in base:
        groups.setdefault(".".join(name.split(".")[:2]) if name.startswith("layers.") else name, []).append(name)
    result = {}
    for names in groups.values():
        vectors = [torch.cat([(one[name] - base[name]).flatten() for name in names]) for one in models]
        found = vectors[0]
        for m, vector in enumerate(vectors[1:], start=2):
            found = slerp(found, vector, 1 / m)
        parts = found.split([base[name].numel() for name in names])
        result |= {n: base[n] + part.view_as(base[n]) for n, part in zip(names, parts, strict=True)}
    return result


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-6, name


def test_the_algorithm(start: Path, out: Path) -> None:
    """Section 3 of the paper, written plainly."""
    train = Trained()
    last = train_and_merge(TOLD, start, out, train)
    begun = weights(start)
    for number, (steps, seeds) in enumerate([(4, (0, 1, 2)), (2, (3, 4, 5))], start=1):
        folder = out / f"iteration-{number}"
        asked = train.calls[number - 1]
        assert [(policy.seed, policy.steps) for policy in asked] == [(seed, steps) for seed in seeds]
        found = merged(begun, [weights(folder / f"policy-{m}") for m in (1, 2, 3)])
        same(weights(folder / "slerp"), found)
        if number == 1:
            begun = {name: 0.6 * begun[name] + 0.4 * found[name] for name in begun}
            same(weights(folder / "liti"), begun)
    assert last == out / "iteration-2" / "slerp" and not (out / "iteration-2" / "liti").exists()
    assert [policy.start for policy in train.calls[1]] == [out / "iteration-1" / "liti"] * 3
    assert not list(out.rglob("checkpoints"))
    result = write_result(TOLD, start, last, 0.3, out)
    first, end = weights(start), weights(last)
    same(weights(result), {name: 0.7 * first[name] + 0.3 * end[name] for name in first})


@pytest.mark.parametrize("die_at", range(1, 7))
def test_it_goes_on_after_any_policy(start: Path, out: Path, tmp_path: Path, die_at: int) -> None:
    whole = train_and_merge(TOLD, start, tmp_path / "whole", Trained())
    with pytest.raises(KeyboardInterrupt):
        train_and_merge(TOLD, start, out, Trained(die_at))
    train = Trained()
    last = train_and_merge(TOLD, start, out, train)
    assert train.count == 7 - die_at  # nothing is trained twice
    assert (last / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("die_at", [1, 2, 3])
def test_it_goes_on_after_any_merge(
    start: Path, out: Path, tmp_path: Path, die_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls, real = train_and_merge(TOLD, start, tmp_path / "whole", Trained()), [], module.Merge.write

    def dying(self: Any, folder: Path, **settings: Any) -> None:
        calls.append(folder)
        if len(calls) == die_at:
            raise KeyboardInterrupt
        real(self, folder, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module.Merge, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            train_and_merge(TOLD, start, out, Trained())
    train = Trained()
    last = train_and_merge(TOLD, start, out, train)
    assert train.count == (3 if die_at < 3 else 0)
    assert (last / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_result_follows_its_share(start: Path, out: Path) -> None:
    last = train_and_merge(TOLD, start, out, Trained())
    folder = write_result(TOLD, start, last, 0.5, out)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    write_result(TOLD, start, last, 0.5, out)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    before = weights(folder)
    write_result(TOLD, start, last, 1.0, out)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    same(weights(folder), weights(last))


def test_one_number_of_steps_is_for_all_iterations() -> None:
    told = replace(TOLD, steps=(7,))
    assert [group[0].steps for group in policies(told, Path("s"), Path("o"))] == [7, 7]
    assert told.total_steps == 42 and baseline(told, Path("s"), Path("o")).steps == 42


def test_a_folder_belongs_to_its_settings(out: Path) -> None:
    begin(out, TOLD, {"beta": 0.1})
    begin(out, replace(TOLD, etas=(0.5,), choose=0.5), {"beta": 0.1})  # what is measured may change
    with pytest.raises(UsageError, match=r"eta was 0\.4 and is 0\.5"):
        begin(out, replace(TOLD, eta=0.5), {"beta": 0.1})
    with pytest.raises(UsageError, match="policy was"):
        begin(out, TOLD, {"beta": 0.2})
    (out / module.SETTINGS).write_text("{broken")
    with pytest.raises(BadInput, match="not JSON"):
        begin(out, TOLD, {"beta": 0.1})
    (out / module.SETTINGS).rename(out / "notes.txt")
    with pytest.raises(UsageError, match=r"something else in it"):
        begin(out, TOLD, {"beta": 0.1})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"steps": (1, 2, 3)}, "there are 2 iterations"),
        ({"steps": (0,)}, "at least 1"),
        ({"eta": 1.5}, "from 0 to 1"),
        ({"eta": float("nan")}, "from 0 to 1"),
        ({"etas": (0.5, 0.5)}, "each once"),
        ({"etas": ()}, "there have to be some"),
        ({"held_out": ()}, "choose = 0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(TOLD, **changed)


# The front


def evaluate(model: Gemma2) -> dict[str, float]:
    """Something that depends on the weights."""
    value = float(model.embedding.weight.detach().double().sum())
    names = ("reward", "reward_error", "kl", "kl_per_token", "length", "cut")
    return dict.fromkeys(names, 0.0) | {"reward": value, "kl": value**2}


def test_points_are_measured_once(start: Path, out: Path) -> None:
    last, calls = train_and_merge(TOLD, start, out, Trained()), []

    def counted(model: Gemma2) -> dict[str, float]:
        calls.append(1)
        return evaluate(model)

    first = list(measured_shares(start, last, (1.0, 0.0), counted, word="w", out=out))
    more = list(measured_shares(start, last, (0.0, 0.25, 1.0), counted, word="w", out=out))
    assert len(calls) == 3 and [point.at for point in more] == [0.0, 0.25, 1.0]
    assert [more[0], more[2]] == first
    list(measured_shares(start, last, (0.0,), counted, word="other", out=out))
    assert len(calls) == 4
    ends = [float(weights(folder)["embedding.weight"].sum()) for folder in (start, last)]
    for point in more:
        wanted = (1 - point.at) * ends[0] + point.at * ends[1]
        assert point.scores["reward"] == pytest.approx(wanted, abs=1e-5)


def test_a_plain_run_is_measured_at_its_checkpoints(start: Path, out: Path) -> None:
    policy = Policy(start, out / "baseline", 0, 2, points=2)
    for steps in (1, 2):
        Trained()([replace(policy, out=out / f"{steps}", steps=steps)])
        save_model(load_model(out / f"{steps}"), policy.out / "checkpoints" / f"{steps:06d}")
    (policy.out / "checkpoints" / ".000003.partial").mkdir()
    points = list(measured_run(policy, evaluate, word="w", out=out))
    assert [(point.run, point.at) for point in points] == [(PLAIN, 1), (PLAIN, 2)]
    assert points[0].scores != points[1].scores
    assert list(measured_run(policy, lambda _: pytest.fail("again"), word="w", out=out)) == points


def point(run: str, at: float, reward: float, kl: float) -> Measured:
    return Measured(run, at, {"reward": reward, "reward_error": 0.1, "kl": kl, "kl_per_token": kl / 9, "length": 9.0})


POINTS = [point(WARP, 0, 0.2, 0), point(WARP, 0.5, 0.6, 2), point(WARP, 1, 0.7, 4), point(PLAIN, 10, 9, 3)]


@pytest.mark.parametrize(("beta", "best"), [(0.0, 1.0), (0.1, 0.5), (1.0, 0.0)])
def test_the_best_share(beta: float, best: float) -> None:
    assert best_share(POINTS, beta) == best


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_table_loses_no_digit(width: int) -> None:
    scores = {"reward": -10.81234, "reward_error": 0.01234, "kl": 112.3451, "kl_per_token": 3.5, "length": 1032.11}
    out = StringIO()
    Console(file=out, width=width).print(front_table([*POINTS, Measured(PLAIN, 12000, scores)], 0.1, 0.5))
    shown = out.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    cells = [re.split(r"\s*│\s*", line.strip())[1:-1] for line in shown.splitlines() if line.startswith("│")]
    if width >= 80:
        assert cells[1] == ["warp", "0.5", "0.6000 ± 0.1000", "2.000", "9.0", "0.4000", "best"]
        assert cells[4] == ["plain", "12000", "-10.8123 ± 0.0123", "112.345", "1032.1", "-22.0468", ""]
    else:
        assert "".join(line[2] for line in cells).replace(" ", "").endswith("-10.8123±0.0123")


def test_what_is_written_of_a_front(out: Path) -> None:
    write_front(out, POINTS, 0.1, 0.5)
    told = json.loads((out / "front.json").read_text())
    assert told == json.loads(json.dumps(summary(POINTS, 0.1, 0.5)))
    assert told["points"][1] == {"run": "warp", "eta": 0.5, "worth": pytest.approx(0.4)} | dict(POINTS[1].scores)
    assert told["points"][3]["step"] == 10
    svg = (out / "front.svg").read_text()
    assert "WARP, shares of the last merge" in svg and "one policy, as many steps" in svg and "eta 0.5" in svg
