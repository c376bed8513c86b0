"""What is good about an answer, as plain functions of prompt, answer and row. Standard library and `base` only.

A reward is any function like

    def short(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        return float(len(completion) < 100)

`row` is what stands in the file of prompts, so that an expected answer can lie beside its question. The built-in ones
are named by text: `exact`, `exact:KEY`, `json`, `json:SCHEMA.json`, `length:CHARACTERS`, `format:REGEX`; one of the
user's own is `FILE.py:FUNCTION`. They run in a process of their own (`reward_process.py`).
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cabochon.base.answers import last_number
from cabochon.base.errors import BadInput, MissingResource, UsageError, nearest
from cabochon.train.reward_schema import check_schema, conforms

Row = Mapping[str, Any]
Reward = Callable[[str, str, Row], float]


def exact(prompt: str, completion: str, row: Row, key: str = "answer") -> float:
    """1 where the answer is the row's: the last number of both is the same, or, where the row has no number, the text.

    Raises `KeyError` when the row has nothing under the key.
    """
    wanted = str(row[key])
    number = last_number(wanted)
    if number is not None:
        return float(last_number(completion) == number)
    return float(_plain(completion) == _plain(wanted))


def valid_json(prompt: str, completion: str, row: Row, schema: Any = None) -> float:
    """1 where the answer is JSON, without words around it, and conforms to the schema if there is one."""
    try:
        value = json.loads(completion, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(schema is None or conforms(value, schema))


def length(prompt: str, completion: str, row: Row, limit: int) -> float:
    """1 up to so many characters, then down in a line to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(completion) / limit))


def pattern(prompt: str, completion: str, row: Row, expression: re.Pattern[str]) -> float:
    """1 where the whole answer matches a regular expression, in which the dot stands for line ends as well."""
    return float(expression.fullmatch(completion) is not None)


def load_reward(named: str) -> Reward:
    """The function that a text names. A user's file is run, as Python runs what it imports.

    Raises:
        UsageError: nothing has this name, or its option makes no sense.
        MissingResource, BadInput: the file is not there, cannot be imported or has no such function.
    """
    name, _, option = named.partition(":")
    if name in BUILT_IN:
        return BUILT_IN[name](option)
    path, _, function = named.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path).expanduser(), function)
    if named.endswith(".py"):
        raise UsageError(f"{named} is no reward", "it has functions, and none is named", f"--reward {named}:FUNCTION")
    close = nearest(name, BUILT_IN)
    raise UsageError(
        f"there is no reward {named!r}",
        "rewards are exact, json, length, format, model, judge, or FILE.py:FUNCTION",
        f"did you mean {close}?" if close else "name one of these: --reward exact",
    )


def _exact(option: str) -> Reward:
    return partial(exact, key=option) if option else exact


def _json(option: str) -> Reward:
    if not option:
        return valid_json
    try:
        schema = json.loads(Path(option).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingResource(f"{option} cannot be read", error.strerror or str(error), "check the path") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{option} is no schema", f"it is not JSON: {error}", "write a JSON schema into it") from None
    check_schema(schema, option)
    return partial(valid_json, schema=schema)


def _length(option: str) -> Reward:
    if not option.isdecimal() or int(option) < 1:
        raise UsageError("the reward length needs a number of characters", f"it has {option!r}", "--reward length:200")
    return partial(length, limit=int(option))


def _format(option: str) -> Reward:
    try:
        expression = re.compile(option, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        hint = "--reward 'format:So .* = -?[0-9]+\\.'"
        raise UsageError(f"{option!r} is no regular expression", str(error), hint) from None
    if not option:
        raise UsageError("the reward format needs a regular expression", "it has none", "--reward 'format:[0-9]+'")
    return partial(pattern, expression=expression)


BUILT_IN: Mapping[str, Callable[[str], Reward]] = {
    "exact": _exact,
    "json": _json,
    "length": _length,
    "format": _format,
}


def _from_file(path: Path, function: str) -> Reward:
    if not path.is_file():
        raise MissingResource(f"{path} cannot be read", "there is no such file", "check the path of the reward")
    spec = importlib.util.spec_from_file_location("user_rewards", path)
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # an exit as well
        cause = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path} cannot be imported", cause, f"try it: python {path}") from None
    found = getattr(module, function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise BadInput(
            f"{path} has no function {function!r}",
            f"it has {', '.join(known) or 'none'}",
            f"name it behind the file: --reward {path}:{nearest(function, known) or 'FUNCTION'}",
        )
    reward: Reward = found
    return reward


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
