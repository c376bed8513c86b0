"""Rewards: what the built-in ones give, and what becomes of functions that fail, hang or crash."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.answers import last_number
from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.data.miniature import arithmetic
from cabochon.train.reward_build import open_rewards
from cabochon.train.reward_config import RewardConfig
from cabochon.train.reward_process import FunctionScorer
from cabochon.train.reward_schema import check_schema, conforms
from cabochon.train.rewards import load_reward
from cabochon.train.scoring import Failure, Rewards, Sample, check_failures


def score(name: str, completion: str, **row: object) -> float:
    return load_reward(name)("?", completion, row)


# The built-in ones


def test_exact_agrees_with_the_corpus() -> None:
    draw = random.Random(0)
    for _ in range(300):
        problem, _ = arithmetic.draw(draw)
        right = score("exact", problem.working(), answer=problem.result)
        wrong = score("exact", problem.working(), answer=problem.result + 1)
        assert (right, wrong) == (1, 0) and arithmetic.is_correct(problem, problem.working())


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("So 3 + 4 = 7.", "7", 1), ("7 or 8", "7", 0), ("", "7", 0), ("It is 1,234.50", "#### 1234.5", 1),
        ("1, 2", "2", 1), ("-3", "3", 0), ("Paris.", "paris", 1), ("  The   Seine ", "the seine", 1),
        ("Paris", "Rome", 0), ("none", "7", 0), ("7.0", "7", 1),
    ],
)  # fmt: skip
def test_exact(completion: str, answer: str, right: float) -> None:
    assert score("exact", completion, answer=answer) == right
    assert score("exact:result", completion, result=answer) == right


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_last_number_of_any_way_to_write_it(whole: int, cents: int) -> None:
    text = f"first 5, then {whole:,}.{cents:02}."
    assert last_number(text) == last_number(f"{whole}.{cents:02}")
    assert float(last_number(text) or 0) == pytest.approx(float(f"{whole}.{cents:02}"))


def test_exact_without_an_answer_in_the_row() -> None:
    with pytest.raises(KeyError):
        score("exact", "7")


@pytest.mark.parametrize(
    ("completion", "right"), [("{}", 1), ("[1, ", 0), ("NaN", 0), ('ok: {"a": 1}', 0), ("[" * 10**5, 0)]
)
def test_json(completion: str, right: float) -> None:
    assert score("json", completion) == right


def test_length_and_format() -> None:
    assert [score("length:10", "x" * n) for n in (0, 10, 15, 20, 30)] == [1, 1, 0.5, 0, 0]
    assert score("format:So .* = -?[0-9]+\\.", "So 3\n+ 4 = 7.") == 1
    assert score("format:So", "So 7") == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[a-z]+$"},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1, "maxItems": 2},
        "kind": {"anyOf": [{"const": 1}, {"type": "boolean"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"name": "ann", "age": 3, "tags": ["a"], "kind": True}, True), ({"age": 3}, False), ([], False),
        ({"name": "a"}, False), ({"name": "abcde"}, False), ({"name": "A1"}, False), ({"name": 3}, False),
        ({"name": "ann", "age": 3.0}, True), ({"name": "ann", "age": 3.5}, False), ({"name": "ann", "age": None}, True),
        ({"name": "ann", "age": True}, False), ({"name": "ann", "age": -1}, False),
        ({"name": "ann", "age": 121}, False),
        ({"name": "ann", "tags": []}, False), ({"name": "ann", "tags": ["a", 1]}, True),
        ({"name": "ann", "tags": ["a", "a", "a"]}, False), ({"name": "ann", "tags": [True]}, False),
        ({"name": "ann", "kind": 1}, True), ({"name": "ann", "kind": 2}, False), ({"name": "ann", "other": 1}, False),
        ({"name": "ann", "age": math.inf}, False),
    ],
)  # fmt: skip
def test_schema(value: object, right: bool) -> None:
    check_schema(SCHEMA, "test")
    assert conforms(value, SCHEMA) is right


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"}, {"minimun": 3}, 3, {"properties": {"a": {"oneOf": []}}}, {"items": {"$ref": "#"}},
        {"properties": []}, {"type": {}}, {"required": 5}, {"required": [1]}, {"anyOf": {}}, {"enum": 1},
        {"pattern": "("}, {"pattern": 1}, {"minimum": "3"}, {"maxLength": -1}, {"minItems": True}, {"maxItems": 1.5},
    ],
)  # fmt: skip
def test_a_schema_that_is_not_understood_is_refused(schema: object) -> None:
    with pytest.raises(BadInput):
        check_schema(schema, "test")


# Names that lead nowhere


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("exct", UsageError, "did you mean exact?"), ("length:", UsageError, "length:200"),
        ("length:-1", UsageError, "length:200"), ("format:(", UsageError, "regular expression"),
        ("format:", UsageError, "has none"), ("json:no.json", MissingResource, "no.json"),
        ("no.py:f", MissingResource, "no such file"), ("what", UsageError, "--reward exact"),
        ("mine.py", UsageError, "mine.py:FUNCTION"),
    ],
)  # fmt: skip
def test_a_wrong_name(name: str, kind: type[CabochonError], says: str) -> None:
    with pytest.raises(kind, match=says):
        load_reward(name)
    with pytest.raises(kind, match=says):  # the same words through the process
        FunctionScorer(name, 5)


def test_a_wrong_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    with pytest.raises(BadInput, match="ModuleNotFoundError"):
        FunctionScorer(f"{broken}:f", 5)
    broken.write_text("raise SystemExit(3)")
    with pytest.raises(BadInput, match="SystemExit"):
        FunctionScorer(f"{broken}:f", 5)
    broken.write_text("import os; os._exit(3)")
    with pytest.raises(BadInput, match="does not come up"):
        FunctionScorer(f"{broken}:f", 5)
    broken.write_text("def good(p, c, r): return 1")
    with pytest.raises(BadInput, match=r":good"):
        FunctionScorer(f"{broken}:god", 5)


# Functions of the user's


FUNCTIONS = """
import os, time, sys

