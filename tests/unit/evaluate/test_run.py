import importlib.util
import json

import pytest

import cabochon
from cabochon.base.errors import MissingResource, UsageError
from cabochon.evaluate import run as runs
from cabochon.evaluate.cache import open_store
from cabochon.evaluate.harness import Backend
from cabochon.evaluate.run import Options, Tasks, run

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_choice: choices
doc_to_target: {gold}
"""
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}


@pytest.fixture
def folder(tmp_path):
    """A folder of one sound task and four that are not."""
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "q": f"Question: What is the capital of {x}?\nAnswer:",
            "choices": [f"The capital of {x} is {z}." for z in (y, "Oslo", "Bern")],
            "gold": 0,
        }
        for x, y in CAPITALS.items()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {"kind": "multiple_choice", "text": "{{q}}", "gold": "gold", "data": data}
    files = {
        "sound": {},
        "no_prompt": {"text": "{{question}}"},
        "no_gold": {"gold": "answer"},
        "no_data": {"data": tmp_path / "none.jsonl"},
        "long": {"text": "{{'word ' * 3000}}{{q}}"},
    }
    for name, changes in files.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, **{**plain, **changes}))
    return tmp_path


@pytest.fixture(scope="module")
def lm():
    return cabochon.load(dtype="float32", device="cpu")


def evaluated(lm, folder, *names, store=None, done=lambda task, items: None, **options):
    files = [str(folder / f"{name}.yaml") for name in names]
    tasks = Tasks(files, Options(**options), folder / "cache")
    return run(Backend(lm, store), tasks, name="tiny", settings={}, done=done)


@pytest.fixture(autouse=True)
def no_task_files_of_the_harness(monkeypatch):
    """Thousands of them take seconds to read, and none is needed here."""
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__

    def init(self, **named):
        plain(self, **{**named, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", init)
    monkeypatch.setattr(runs, "offline_if_out_of_reach", lambda **_: None)


def test_what_cannot_be_run_is_said_and_the_rest_is_kept(lm, folder):
    kept = {}
    report = evaluated(lm, folder, "no_prompt", "no_gold", "no_data", "sound", done=kept.__setitem__)
    assert [failure.cause.split("'")[1] for failure in report.failures[:2]] == ["question", "answer"]
    assert "none.jsonl" in report.failures[2].cause
    assert {failure.exit_code for failure in report.failures} == {3}
    (result,) = [r for r in report.results if r.counts]
    assert (result.task, result.value, result.items) == ("sound", 1.0, 4)
    assert [item["target"] for item in kept["sound"]] == [0] * 4
    assert {type(score) for item in kept["sound"] for score in item["scores"].values()} <= {int, float}
    assert kept["sound"][0]["prompt"].endswith("France?\nAnswer:")
    assert kept["sound"][0]["choices"][1] == " The capital of France is Oslo."


def test_errors_of_ours_are_not_passed_off_as_the_tasks(lm, folder, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(Backend, "_score", broken)
    with pytest.raises(KeyError, match="a bug"):
        evaluated(lm, folder, "sound")


def test_long_items_lose_their_beginning_and_are_counted(lm, folder):
    report = evaluated(lm, folder, "long", "sound")
    assert {r.task: r.truncated for r in report.results} == {"long": 12, "sound": 0}


def test_a_limit_and_the_spread_over_formats(lm, folder):
    report = evaluated(lm, folder, "sound", limit=2, formats=3)
    assert report.results[0].items == 2
    (spread,) = report.spreads
    assert (spread.formats, spread.highest) == (3, 1.0)


class Stopping(Backend):
    """Stopped by the user after so many requests."""

    left = 5

    def _finished(self, keys, run, label):
        def some(numbers):
            for number, found in enumerate(run(numbers)):
                if number == self.left:
                    raise KeyboardInterrupt
                yield found

        return super()._finished(keys, some, label)


def test_an_interrupted_run_goes_on(lm, folder):
    tasks = Tasks([str(folder / "sound.yaml")], Options(), folder / "cache")
    with open_store(folder / "store", "m") as store:
        report = run(Stopping(lm, store), tasks, name="tiny", settings={})
    assert report.results == []
    assert "interrupted" in report.notes[0]
    with open_store(folder / "store", "m") as store:
        again = evaluated(lm, folder, "sound", store=store)
        assert store.reused == 5
    assert again.results == evaluated(lm, folder, "sound").results


def test_a_chat_with_a_model_that_has_no_turns(lm, folder, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "start_of_turn_id", None)
    report = evaluated(lm, folder, "sound", chat=True)
    assert report.results == []
    assert report.failures[0].what == "this model cannot chat"


def test_chats_are_asked_as_chats(lm, folder):
    kept = {}
    evaluated(lm, folder, "sound", chat=True, limit=1, done=kept.__setitem__)
    assert kept["sound"][0]["prompt"].startswith("<bos><start_of_turn>user\nQuestion: What is the capital of France?")


@pytest.mark.parametrize(("name", "close"), [("mimi", "mini"), ("gemma2-reprot", "gemma2-report")])
def test_an_unknown_task_has_near_names(folder, name, close):
    with pytest.raises(UsageError, match=f"no task named '{name}'") as error:
        Tasks([name], Options(), folder / "cache")
    assert close in error.value.hint


def test_an_unknown_task_among_others(lm, folder):
    tasks = Tasks([str(folder / "sound.yaml"), "sond"], Options(limit=1), folder / "cache")
    report = run(Backend(lm), tasks, name="tiny", settings={})
    assert [(f.task, f.what, f.exit_code) for f in report.failures] == [("sond", "no task named 'sond'", 2)]
    assert [r.task for r in report.results if r.counts] == ["sound"]


def test_folders_that_are_not_there(folder):
    for flag, options in {"data": {"data": folder / "no"}, "include": {"include": (folder, folder / "no")}}.items():
        with pytest.raises(MissingResource, match=f"--{flag} .*no cannot be read"):
            Tasks(["mini"], Options(**options), folder / "cache")


def test_a_task_that_needs_what_is_not_installed(lm, folder, monkeypatch):
    def lacks(name, message):
        def load(*_):
            raise ModuleNotFoundError(message, name=name)

        monkeypatch.setattr(Tasks, "load", load)
        (failure,) = evaluated(lm, folder, "sound").failures
        assert failure.exit_code == 4
        return failure.cause, failure.hint

    assert lacks("langdetect", "No module named 'langdetect'") == (
        "it needs langdetect, which is not installed",
        "pip install langdetect",
    )
    message = "`sympy` is required. please install via pip install lm-eval[math] or pip install -e .[math]"
    cause, hint = lacks(None, message)
    assert "`sympy` is required" in cause and hint == "pip install 'lm-eval[math]'"


def test_without_the_harness_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingResource) as error:
        Tasks(["mini"], Options(), folder / "cache")
    assert error.value.hint == "pip install 'cabochon[eval]'"


def test_the_mini_suite_runs_whole(lm, tmp_path_factory, monkeypatch):
    tasks = Tasks(["mini"], Options(limit=3), tmp_path_factory.mktemp("cache"))
    report = run(Backend(lm), tasks, name="tiny", settings={})
    assert report.failures == []
    counting = [r for r in report.results if r.counts]
    assert len(counting) == 7
    assert all(r.random is not None and r.majority is not None for r in counting)
    assert {r.task: r.shots for r in counting} == {
        **{f"mini_{name}": 5 for name in ("arithmetic", "facts", "completion", "pronouns")},
        **{f"mini_{name}": 0 for name in ("knock", "code", "prose")},
    }
    scores = {r.task: r.value for r in counting}
    assert scores["mini_facts"] == 1.0
    assert 0.5 < scores["mini_code"] < 3
