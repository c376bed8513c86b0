"""`--config FILE`: flags from a TOML file. What is typed comes first."""

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.config import Dict as Config

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.cli.usage import explain

__all__ = ["Config", "arguments_of", "read_config", "read_toml"]

FLAG = "--config"


def read_config(tokens: Sequence[str]) -> Config | None:
    """The values of the file that a command line names, or None when it names none.

    Raises:
        UsageError: the flag has no file behind it.
        MissingResource, BadInput: as `read_toml`; or it has tables, which no flag is.
    """
    path = _named(tokens)
    if path is None:
        return None
    values = read_toml(path)
    table = next((name for name, value in values.items() if isinstance(value, dict)), None)
    if table:
        raise BadInput(
            f"{path} has a table, [{table}]", "flags are not grouped", f"write the keys of [{table}] without it"
        )
    return _config(values, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a file. Raises `MissingResource` when it cannot be read, `BadInput` when it is not TOML."""
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path} is not TOML", str(error), 'lines look like  steps = 100  and  data = ["a.jsonl"]'
        ) from None


def arguments_of(function: Callable[..., Any], command: str, values: dict[str, Any], source: str) -> dict[str, Any]:
    """What a function would be called with if `values` were all flags of its command.

    Raises `UsageError` for a key that it does not know, a value that it cannot take, and what its arguments raise.
    """
    app = App(config=_config(values, source), print_error=False, exit_on_error=False)
    app.default(function)
    try:
        _, found, _ = app.parse_args([], print_error=False, exit_on_error=False)
    except CycloptsError as problem:
        problem.command_chain = command.split()
        raise explain(problem, ()) from None
    found.apply_defaults()
    return dict(found.arguments)


def _config(values: dict[str, Any], source: str) -> Config:
    return Config(values, source=source, use_commands_as_keys=False, allow_unknown=False)


def _named(tokens: Sequence[str]) -> Path | None:
    for place, token in enumerate(tokens):
        if token == "--":
            return None
        if token.startswith(f"{FLAG}="):
            return Path(token.partition("=")[2])
        if token == FLAG:
            if place + 1 == len(tokens):
                raise UsageError(f"{FLAG} names no file", "nothing stands behind it", f"{FLAG} run.toml")
            return Path(tokens[place + 1])
    return None
