"""What can go wrong in a merge: bad inputs, a kill, a disk that fills up. Nothing half-written looks whole."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.base.files import resumable_folder, unfinished_bytes
from cabochon.cli.main import main
from cabochon.merge import execute, output
from cabochon.merge.parse import parse_config
from cabochon.merge.run import Merge
from cabochon.model.config import Gemma2Config
from cabochon.weights.folder import load_model
from cabochon.weights.init import init_folder

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=64, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=128,
    query_pre_attn_scalar=32,
)  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with two models, a and b, and a configuration."""
    for seed, name in enumerate("ab"):
        init_folder(CONFIG, tmp_path / name, dtype=torch.bfloat16, seed=seed, tokenizer=False)
    (tmp_path / "merge.yml").write_text(linear(tmp_path))
    return tmp_path


def linear(folder: Path, weights: tuple[float, float] = (0.25, 0.75), more: str = "") -> str:
    models = "".join(
        f"  - {{model: {folder / n}, parameters: {{weight: {w}}}}}\n" for n, w in zip("ab", weights, strict=True)
    )
    return f"models:\n{models}merge_method: linear\ndtype: bfloat16\n{more}"


def merged(text: str, out: Path, **settings: int) -> None:
    Merge.prepare(parse_config(text)).write(out, **settings)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work: Path, place: str, **settings: bool) -> None:
    """A merge whose process is killed as soon as it has renamed something to the name `place`, for good or for now."""
    script = f"""
import os, re, signal
from pathlib import Path
from cabochon.merge.parse import read_config
from cabochon.merge.run import Merge
rename = Path.replace
def renamed(path, target):
    rename(path, target)
    if re.fullmatch({place!r}, Path(target).name):
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = renamed
Merge.prepare(read_config(Path("merge.yml"))).write(Path("out"), **{settings!r})
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=work).returncode == -signal.SIGKILL


def test_a_kill_between_the_last_two_steps_leaves_a_finished_folder(work: Path) -> None:
    merged(linear(work), work / "whole")
    killed(work, "out")
    assert names(work / "out") == names(work / "whole")
    assert (work / "out/model.safetensors").read_bytes() == (work / "whole/model.safetensors").read_bytes()
    assert names(work) == [".out.unfinished", "a", "b", "merge.yml", "out", "whole"]
    assert unfinished_bytes(work / "out") == 0
    with pytest.raises(UsageError, match="was not written"):  # it is there, and the next look tidies up
        merged(linear(work), work / "out")
    assert names(work) == ["a", "b", "merge.yml", "out", "whole"]


def test_a_kill_while_a_model_is_replaced_loses_neither(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(linear(work, (1.0, 0.0)), work / "out")
    killed(work, r"\.out\..*\.partial", overwrite=True)
    (old,) = work.glob(".out.*.partial")
    assert not (work / "out").exists() and load_model(old).config == CONFIG
    monkeypatch.setattr(execute, "merge", None)  # all is done: nothing is merged again
    merged(linear(work), work / "out", overwrite=True)
    assert names(work) == ["a", "b", "merge.yml", "out"]
    assert "weight: 0.25" in (work / "out/mergekit_config.yml").read_text()


def test_killed_again_and_again_it_ends_with_the_same_bytes(work: Path) -> None:
    merged(linear(work), work / "whole")
    slow = (
        "import sys, time; from pathlib import Path; from cabochon.merge import execute, output;"
        "from cabochon.merge.parse import read_config; from cabochon.merge.run import Merge;"
        "output.COMMIT_BYTES, output.SEGMENT = 1, 4096; merge_stage = execute._merge_stage;"
        "execute._merge_stage = lambda *a: (time.sleep(0.02), merge_stage(*a));"
        "Merge.prepare(read_config(Path('merge.yml'))).write(Path('out'))"
    )
    kills = 0
    while not (work / "out").exists():
        process = subprocess.Popen([sys.executable, "-c", slow], cwd=work)
        deadline = time.monotonic() + 60
        notes = work / ".out.unfinished" / "done"
        size = notes.stat().st_size if notes.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if notes.exists() and notes.stat().st_size > size + 1300:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills >= 2
    assert names(work) == ["a", "b", "merge.yml", "out", "whole"]
    assert (work / "out/model.safetensors").read_bytes() == (work / "whole/model.safetensors").read_bytes()


def test_what_was_noted_is_not_done_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real = execute.merge

    def failing(method, whole, settings, out, **more):
        if len(done) == 40:
            raise OSError(28, "No space left on device")
        done.append(whole.names[0])
        real(method, whole, settings, out, **more)

    monkeypatch.setattr(execute, "merge", failing)
    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(output, "SEGMENT", 4096)
    with pytest.raises(MissingResource, match="No space left"):
        merged(linear(work), work / "out")
    assert not (work / "out").exists() and unfinished_bytes(work / "out") > 0
    first, done[:] = list(done), []
    monkeypatch.setattr(execute, "merge", lambda *a, **k: (done.append(a[1].names[0]), real(*a, **k)))
    merged(linear(work), work / "out")
    assert len(first) + len(done) == 2 + 11 * CONFIG.num_layers and not set(first) & set(done)
    merged(linear(work), work / "again")
    assert (work / "out/model.safetensors").read_bytes() == (work / "again/model.safetensors").read_bytes()


def test_another_configuration_begins_anew(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execute, "write_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merged(linear(work), work / "out")
    merged(linear(work, (1.0, 0.0)), work / "out")
    a, out = load_model(work / "a").state_dict(), load_model(work / "out").state_dict()
    assert all(torch.equal(a[name], out[name]) for name in a)


def test_values_that_are_not_finite_are_named(work: Path) -> None:
    tensors = load_file(work / "b/model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, work / "b/model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput) as caught:
        merged(linear(work), work / "out")
    assert "model.layers.3.mlp.up_proj.weight" in caught.value.what and "b/model.safetensors" in caught.value.what
    assert "NaN" in caught.value.cause
    assert names(work) == ["a", "b", "merge.yml"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_said_and_the_merge_goes_on_when_there_is_room(work: Path) -> None:
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(MissingResource, match="No space left"):
            merged(linear(work), disk / "out")
        assert not (disk / "out").exists() and unfinished_bytes(disk / "out") > 0
        subprocess.run(["mount", "-o", "remount,size=9000k", disk], check=True)
        merged(linear(work), disk / "out")
        assert load_model(disk / "out", check_memory=False).config == load_model(work / "a").config
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def changed(**values: int) -> Gemma2Config:
    return replace(CONFIG, **values)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(num_layers=4), "different depth"),
        (changed(hidden_size=32), "different architectures"),
        (changed(num_heads=4, num_kv_heads=2, head_dim=16), "different architectures"),
        (changed(query_pre_attn_scalar=16), "different architectures"),
        (changed(vocab_size=4097), "tokenizer_source"),
    ],
)
def test_models_that_do_not_go_together(work: Path, other: Gemma2Config, said: str) -> None:
    init_folder(other, work / "c", dtype=torch.bfloat16, tokenizer=False)
    text = linear(work).replace(str(work / "b"), str(work / "c"))
    with pytest.raises(BadInput) as caught:
        merged(text, work / "out")
    assert said in str(caught.value) and not (work / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (("merge_method: linear", "merge_method: linaer"), "did you mean linear?"),
        (("weight: 0.25", "wieght: 0.25"), "did you mean weight?"),
        (("parameters: {weight: 0.25}", "parameters: {}"), "weight"),
        (("weight: 0.25", "weight: -0.75"), "zero"),
        (("merge_method: linear", "merge_method: ties"), "base_model"),
        (("merge_method: linear", "merge_method: slerp"), "slerp"),
    ],
)
def test_configurations_that_cannot_be(work: Path, text: tuple[str, str], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        merged(linear(work).replace(*text), work / "out")
    assert said in str(caught.value) and not (work / "out").exists()


def test_a_density_outside_of_its_range(work: Path) -> None:
    text = linear(work).replace("linear", "ties").replace("weight: 0.75", "weight: 1, density: 1.5")
    with pytest.raises(BadInput, match="density"):
        merged(text + f"base_model: {work / 'a'}\n", work / "out")


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(work / "merge.yml"), "--dry-run"]) == 0
    assert "linear of 2 models" in capsys.readouterr().out and not (work / "out").exists()
    assert main(["merge", str(work / "merge.yml")]) == 2
    assert main(["merge", str(work / "nothing.yml"), str(work / "out")]) == 4
    assert main(["merge", str(work / "merge.yml"), str(work / "out")]) == 0
    assert load_model(work / "out").config == load_model(work / "a").config
    assert main(["merge", str(work / "merge.yml"), str(work / "out")]) == 2  # it is there
    assert main(["merge", str(work / "merge.yml"), str(work / "out"), "--overwrite"]) == 0
    card = (work / "out/README.md").read_text()
    assert "`linear`" in card and "weight: 0.25" in card and card.startswith("---\nlibrary_name")
    assert (work / "out/mergekit_config.yml").read_text() == linear(work)


def test_looking_at_a_merge(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = linear(work).replace("linear", "task_arithmetic") + f"base_model: {work / 'a'}\n"
    (work / "task.yml").write_text(text)
    assert main(["merge", str(work / "task.yml"), "--inspect", "--json", "--plot", str(work / "map.svg")]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == [str(work / "b")]
    assert (work / "map.svg").read_text().startswith("<svg")
    assert main(["merge", str(work / "merge.yml"), "--inspect"]) == 3  # no base
    assert main(["merge", str(work / "task.yml"), "--plot", str(work / "map.svg")]) == 2


def test_a_missing_shard(work: Path) -> None:
    merged(linear(work), work / "sharded", shard_bytes=200_000)
    text = linear(work).replace(str(work / "b"), str(work / "sharded"))
    merged(text, work / "fine")
    gone = sorted((work / "sharded").glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(MissingResource) as caught:
        merged(text, work / "out")
    assert gone.name in str(caught.value) and not (work / "out").exists()
    (work / "b/model.safetensors").unlink()
    with pytest.raises(MissingResource, match="no weights"):
        merged(linear(work), work / "out")


def test_a_folder_that_is_not_a_model_is_never_replaced(work: Path) -> None:
    (work / "home").mkdir()
    (work / "home/letter.txt").write_text("dear")
    with pytest.raises(UsageError):
        Merge.prepare(parse_config(linear(work))).write(work / "home", overwrite=True)
    assert (work / "home/letter.txt").exists()


def test_data_that_the_disk_lost_is_never_noted_as_done(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says once that writing failed; later calls for the same file succeed, and prove nothing."""
    calls: list[int] = []

    def forced(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(output, "COMMIT_BYTES", 1)
    monkeypatch.setattr(output, "SEGMENT", 4096)
    monkeypatch.setattr(output, "_force_data", forced)
    with pytest.raises(MissingResource, match="Input/output error"):
        merged(linear(work), work / "out")
    notes = (work / ".out.unfinished/done").read_text().splitlines()
    assert len(calls) == 5 and len(notes) == 2  # a call for the data and one for the note, each


def test_two_merges_to_one_place(work: Path) -> None:
    with resumable_folder(work / "out", "another"), pytest.raises(UsageError, match="another process is writing"):
        merged(linear(work), work / "out")


def test_other_tokenizers_are_another_merge(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real = execute.merge
    monkeypatch.setattr(execute, "merge", lambda *a, **k: (done.append(a[1].names[0]), real(*a, **k)))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execute, "write_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merged(linear(work), work / "out")
    done.clear()
    (work / "b/tokenizer_config.json").write_text("{}")
    merged(linear(work), work / "out")
    assert len(done) == 2 + 11 * CONFIG.num_layers


def test_a_damaged_tokenizer_configuration(work: Path) -> None:
    (work / "b/tokenizer_config.json").write_text('{"chat_template": ')
    with pytest.raises(BadInput, match="tokenizer_config"):
        merged(linear(work, more="chat_template: auto\n"), work / "out")
    assert not (work / "out").exists()


def test_a_sweep_that_is_killed_leaves_its_points_and_goes_on(work: Path) -> None:
    (work / "merge.yml").write_text(f"models: [{{model: {work}/b}}]\nbase_model: {work}/a\nmerge_method: liti\n")
    script = """
import os, signal, sys
from pathlib import Path
from cabochon.merge.axes import Axis
from cabochon.merge.parse import read_config
from cabochon.merge.run import Merge
from cabochon.merge.sweep import append_point, read_points, sweep
measured = 0
def evaluate(model):
    global measured
    measured += 1
    if measured == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"score": float(model.embedding.weight.detach().double().square().sum())}
work, points = Merge.prepare(read_config(Path("merge.yml"))), Path("points.jsonl")
known = read_points(points)
for point in sweep(work, [Axis("eta", (0.0, 0.25, 0.5, 1.0))], evaluate, measure="m", known=known):
    if point not in known:
        append_point(points, point)
print(measured)
"""

    def run(stop: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, str(stop)], cwd=work, capture_output=True, text=True)

    assert run(3).returncode == -signal.SIGKILL
    assert names(work) == ["a", "b", "merge.yml", "points.jsonl"]
    assert len((work / "points.jsonl").read_text().splitlines()) == 2
    assert run(0).stdout == "2\n" and len((work / "points.jsonl").read_text().splitlines()) == 4
    scores = [json.loads(line)["scores"]["score"] for line in (work / "points.jsonl").read_text().splitlines()]
    a, b = (float(load_model(work / n).embedding.weight.detach().double().square().sum()) for n in "ab")
    assert [scores[0], scores[-1]] == pytest.approx([a, b])
