"""A teacher's answers in a file: what is kept, what is left out, and going on after a kill."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cabochon
from cabochon.base.errors import BadInput, UsageError
from cabochon.cli.main import main
from cabochon.data import prompts
from cabochon.data.format import record_examples
from cabochon.data.records import Record
from cabochon.lm import LM
from cabochon.lm import synthesize as module
from cabochon.lm.best_of import Asked, BestOf
from cabochon.lm.synthesize import synthesize
from cabochon.text.chat import encode_chat


@pytest.fixture(scope="module")
def lm() -> LM:
    return cabochon.load(device="cpu", dtype="float32")


ROWS: list[Any] = [
    {"prompt": "What is 2 + 3?"},
    {"prompt": "What is the capital of France?"},
    {"messages": [{"role": "user", "content": "Knock knock."}, {"role": "assistant", "content": "forget this"}]},
    {"prompt": "What is 2 + 3?"},  # the same again
    {"text": "no prompt here"},
    {"prompt": "Knock knock."},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    return path


def lines(path: Path) -> list[list[str]]:
    return [[m["content"] for m in json.loads(line)["messages"]] for line in path.read_text().splitlines()]


def test_answers_are_those_of_a_chat(lm: LM, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = synthesize(lm, [str(rows)], out, batch=4)
    assert (done.read, done.written, done.repeated, done.unusable, done.unfinished) == (7, 3, 2, 2, 0)
    for question, answer in lines(out):
        assert answer == lm.chat([{"role": "user", "content": question}]).text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_answers_without_an_end_are_left_out(lm: LM, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is nothing to write"):
        synthesize(lm, [str(rows)], tmp_path / "out.jsonl", sampling={"max_new_tokens": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # so that the name is free for another try


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_goes_on_after_a_kill(
    lm: LM, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    sampling = {"temperature": temperature, "seed": 3, "max_new_tokens": 64}
    synthesize(lm, [str(rows)], tmp_path / "whole.jsonl", batch=2, sampling=sampling)
    noted, calls = module.atomic_write, []  # the first note comes before the first line

    def dying(path: Path) -> Any:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noted(path)

    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(module, "atomic_write", dying)
    with pytest.raises(KeyboardInterrupt):
        synthesize(lm, [str(rows)], out, batch=2, sampling=sampling)
    monkeypatch.setattr(module, "atomic_write", noted)
    with pytest.raises(UsageError, match="did not begin"):
        synthesize(lm, [str(rows)], out, batch=2, sampling=sampling | {"seed": 4})
    with pytest.raises(UsageError, match="did not begin"):
        synthesize(lm, [str(rows)], out, named="another", batch=2, sampling=sampling)
    done = synthesize(lm, [str(rows)], out, batch=2, sampling=sampling)
    assert done.read == 7
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_kill_before_the_first_note_of_answers(lm: LM, rows: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    synthesize(lm, [str(rows)], empty, batch=4)

    def dying(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(lm, [str(rows)], out, batch=4, report=dying)
    (note,) = tmp_path.glob(".out.jsonl.unfinished")
    noted = json.loads(note.read_text())
    note.write_text(json.dumps(noted | {"size": 0, "done": dict.fromkeys(noted["done"], 0)}))  # as it was before
    synthesize(lm, [str(rows)], out, batch=4)
    assert out.read_text() == empty.read_text()


def test_the_command(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["synthesize", "--data", str(rows), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out) and "left out: 2 repeated, 2 unusable" in told.err
    assert main(["synthesize", "--data", str(rows), "--out", str(out)]) == 2
    assert "did not begin" in capsys.readouterr().err


def by_length(asked: Sequence[Asked]) -> list[float | None]:
    """A reward that prefers short answers and knows nothing of those to some rows."""
    return [None if row.get("unknown") else -float(len(completion)) for _, completion, row in asked]


SUMS = [{"prompt": f"What is {i} + {i + 30}?"} for i in range(6)] + [{"prompt": "What is 7 + 7?", "unknown": True}]
DRAWN = {"temperature": 1.5, "seed": 1, "max_new_tokens": 60}


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return path


def test_the_best_of_several(lm: LM, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = synthesize(lm, [str(sums)], out, batch=7, sampling=DRAWN, best=BestOf(5, by_length))
    assert (done.read, done.unscored) == (7, 1) and done.written >= 5
    asked = [[{"role": "user", "content": str(row["prompt"])}] for row in SUMS]
    answers = lm.generate([encode_chat(lm.text_tokenizer, messages) for messages in asked], n=5, **DRAWN)
    for line in map(json.loads, out.read_text().splitlines()):
        number = [row["prompt"] for row in SUMS].index(line["messages"][0]["content"])
        whole = [one.text for one in answers[5 * number : 5 * number + 5] if one.finish_reason == "stop" and one.text]
        assert len(line["messages"][1]["content"]) == min(map(len, whole)) == -line["score"]


def test_pairs_are_preferences(lm: LM, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    done = synthesize(lm, [str(sums)], out, sampling=DRAWN, best=BestOf(5, by_length, pairs=True))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.written == len(lines) >= 4
    for line in lines:
        assert line["score_chosen"] == -len(line["chosen"][0]["content"]) > line["score_rejected"]
    record = Record("pairs:1", 0, lines[0], "row")
    pair = record_examples(lm.text_tokenizer, record, "preference", fold=False)
    prompt = encode_chat(lm.text_tokenizer, lines[0]["prompt"])
    for example in pair:
        assert example.ids[: len(prompt)] == prompt and not any(example.learned[: len(prompt)])


@pytest.mark.parametrize(
    ("scores", "pairs", "wanted"),
    [
        ([1.0, 3.0, 2.0], False, ["b"]),
        ([1.0, 3.0, None], True, ["b", "a"]),
        ([2.0, 2.0, 2.0], True, "undecided"),
        ([2.0, 2.0, 2.0], False, ["a"]),  # the first drawn
        ([None, 1.0, None], True, "undecided"),
        ([None, None, None], False, "unscored"),
    ],
)
def test_what_is_chosen(scores: list[float | None], pairs: bool, wanted: list[str] | str) -> None:
    row = BestOf(3, lambda _: [], pairs).row([{"role": "user", "content": "?"}], list(zip("abc", scores, strict=True)))
    if not isinstance(row, str):
        turns = [row["chosen"], row["rejected"]] if pairs else [row["messages"][1:]]
        row = [turn[0]["content"] for turn in turns]
    assert row == wanted


def test_pairs_go_on_after_a_kill(lm: LM, sums: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = dict(batch=2, sampling=DRAWN, best=BestOf(4, by_length, pairs=True, named="short"))
    synthesize(lm, [str(sums)], tmp_path / "whole.jsonl", **told)

    def dying(done: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(lm, [str(sums)], out, report=dying, **told)
    with pytest.raises(UsageError, match="did not begin"):
        synthesize(lm, [str(sums)], out, **told | {"best": BestOf(4, by_length, pairs=True, named="long")})
    synthesize(lm, [str(sums)], out, **told)
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text() != ""


def test_the_command_with_a_reward(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    asked = ["synthesize", "--data", str(sums), "--out", str(out), "--best-of", "8", "--pairs", "--seed", "2"]
    assert main([*asked, "--reward", "length:40", "--temperature", "1.2", "--max-new-tokens", "90"]) == 0
    assert all(row["score_chosen"] > row["score_rejected"] for row in map(json.loads, out.read_text().splitlines()))
    for changed, said in [
        (["--reward", "exact"], "at temperature 0"),
        (["--temperature", "1"], "nothing says which"),
        (["--reward", "exakt", "--temperature", "1"], "did you mean exact"),
    ]:
        assert main([*asked, *changed]) == 2 and said in capsys.readouterr().err
    assert main([*asked[:5], "--pairs"]) == 2 and "--best-of 8" in capsys.readouterr().err
    assert main([*asked[:5], "--batch", "0"]) == 2 and "--batch" in capsys.readouterr().err
    assert main([*asked[:3], "--out", "."]) == 2 and "it is a folder" in capsys.readouterr().err


def test_prompts_that_only_pass_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "open_source", lambda source, length: object())
    with pytest.raises(UsageError, match="read only once"):
        prompts.prompt_rows(["-"])
