import json

import pytest
from lm_eval.tasks import TaskManager

from cabochon.cli.main import main
from cabochon.evaluate.results import read_report


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    # Thousands of task files of the harness's own take seconds to read, and none is needed here.
    plain = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **named: plain(self, **named | {"include_defaults": False})
    )

    def go(*arguments):
        code = main(["eval", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return go


def test_a_run_is_printed_written_and_compared(run, tmp_path):
    code, out, _ = run("--tasks", "mini_facts,mini_code", "--limit", 4, "--out", tmp_path / "a")
    assert code == 0
    assert "facts" in out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"report.json", "report.md", "report.html", "items"}
    assert len((tmp_path / "a" / "items" / "mini_facts.jsonl").read_text().splitlines()) == 4
    code, out, _ = run(
        "--tasks", "mini_facts,mini_code", "--limit", 4, "--window", 8, "--out", tmp_path / "b", "--json"
    )
    assert code == 0
    assert json.loads(out)["settings"]["window"] == 8
    whole, short = (read_report(tmp_path / name).results for name in "ab")
    assert whole != short
    code, out, _ = run("--compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0
    first = json.loads(out)
    assert [one["task"] for one in first] == ["facts", "code"]
    assert first[1]["second"] > first[1]["first"]
    assert run("--compare", tmp_path / "a", tmp_path / "b")[1].count("│ code") == 1


def test_the_same_command_goes_on_with_what_is_known(run):
    run("--tasks", "mini_pronouns", "--limit", 3)
    _, out, _ = run("--tasks", "mini_pronouns", "--limit", 4, "--json")
    assert json.loads(out)["notes"] == ["6 requests were known from earlier runs"]
    _, out, _ = run("--tasks", "mini_pronouns", "--limit", 4, "--no-cache", "--json")
    assert json.loads(out)["notes"] == []


@pytest.mark.parametrize("flags", [["--bits", "8"], ["--bits", "4"], ["--softcap", "off"], ["--window", "16"]])
def test_ablations_are_other_models(run, flags):
    (plain, changed) = (
        json.loads(run("--tasks", "mini_prose", "--limit", 3, "--json", *more)[1])["results"][0]["value"]
        for more in ([], flags)
    )
    assert changed != plain
    assert changed == pytest.approx(plain, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "mini_fact"], "mini_facts"),
        (["--tasks", ","], "--tasks names none"),
        (["--limit", "0"], "--limit cannot be 0"),
        (["--shots", "-1"], "--shots cannot be -1"),
        (["--formats", "1"], "--formats cannot be 1"),
        (["--tasks", "mini_facts", "--window", "0"], "--window cannot be 0"),
        (["--tasks", "mini_facts", "--bits", "8", "--weights", "int4"], "--bits and --weights"),
    ],
)
def test_what_is_typed_wrong(run, arguments, told):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 3


def test_a_task_that_cannot_be_run_gives_the_exit_code(run, tmp_path):
    text = "task: lacking\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
    (tmp_path / "lacking.yaml").write_text(text + 'output_type: generate_until\ndoc_to_text: "x"\ndoc_to_target: "y"\n')
    code, _, err = run("--tasks", f"{tmp_path / 'lacking.yaml'}", "--no-cache")
    assert code == 3
    assert "error: the data of" in err
