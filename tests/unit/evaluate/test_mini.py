import json
import random
from collections import Counter

import pytest
import yaml

from cabochon.data import miniature
from cabochon.data.miniature import arithmetic, facts, jokes, source
from cabochon.evaluate import mini
from cabochon.evaluate.mini.baselines import baseline
from cabochon.evaluate.mini.leaks import leaking


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mini.ready(tmp_path_factory.mktemp("cache"))


def items(folder, name, split="test"):
    return [json.loads(line) for line in (folder / f"{name}.{split}.jsonl").read_text().splitlines()]


NAMES = ("arithmetic", "facts", "completion", "pronouns", "knock", "code", "prose")


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_hundreds_of_items_and_none_is_an_example(folder, name):
    test, train = items(folder, name), items(folder, name, "train")
    assert len(test) >= 250
    texts = {json.dumps(item, sort_keys=True) for item in test}
    assert len(texts) == len(test)
    assert texts.isdisjoint(json.dumps(item, sort_keys=True) for item in train)
    assert len(train) >= 8


def test_the_same_seed_gives_the_same_items(folder, tmp_path):
    mini.write(tmp_path / "again")
    for name in NAMES:
        assert items(folder, name) == items(tmp_path / "again", name)


def test_what_is_there_is_not_written_again(folder):
    before = (folder / mini.BASELINES).stat().st_mtime_ns
    assert mini.ready(folder.parent) == folder
    assert (folder / mini.BASELINES).stat().st_mtime_ns == before


def test_task_files_are_ordinary_and_find_their_data(folder):
    for file in folder.glob("mini_*.yaml"):
        text = file.read_text()
        assert "!function" not in text  # nothing of it is code
        for path in yaml.safe_load(text).get("dataset_kwargs", {}).get("data_files", {}).values():
            assert path.startswith(str(folder))
            assert open(path).read(1) == "{"  # noqa: PTH123, SIM115


def test_the_right_answers_are_right(folder):
    for item in items(folder, "arithmetic"):
        operation, a, b, _ = item["problem"]
        assert arithmetic.is_correct(arithmetic.Problem(operation, a, b), item["working"])
        assert item["working"].rstrip(".").endswith(item["result"])
    known = {fact.question: fact for fact in facts.held_out()}
    for item in items(folder, "facts"):
        right = [facts.is_correct(known[item["question"]], choice) for choice in item["choices"]]
        assert right[item["gold"]]
        assert len(set(item["choices"])) == 4
    for item in items(folder, "pronouns"):
        assert len(set(item["contexts"])) == 2


def test_golds_are_spread_evenly(folder):
    for name, ways in (("facts", 4), ("completion", 4), ("pronouns", 2)):
        golds = Counter(item["gold"] for item in items(folder, name))
        assert sorted(golds) == list(range(ways))
        assert max(golds.values()) < 1.3 * golds.total() / ways


def test_nothing_that_training_draws_is_asked(folder):
    """Thousands of documents and chats of training hold no question of the suite with its answer."""
    talks = miniature.conversations(5)
    said = {
        (talk[n]["content"], talk[n + 1]["content"])
        for talk in (next(talks) for _ in range(4000))
        for n in range(0, len(talk) - 1, 2)
    }
    asked = {(i["question"], i["working"]) for i in items(folder, "arithmetic")}
    asked |= {(i["question"], i["choices"][i["gold"]]) for i in items(folder, "facts")}
    assert said.isdisjoint(asked)
    assert len(said) > 4000


def known_problem():
    draw = random.Random(3)
    problem, way = arithmetic.draw(draw)
    return {"problem": [problem.operation, problem.a, problem.b, way]}


def known_fact():
    kind, pair = facts.FACTS[0]
    return {"fact": [kind.name, pair[0], 0]}


def known_text():
    return next(text for name, text in source.prose().items() if not source.is_held_out(name) and len(text) > 400)


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("arithmetic", known_problem()),
        ("facts", known_fact()),
        ("knock", {"said": "", "expected": [f"{jokes.made_up_name(random.Random(1)).capitalize()} who?"]}),
        ("prose", {"text": known_text()[:300]}),
        ("completion", {"begun": known_text()[:100], "choices": [known_text()[100:200]], "gold": 0}),
    ],
)
def test_a_leak_is_seen(folder, name, leak):
    test = items(folder, name)[:20]
    assert list(leaking(name, test, [])) == []
    assert list(leaking(name, [*test[:7], leak, *test[7:]], [])) == [7]
    assert list(leaking(name, test, test[3:4])) == [3]


def test_baselines():
    answers = [{"result": "1"}, {"result": "1"}, {"result": "2"}, {"result": "3"}]
    assert vars(baseline("arithmetic", [], answers)) == {"random": 1 / 3, "majority": 0.5}
    choices = [{"gold": gold, "choices": ["a", "b"]} for gold in (0, 1, 1, 1)]
    assert vars(baseline("facts", [], choices)) == {"random": 0.5, "majority": 0.75}
    turns = [{"expected": ["a", "b"]}, {"expected": ["b"]}]
    assert vars(baseline("knock", [], turns)) == {"random": 0.75, "majority": 1.0}
    text = baseline("code", [{"text": "ab" * 5000}], [{"text": "abab"}])
    assert text.random == 8
    assert text.majority == pytest.approx(1, abs=0.05)


def test_baselines_of_the_suite(folder):
    found = mini.read_baselines(folder)
    assert set(found) == {f"mini_{name}" for name in NAMES}
    assert found["mini_facts"].random == 0.25
    assert found["mini_pronouns"].random == 0.5
