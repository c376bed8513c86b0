"""Quantising that is cut short leaves nothing, and a quantised folder that is broken never answers."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cabochon.base.errors import MissingResource
from cabochon.cli.main import main
from cabochon.weights import save as save_module
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.hub import built_in
from cabochon.weights.quantize import quantize_folder
from cabochon.weights.scheme import Scheme
from support import SMALL, small_model

# Quantises some tensors, says so, and waits to be killed.
HANG = """
import sys, time
from pathlib import Path
from cabochon.weights.quantize import quantize_folder
from cabochon.weights.scheme import Scheme

done = []

def report(count):
    done.append(count)
    if len(done) == 20:
        print("quantising", flush=True)
        time.sleep(600)

quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), Scheme(8), report=report, overwrite=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(small_model(SMALL), tmp_path / "m", dtype=torch.bfloat16)
    return tmp_path / "m"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, bits: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(MissingResource, match="No space left"):
            quantize_folder(source, disk / "q", Scheme(bits))
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_process_leaves_the_old_state_and_the_next_one_cleans_up(
    source: Path, tmp_path: Path, existing: bool
) -> None:
    target = tmp_path / "q"
    if existing:
        quantize_folder(source, target, Scheme(4))
    env = {**os.environ, "PYTHONPATH": str(Path(save_module.__file__).parents[2])}
    command = [sys.executable, "-c", HANG, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"quantising\n"
        process.kill()
    assert target.exists() == existing
    if existing:
        assert load_model(target).embedding.bits == 4  # type: ignore[union-attr]
    quantize_folder(source, target, Scheme(8), overwrite=existing)
    assert names(tmp_path) == ["m", "q"]
    assert load_model(target).embedding.bits == 8  # type: ignore[union-attr]


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, tmp_path / "q", Scheme(8), report=stop)
    assert names(tmp_path) == ["m"]


# Broken folders through the real command

SCALE = "model.layers.2.mlp.up_proj.weight_scale"
Breakage = Callable[[Path], None]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Breakage:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(held)
        save_file(held, file)

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def lying_header(folder: Path) -> None:
    """The header says that a scale has another shape of the same size."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header[SCALE]["shape"].reverse()
    raw = json.dumps(header).encode().ljust(size)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])


def method(name: object) -> Breakage:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        document = json.loads(file.read_text())
        document["quantization_config"]["quant_method"] = name
        file.write_text(json.dumps(document))

    return apply


BREAKAGES: dict[str, Breakage] = {
    "truncated": cut,
    "scale is NaN": tensors(lambda t: t[SCALE].view(-1)[3].fill_(float("nan"))),
    "scale missing": tensors(lambda t: t.pop(SCALE)),
    "scale twice as long": tensors(lambda t: t.update({SCALE: torch.cat([t[SCALE]] * 2)})),
    "scale in another dtype": tensors(lambda t: t.update({SCALE: t[SCALE].bfloat16()})),
    "header lies": lying_header,
    "made by another program": method("awq"),
    "made by nobody": method(None),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "q"
    files = {name: (built_in() / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    quantize_folder(built_in(), folder, Scheme(4), tokenizer_files=files)
    return folder


def answer(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, str, list[str]]:
    code = main(["run", str(folder), "What is 1 + 1?", "--max-new-tokens", "4"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_never_answers(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    BREAKAGES[name](folder)
    code, out, errors = answer(capsys, folder)
    assert (code, out) == (3, ""), errors
    assert [line.split(":")[0].strip() for line in errors] == ["error", "cause", "hint"]


def test_the_folder_is_sound_before_it_is_broken(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = answer(capsys, sound)
    assert (code, errors) == (0, []) and out
