"""Bad input to training through the real command: three lines, an exit code, nothing written, no work lost."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cabochon.cli.main import main
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.log import read
from cabochon.train.spikes import SpikeWatch
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder
from pretraining import CONFIG, FLAGS, STEPS, pretrain, said, write_start


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model to start from and rows."""
    write_start(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text, code, words",
    [
        ("stepz = 3", 2, "there is no option stepz; did you mean"),
        ("steps = 'many'", 2, "many"),
        ("steps = ", 3, "is not TOML"),
        ("[optimizer]\nsteps = 3", 3, "has a table, [optimizer]"),
        (None, 4, "cannot be read"),
    ],
)
def test_a_bad_configuration(
    work: Path, capsys: pytest.CaptureFixture[str], text: str | None, code: int, words: str
) -> None:
    if text is not None:
        Path("run.toml").write_text(text)
    err = said(capsys, main(["train", "pretrain", "start", "--config", "run.toml", "--out", "run"]), code)
    for part in words.split("; "):
        assert part in err
    assert not Path("run").exists()


def test_rows_that_arrive_cannot_be_counted(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("rows.jsonl").open("rb") as arriving:
        monkeypatch.setattr(sys, "stdin", arriving)
        err = said(capsys, main(["train", "sft", "start", "--data", "-", "--length", "32", "--out", "run"]), 2)
    assert "it is not there yet" in err and "--steps" in err
    assert not Path("run").exists()


def test_a_loss_that_is_no_number(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file("start/model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e30  # finite, and too large to be multiplied
    save_file(tensors, "start/model.safetensors", metadata={"format": "pt"})
    assert "the loss is not a number" in said(capsys, pretrain("run", "--max-skipped", "2"), 3)
    assert not Path("run/config.json").exists() and not Path("run/checkpoints").exists()


def test_what_was_learnt_before_the_loss_was_no_number(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = SpikeWatch.leave_out

    def watched(watch: SpikeWatch, loss: float, norm: float) -> bool:
        return sound(watch, float("nan") if len(watch.losses) == 5 else loss, norm)

    with monkeypatch.context() as patch:
        patch.setattr(SpikeWatch, "leave_out", watched)
        err = said(capsys, pretrain("run", "--max-skipped", "2"), 3)
    assert "the loss is not a number" in err and "run/checkpoints/000007" in err
    found = sorted(folder.name for folder in Path("run/checkpoints").iterdir())
    assert found == ["000003", "000006", "000007"]  # --keep 2, and the one that may be bad
    assert pretrain("run", "--max-skipped", "2") == 0  # the rows after those are good again
    assert [record["step"] for record in read(Path("run/log.jsonl")) if "loss" in record] == list(range(1, STEPS + 1))


def test_a_tracker_that_writes_into_the_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            Path(folder).mkdir(parents=True)

        add_text = add_scalar = flush = lambda *_: None

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert pretrain("run", "--track", "tensorboard") == 0
    assert Path("run/tensorboard").is_dir()


def test_a_device_that_is_not_there(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:77", "meta", "abacus"):
        assert f"device '{device}' cannot be used" in said(capsys, pretrain("run", "--device", device), 4)
    assert not Path("run").exists()


def test_no_data(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.jsonl").write_text("")
    assert "empty.jsonl" in said(capsys, pretrain("run", "--data", "empty.jsonl"), 3)
    assert "there is no data" in said(capsys, main(["train", "pretrain", "start", "--steps", "3", "--out", "run"]), 2)
    assert not Path("run").exists()


def test_rows_longer_than_the_context(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "context ends at 64" in said(
        capsys, main("train pretrain start --data rows.jsonl --steps 2 --length 65 --out run".split()), 2
    )


def test_a_model_without_its_soft_cap(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(Path("start/config.json").read_text()) | {"attn_logit_softcapping": None}
    Path("start/config.json").write_text(json.dumps(raw))
    assert "soft cap" in said(capsys, pretrain("run"), 2)


def test_more_than_the_memory_holds(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("cabochon.train.build.free_memory", lambda device: 1_000_000)
    err = said(capsys, pretrain("run"), 4)
    assert "does not fit the memory" in err and "--lora-rank" in err
    monkeypatch.setattr("cabochon.train.build.free_memory", lambda device: 10**9)
    tune = "train sft start --data rows.jsonl --length 32 --steps 2 --out run --lora-rank"
    err = said(capsys, main([*tune.split(), "100000"]), 4)
    assert "does not fit the memory" in err and "--lora-rank 16" in err
    assert "rank -3" in said(capsys, main([*tune.split(), "-3"]), 2)
    assert not Path("run").exists()


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_flags_for_adapters_without_one(work: Path, capsys: pytest.CaptureFixture[str], bits: str) -> None:
    sft = ["train", "sft", "start", "--data", "rows.jsonl", "--steps", "2", "--out", "run", "--frozen", bits]
    assert "--lora-rank" in said(capsys, main(sft), 2)
    assert main(["quantize", "start", "small", "--bits", bits[3:]]) == 0
    capsys.readouterr()
    assert said(
        capsys, main(["train", "sft", "small", *sft[3:-2], "--lora-rank", "2", "--rows", "2", "--length", "32"]), 2
    )


def test_a_teacher_is_needed_and_has_to_fit(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distill = ["train", "distill", "start", *FLAGS.split(), "--out", "run"]
    assert "needs one teacher" in said(capsys, main(distill), 2)
    other = dataclasses.replace(CONFIG, vocab_size=5000)
    init_folder(other, Path("other"), tokenizer_files=load_tokenizer(built_in()).files())
    assert "it knows 5000 ids" in said(capsys, main([*distill, "--teacher", "other"]), 2)
    assert "brings its own text" in said(capsys, main([*distill, "--teacher-logits", "stored"]), 2)
    given = ["train", "distill", "start", "--teacher-logits", "stored", "--held-out", "0.1", "--out", "run"]
    assert "--held-out alone" in said(capsys, main(given), 2)


def test_pairs_are_not_learnt_word_by_word(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "What is red?", "chosen": "A ruby.", "rejected": "A sapphire."}
    Path("pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 9)
    small = "--rows 2 --length 32 --steps 1 --out run".split()
    for given in (["--data", "pairs.jsonl"], ["--data", "rows.jsonl", "--eval-data", "pairs.jsonl"]):
        err = said(capsys, main(["train", "sft", "start", *given, *small]), 2)
        assert "a rejected answer" in err and "cabochon train dpo" in err
    assert not Path("run").exists()
    assert main(["train", "dpo", "start", "--data", "pairs.jsonl", *small]) == 0
    taught = ["train", "distill", "start", "--teacher", "start", "--data", "pairs.jsonl", *small[:-1], "taught"]
    assert main(taught) == 0  # what a teacher thinks of a wrong answer is worth knowing


def test_a_mixture_without_an_end(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = "train sft start --data rows.jsonl --data-weights 2 --out run".split()
    assert "no number of steps is given" in said(capsys, main(mixture), 2)


def test_an_adapter_is_no_model_to_train(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--data rows.jsonl --rows 2 --length 32 --steps 1 --out".split()
    assert main(["train", "sft", "start", *small, "adapter", "--lora-rank", "2"]) == 0
    capsys.readouterr()
    for command in (["sft", "adapter"], ["distill", "start", "--teacher", "adapter"]):
        err = said(capsys, main(["train", *command, *small, "run"]), 4)
        assert "it is an adapter" in err and "cabochon merge" in err


def test_answers_beyond_the_end_of_a_row(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("late.jsonl").write_text(json.dumps({"prompt": "ruby " * 40, "completion": "red"}) + "\n")
    err = said(capsys, main("train sft start --data late.jsonl --length 16 --steps 1 --out run".split()), 3)
    assert "nothing to learn is in its first 16 tokens" in err and "--length" in err
