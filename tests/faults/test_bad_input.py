"""Every kind of bad input through the real command: three lines, an exit code, no answer and no traceback."""

import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cabochon.cli.main import main
from cabochon.weights.hub import built_in

Breakage = Callable[[Path], None]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model that ships inside."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in built_in().iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Breakage:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return apply


def settings(**changes: object) -> Breakage:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def long_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def grown_shape(folder: Path) -> None:
    """The header says that a norm has twice the numbers that it has."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["shape"] = [384]
    raw = json.dumps(header).encode().ljust(size)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])


def twice(folder: Path) -> None:
    """A second shard brings a tensor again."""
    tensors = load_file(folder / "model.safetensors")
    save_file({EMBEDDING: tensors[EMBEDDING]}, folder / "more.safetensors")
    places = dict.fromkeys(tensors, "model.safetensors") | {EMBEDDING: "more.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    places = {name: place.replace("model.", "first.") for name, place in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    names = load_file(folder.parent / "elsewhere.safetensors")
    places = dict.fromkeys(names, "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][5] = float("nan")


BREAKAGES: dict[str, tuple[Breakage, int]] = {
    "missing tensor": (weights(lambda t: t.pop("model.layers.3.mlp.up_proj.weight")), 3),
    "unknown tensor": (weights(lambda t: t.update({"model.layers.0.extra": torch.zeros(1)})), 3),
    "wrong shape": (weights(lambda t: t.update({"model.norm.weight": torch.zeros(7)})), 3),
    "NaN weights": (weights(nan), 3),
    "another head": (weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})), 3),
    "tensor twice": (twice, 3),
    "truncated file": (cut, 3),
    "header without end": (long_header, 3),
    "header that lies": (grown_shape, 3),
    "index outside the folder": (outside, 3),
    "pickled weights": (pickled, 3),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 4),
    "no configuration": (lambda f: (f / "config.json").unlink(), 4),
    "another architecture": (settings(model_type="llama"), 3),
    "impossible sizes": (settings(num_key_value_heads=3), 3),
    "configuration is not JSON": (lambda f: (f / "config.json").write_bytes(b"{"), 3),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(b"{}"), 3),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 4),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_never_answers(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    breakage, expected = BREAKAGES[name]
    breakage(folder)
    code, out, errors = answer(capsys, "run", str(folder), "What is 1 + 1?")
    assert (code, out, len(errors)) == (expected, "", 3), errors
    assert [line.split(":")[0].strip() for line in errors] == ["error", "cause", "hint"]


def test_the_folder_is_sound_before_it_is_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = answer(capsys, "run", str(folder), "What is 1 + 1?", "--max-new-tokens", "4")
    assert (code, errors) == (0, []) and out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", ""], 3),
        (["run", " \n "], 3),
        (["run", "word " * 2000], 3),
        (["run", "--raw", "word " * 2000], 3),
        (["run", "hello", "--temperature", "-1"], 2),
        (["run", "no/such/folder/here", "hello"], 4),
        (["run", "google/gemma-2-2b-it", "hello", "--offline"], 4),
        (["show", "google/gemma-2-2b-it", "--offline"], 4),
        (["chat", "--device", "cuda:77"], 4),
    ],
    ids=str,
)
def test_bad_requests(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    expected: int,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, out, errors = answer(capsys, *arguments)
    assert (code, out, len(errors)) == (expected, "", 3), errors


@pytest.mark.parametrize("command", ["chat", "run"])
def test_input_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"hi \xff\n"), isatty=lambda: False))
    code, out, errors = answer(capsys, *([command, "-"] if command == "run" else [command]))
    assert (code, out, len(errors)) == (3, "", 3), errors
