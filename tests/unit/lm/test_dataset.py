"""Answers to a whole file of prompts, through the command."""

import json
from pathlib import Path
from typing import Any

import pytest

import cabochon
from cabochon.base.errors import UsageError
from cabochon.cli.main import main
from cabochon.lm import LM
from cabochon.lm.dataset import Dataset

PROMPTS: list[Any] = [
    {"prompt": "What is 2+3?"}, {"messages": [{"role": "user", "content": "Hello!"}]}, {"text": "no prompt"},
    {"prompt": "\ud800" + "x" * 9000}, {"prompt": "What is 4+4?"},
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for file in sorted(folder.glob("part-*")) for line in file.open()]


def test_every_prompt_has_a_line_and_a_run_goes_on(prompts: Path, tmp_path: Path, monkeypatch: Any) -> None:
    command = ["generate-dataset", str(prompts), str(tmp_path / "out"), "--size", "2", "--max-new-tokens", "60"]
    assert main(command) == 0
    found, lm = lines(tmp_path / "out"), cabochon.load()
    assert [line["index"] for line in found] == list(range(5))
    assert [line["finish_reason"] for line in found] == ["stop", "stop", None, None, "stop"]
    assert found[2]["messages"] == [] and found[3]["answer"] is None
    assert found[4]["answer"] == lm.chat([{"role": "user", "content": "What is 4+4?"}], max_new_tokens=60).text

    (tmp_path / "out" / "part-000001.jsonl").unlink()  # as if it had been killed before
    answered, answer = [], Dataset.answer
    monkeypatch.setattr(Dataset, "answer", lambda self, lm, part: (answered.append(part.file), answer(self, lm, part)))
    assert main(command) == 0
    assert answered == ["part-000001.jsonl"] and lines(tmp_path / "out") == found
    assert main(command) == 0 and len(answered) == 1


def test_a_folder_of_something_else_stays(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate-dataset", str(prompts), str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    Dataset(sources=[str(prompts)], out=str(tmp_path / "out"), size=2, sampling={}).missing()
    assert main(["generate-dataset", str(prompts), str(tmp_path / "out")]) == 2
    assert "other prompts or settings" in capsys.readouterr().err
    given = {"sources": [str(prompts)], "out": str(tmp_path / "out"), "size": 2, "sampling": {}}
    with pytest.raises(UsageError, match="another model"):
        Dataset(**given, model="another").missing()
    (tmp_path / "out" / "settings.json").write_text("{broken")
    with pytest.raises(UsageError, match="another model"):
        Dataset(**given).missing()
    assert main(["generate-dataset", str(prompts), str(tmp_path / "other"), "--size", "0"]) == 2


def test_sampled_answers_are_the_same_again(prompts: Path, tmp_path: Path) -> None:
    lm: LM = cabochon.load()
    found = []
    for name in ("a", "b"):
        sampling = {"temperature": 1.0, "seed": 5, "max_new_tokens": 8}
        dataset = Dataset(sources=[str(prompts)], out=str(tmp_path / name), size=2, sampling=sampling)
        for part in reversed(dataset.missing()):
            dataset.answer(lm, part)
        found.append(lines(tmp_path / name))
    assert found[0] == found[1]
