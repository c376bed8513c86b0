"""The log of a run: its lines, what a killed process left of them, the curve, and trackers."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cabochon.base.errors import MissingResource
from cabochon.cli.train_show import line
from cabochon.train.log import CURVE, LOG, Log, read, trackers


def test_a_log_goes_on_where_the_run_does(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.add({"step": step, "loss": 3.0 - step / 100})
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 40, "lo')  # a process died here
    assert [record["step"] for record in read(tmp_path / LOG)] == [10, 20, 30]
    again = Log(tmp_path, 20)  # the checkpoint is from step 20: 30 happens once more
    again.add({"step": 30, "loss": 2.5})
    assert [(r["step"], r["loss"]) for r in read(tmp_path / LOG)] == [(10, 2.9), (20, 2.8), (30, 2.5)]


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.add({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert json.loads((tmp_path / LOG).read_text()) == {"step": 1, "loss": None, "grad_norm": None}
    log.draw("run")  # a curve of nothing is drawn all the same


def test_the_curve_has_both_losses(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in range(1, 5):
        log.add({"step": step, "loss": 4.0 / step})
    log.add({"step": 4, "eval_loss": 1.5})
    log.draw("my run")
    svg = (tmp_path / CURVE).read_text()
    assert svg.startswith("<svg") and "my run" in svg and "held out" in svg and "training" in svg


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_records_reach_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[Any] = []
    stand_in = SimpleNamespace(
        init=lambda **settings: calls.append(settings), log=lambda numbers, step: calls.append((step, numbers))
    )
    monkeypatch.setitem(sys.modules, name, stand_in)
    log = Log(tmp_path, 0, trackers((name,), tmp_path / "run", {"steps": 3})(0))
    log.add({"step": 1, "loss": 2.0, "note": "text stays here", "grad_norm": math.nan})
    assert calls == [{"project": "cabochon", "name": "run", "config": {"steps": 3}}, (1, {"loss": 2.0})]


def test_records_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard") and purge_step == 7

        def add_text(self, name: str, text: str) -> None:
            assert "steps: 3" in text

        def add_scalar(self, *values: Any) -> None:
            scalars.append(values)

        def flush(self) -> None:
            scalars.append("flushed")

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    Log(tmp_path, 6, trackers(("tensorboard",), tmp_path, {"steps": 3})(6)).add({"step": 7, "loss": 1.0})
    assert scalars == [("loss", 1.0, 7), "flushed"]


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingResource, match="wandb is not installed"):
        trackers(("wandb",), tmp_path, {})


def test_a_tracker_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise LookupError("no key is configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    start = trackers(("wandb",), tmp_path, {})
    with pytest.raises(MissingResource, match="no key is configured") as refused:
        start(0)
    assert refused.value.what == "wandb could not be started"


def test_a_record_in_words() -> None:
    record = dict(
        step=20, loss=2.5, grad_norm=0.5, learning_rate=1e-3, tokens_per_second=12345.6, share_of_peak=0.31,
        seconds_per_step=2.0, skipped=1,
    )  # fmt: skip
    words = "step   20/1000  loss 2.500  gradient 0.500  rate 1.00e-03  12,346 tokens/s  31% of peak  33 min left"
    assert line(record, 1000) == f"{words}  1 left out"
    assert line(record | {"step": 1000, "skipped": 0, "loss": None}, 1000).endswith("31% of peak")
    assert "loss not a number" in line(record | {"loss": None}, 1000)
    assert "loss 2.500  accuracy 0.750  gradient" in line(record | {"accuracy": 0.75}, 1000)
    told = line({"step": 20, "eval_loss": 2.25, "eval_margin": None}, 1000)
    assert told == "step   20/1000  held out: loss 2.250  margin not a number"
    assert line({"step": 20, "eval_loss": 2.25}, 1000) == "step   20/1000  held out: loss 2.250"
