"""What processes tell each other, how they are set up, and how one hears that another has failed."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Muon

from cabochon.base.errors import BadInput, Elsewhere, MissingResource, UsageError
from cabochon.cli.main import main
from cabochon.train.muon import newton_schulz
from cabochon.train.parallel import setup, shard
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.whole import writing
from several import together
from support import SMALL, small_model


def conversation(tensor_parallel: int) -> dict[str, Any]:
    """Everything that is said, as this rank heard it."""
    ranks = setup("cpu", tensor_parallel)
    heard: dict[str, Any] = {
        "part": [ranks.part, ranks.parts],
        "total": ranks.total(0.5 + ranks.part),
        "most": ranks.most(7 if ranks.rank == 2 else -1),
        "gather": ranks.gather({"rank": ranks.rank, "text": "é" * ranks.rank, "nan": float("nan")}),
        "first": ranks.on_first(lambda: ["only", ranks.rank]),
    }
    for error in (BadInput("a", "b", "c"), ValueError("bug")):
        heard[type(error).__name__] = _caught(ranks, error)
    return heard


def _caught(ranks: Ranks, error: Exception) -> list[Any]:
    def fail() -> None:
        raise error

    try:
        ranks.on_first(fail)
    except Elsewhere as elsewhere:
        return ["elsewhere", elsewhere.exit_code]
    except type(error) as own:
        return ["own", own is error]
    return []


def test_ranks_hear_the_same() -> None:
    heard = together(4, conversation, 2)
    assert [each["part"] for each in heard] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert {each["total"] for each in heard} == {2.0}  # parts are counted once
    assert {each["most"] for each in heard} == {7}
    assert [said["rank"] for said in heard[3]["gather"]] == [0, 1, 2, 3]
    assert [said["text"] for said in heard[1]["gather"]] == ["", "é", "éé", "ééé"]
    assert all(each["first"] == ["only", 0] for each in heard)
    assert [each["BadInput"] for each in heard] == [["own", True], *[["elsewhere", 3]] * 3]
    assert [each["ValueError"] for each in heard] == [["own", True], *[["elsewhere", 1]] * 3]


def test_one_process_hears_itself() -> None:
    assert (SINGLE.total(2.5), SINGLE.most(3), SINGLE.gather([1]), SINGLE.on_first(lambda: 4)) == (2.5, 3, [[1]], 4)


def left_alone() -> str:
    """What the first of two hears when the other goes without a word."""
    ranks = setup("cpu")
    if not ranks.first:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with ranks.watched():
            ranks.total(1)
    except MissingResource as error:
        return error.what
    return "nothing"


def test_a_lost_process_is_an_error_with_a_hint() -> None:
    assert together(2, left_alone) == ["training stopped: another process of the run is gone", None]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), Ranks(world=2).watched():
        raise RuntimeError("shapes do not fit")


def asked_for() -> list[Any]:
    """Whole tensors, in an order of the first one's own, until it fails."""
    ranks, model = setup("cpu"), small_model()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model, ranks, "float32")
    sharded = dict(model.named_parameters())
    names = [*sorted(sharded, reverse=True), "final_norm.weight"]
    same = writing(ranks, sharded, lambda whole: [torch.equal(whole(name), wanted[name]) for name in names])

    def fail(whole: Any) -> None:
        whole("embedding.weight")
        raise OSError("full")

    try:
        writing(ranks, sharded, fail)
    except (OSError, Elsewhere) as error:
        return [all(same), len(same) == len(names), type(error).__name__]
    return []


def test_whole_tensors_for_the_first() -> None:
    assert together(3, asked_for) == [[True, True, "OSError"], *[[True, True, "Elsewhere"]] * 2]


def test_without_torchrun_there_is_one() -> None:
    assert setup("cpu", environment={}) == Ranks(device="cpu")


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "3", "RANK": "0"}])
def test_processes_that_cannot_be_grouped(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="layers cannot be shared by 2 processes"):
        setup("cpu", 2, environment)


def test_a_process_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(MissingResource, match=r"process 4 of this machine has no GPU\n.*there are 4\n.*-node 4"):
        setup("cuda", environment={"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": "4"})


def refused(count: int) -> str:
    try:
        shard(small_model(), setup("cpu", count), "float32")
    except UsageError as error:
        return error.cause
    return ""


def test_heads_that_cannot_be_shared() -> None:
    assert SMALL.num_kv_heads == 2
    assert together(4, refused, 4) == ["the model has 2 key-value heads"] * 4


def test_the_error_of_another_process_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> None:
        raise Elsewhere(3)

    monkeypatch.setattr("cabochon.cli.main.read_config", fail)
    assert main(["show"]) == 3
    assert capsys.readouterr() == ("", "")


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_newton_schulz_is_that_of_torch(rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    update = torch.randn(rows, columns, generator=draw)
    p = nn.Parameter(torch.zeros(rows, columns))
    p.grad = update.clone()
    Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    expected = torch.zeros(rows, columns).add_(newton_schulz(update), alpha=-(max(1, rows / columns) ** 0.5))
    assert torch.equal(p.detach(), expected)


def test_one_process_imports_nothing_for_many() -> None:
    heavy = "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"
    code = f"import sys, cabochon.train.build; print([m for m in sys.modules if m.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