state = {"calls": 0}

def reward(prompt, completion, row):
    state["calls"] += 1
    print("noise on standard output", input if False else "")
    if completion == "raise": raise ValueError("oh no")
    if completion == "nan": return float("nan")
    if completion == "hang": time.sleep(100)
    if completion == "spin":
        while True: pass
    if completion == "exit": os._exit(7)
    if completion == "leave": sys.exit(7)
    if completion == "read": return len(sys.stdin.read())
    if completion == "none": return None
    return row["bonus"] + len(completion)
"""


@pytest.fixture
def functions(tmp_path: Path) -> Iterator[FunctionScorer]:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    scorer = FunctionScorer(f"{file}:reward", 0.5)
    yield scorer
    scorer.close()


def test_a_function_that_fails_costs_one_answer(functions: FunctionScorer) -> None:
    said = ["ab", "raise", "nan", "hang", "abc", "spin", "exit", "none", "read", "abcd", "leave", "ü\n\u2028"]
    found = functions([Sample("?", text, {"bonus": 1}) for text in said])
    by_name = dict(zip(said, found, strict=True))
    assert (by_name["ab"], by_name["abc"], by_name["abcd"], by_name["ü\n\u2028"]) == (3, 4, 5, 4)
    assert math.isnan(by_name["nan"]) and by_name["read"] == 0
    reasons = {text: score.reason for text, score in by_name.items() if isinstance(score, Failure)}
    assert reasons.keys() == {"raise", "hang", "spin", "exit", "none", "leave"}
    assert "oh no" in reasons["raise"] and "0.5 s" in reasons["hang"] and "crashed (7)" in reasons["exit"]
    assert reasons["none"] == "it gave None, which is no number"


def test_a_function_that_forks_and_hangs_holds_up_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, time\ndef reward(prompt, completion, row):\n    if completion == 'fork':\n"
        "        if not os.fork():\n            time.sleep(600)\n        time.sleep(600)\n    return 1.0\n"
    )
    scorer = FunctionScorer(f"{file}:reward", 0.5)
    failed, fine = scorer([Sample("?", "fork", {}), Sample("?", "ab", {})])
    assert isinstance(failed, Failure) and fine == 1
    scorer.close()


def test_rewards_are_added_with_their_weights_and_failures_left_out(functions: FunctionScorer, tmp_path: Path) -> None:
    rewards = Rewards({"mine": functions, "json": FunctionScorer("json", 5)}, (2.0, 0.5))
    row = {"bonus": 0}
    found = rewards([Sample("?", text, row) for text in ("[]", "abc", "raise", "nan")])
    assert [one.total for one in found] == [4.5, 6, None, None]
    assert found[0].parts == {"mine": 2, "json": 1} and found[2].parts == {"json": 0}
    assert "oh no" in found[2].reason and "nan" in found[3].reason
    assert rewards([]) == []
    rewards.close()


def test_the_limit_of_failures() -> None:
    check_failures(3, 3, "why")
    with pytest.raises(BadInput, match=r"4 answers got no reward(.|\n)*mine: why(.|\n)*--max-failed-rewards"):
        check_failures(4, 3, "mine: why")


def test_several_by_name(tmp_path: Path) -> None:
    config = RewardConfig(reward=("exact", "format:.*", "format:So.*"), reward_weights=(1, 0.5, 0.25))
    rewards = open_rewards(config, tmp_path, "cpu")
    (found,) = rewards([Sample("?", "So 7", {"answer": 7})])
    assert found.total == 1.75 and list(found.parts) == ["exact", "format", "format_3"]
    rewards.close()
    with pytest.raises(UsageError, match="no reward is named"):
        open_rewards(RewardConfig(), tmp_path, "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"reward": ("exact",), "reward_weights": (1, 2)}, {"reward": ("exact",), "reward_weights": (math.nan,)},
        {"reward": ("exact", "exact")}, {"reward_seconds": 0}, {"reward_seconds": 1e10}, {"max_failed_rewards": -1},
        {"judge_scale": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        RewardConfig(**wrong)  # type: ignore[arg-type]
