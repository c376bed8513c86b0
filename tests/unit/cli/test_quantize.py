"""`cabochon quantize` and the flags that choose weights, through the real command."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cabochon.cli import quantize as command_module
from cabochon.data.pack import Batch
from cabochon.lm import quantize as lm_module
from cabochon.weights.folder import describe, load_model, save_model
from cabochon.weights.hub import built_in
from cabochon.weights.scheme import Scheme
from support import SMALL, random_ids, small_model

Command = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(small_model(SMALL), tmp_path / "m", dtype=torch.bfloat16)
    return tmp_path / "m"


@pytest.fixture
def with_tokenizer(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a tokenizer of another size, and calibration tokens that it can take."""
    shutil.copy(built_in() / "tokenizer.json", source)
    ids = random_ids(SMALL, 2, 20)
    monkeypatch.setattr(lm_module, "default_calibration", lambda *_: [Batch(ids, ids, torch.zeros_like(ids))])
    return source


def test_eight_bits(command: Command, source: Path, tmp_path: Path) -> None:
    result = command("quantize", str(source), str(tmp_path / "q"), "--bits", "8")
    assert (result.code, result.out) == (0, f"{tmp_path / 'q'}\n")
    assert "8 bits, groups of 128, rtn" in result.err
    assert load_model(tmp_path / "q").embedding.weight.dtype == torch.uint8


def test_json(command: Command, source: Path, tmp_path: Path) -> None:
    line = ("quantize", str(source), str(tmp_path / "q"), "--bits", "4", "--method", "rtn", "--group", "32", "--json")
    scheme = Scheme(4, 32)
    assert json.loads(command(*line).out) == {
        "folder": str(tmp_path / "q"), "bits": 4, "group": 32, "method": "rtn", "embedding_bits": 4,
        "bytes": scheme.nbytes(SMALL), "bytes_before": 2 * SMALL.num_parameters,
    }  # fmt: skip
    assert describe(tmp_path / "q").scheme == scheme


def test_four_bits_are_calibrated_and_take_the_tokenizer_along(
    command: Command, with_tokenizer: Path, tmp_path: Path
) -> None:
    result = command("quantize", str(with_tokenizer), str(tmp_path / "q"), "--bits", "4")
    assert result.code == 0, result.err
    assert describe(tmp_path / "q").scheme == Scheme(4, 64, "gptq", 8)
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (with_tokenizer / "tokenizer.json").read_bytes()


def test_texts_of_ones_own(
    command: Command, with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(lm_module, "quantize", lambda *_, texts, **__: given.extend(texts))
    for name, content in (("a.txt", "one"), ("b.txt", "zwei ä")):
        (tmp_path / name).write_text(content)
    arguments = [part for name in ("a.txt", "b.txt") for part in ("--text", str(tmp_path / name))]
    assert command("quantize", str(with_tokenizer), str(tmp_path / "q"), "--bits", "4", *arguments).code == 0
    assert given == ["one", "zwei ä"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--bits"),
        (["--bits", "3"], 2, "bits"),
        (["--bits", "8", "--group", "48"], 2, "group"),
        (["--bits", "8", "--method", "gptq"], 2, "8-bit weights are not calibrated"),
        (["--bits", "8", "--embedding-bits", "4"], 2, "embedding"),
        (["--bits", "8", "--text", "x.txt"], 2, "--text has no effect"),
        (["--bits", "4"], 4, "has no tokenizer"),
        (["--bits", "4", "--text", "no/such/file"], 4, "cannot be read"),
    ],
    ids=str,
)
def test_refusals(command: Command, source: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    result = command("quantize", str(source), str(tmp_path / "q"), *arguments)
    assert (result.code, result.out) == (code, "")
    assert said in result.err and "hint: " in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_text_that_is_too_short_or_none(command: Command, with_tokenizer: Path, tmp_path: Path) -> None:
    for content, said in ((b"short", "too short"), (b"\xff", "not UTF-8")):
        (tmp_path / "t.txt").write_bytes(content)
        arguments = (str(with_tokenizer), str(tmp_path / "q"), "--bits", "4", "--text", str(tmp_path / "t.txt"))
        result = command("quantize", *arguments)
        assert result.code == 3 and said in result.err


def test_targets_and_sources_that_cannot_be(command: Command, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", source):
        assert command("quantize", str(source), str(target), "--bits", "8").code == 2
    assert command("quantize", str(tmp_path / "none" / "x" / "y"), str(tmp_path / "q"), "--bits", "8").code == 4
    assert command("quantize", str(source), str(tmp_path / "q"), "--bits", "8").code == 0
    again = command("quantize", str(tmp_path / "q"), str(tmp_path / "r"), "--bits", "4", "--method", "rtn")
    assert again.code == 2 and "quantised already: 8 bits" in again.err
    assert command("quantize", str(source), str(tmp_path / "q"), "--bits", "8").code == 2
    assert command("quantize", str(source), str(tmp_path / "q"), "--bits", "8", "--overwrite").code == 0


def test_a_disk_that_is_too_small_is_seen_first(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr(command_module, "_quantize", lambda *_: pytest.fail("it was begun"))
    result = command("quantize", str(source), str(tmp_path / "q"), "--bits", "8")
    assert result.code == 4 and "does not fit on the disk" in result.err


# The flags of every command that loads a model


@pytest.mark.parametrize(
    ("arguments", "weights", "check"),
    [
        ([], "auto", True),
        (["--weights", "int4"], "int4", True),
        (["--weights", "bf16", "--ignore-memory"], "bf16", False),
    ],
    ids=str,
)
def test_flags_reach_the_loader(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], weights: str, check: bool
) -> None:
    given: dict[str, Any] = {}

    def load(**options: Any) -> None:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("cabochon.lm.load", load)
    command("run", "hi", *arguments)
    assert (given["weights"], given["check_memory"]) == (weights, check)


def test_unknown_weights(command: Command) -> None:
    result = command("run", "hi", "--weights", "int5")
    assert result.code == 2 and "--weights" in result.err


def test_show(command: Command, source: Path, tmp_path: Path) -> None:
    command("quantize", str(source), str(tmp_path / "q"), "--bits", "4", "--method", "rtn", "--group", "32")
    said = command("show", str(tmp_path / "q")).out
    assert "in 4 bits, groups of 32, rtn" in said
    told = json.loads(command("show", str(tmp_path / "q"), "--json").out)
    assert told["quantization"] == {"bits": 4, "group": 32, "method": "rtn", "embedding_bits": 4}
    assert told["weights_bytes"] == Scheme(4, 32).nbytes(SMALL)
    plain = json.loads(command("show", str(source), "--json").out)
    assert plain["quantization"] is None
    assert plain["weights_bytes_int8"] == Scheme(8).nbytes(SMALL)
    assert "in bfloat16, " in command("show", str(source)).out
