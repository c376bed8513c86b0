"""Calls of functions: the schema that an answer is held to, and the call read out of its text as it comes."""

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from cabochon.base.errors import CabochonError
from cabochon.generate.grammar import Constraint
from cabochon.serve.errors import ApiError, spoken
from cabochon.serve.fields import Tool, ToolChoice

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]+)"\s*,\s*"arguments"\s*:\s*(?=\S)')


def usable_tools(tools: Sequence[Tool] | None, choice: str | ToolChoice | None) -> list[Tool]:
    """The tools that may be called. Raises `ApiError` for a choice that there is not."""
    if choice == "none" or not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: there are no tools", code="invalid_value", param="tool_choice")
        return []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two have the same name", code="invalid_value", param="tools")
    if isinstance(choice, ToolChoice):
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise ApiError(400, "tool_choice: there is no such tool", code="invalid_value", param="tool_choice")
        return chosen
    return list(tools)


def call_constraint(tools: Sequence[Tool], *, or_text: bool) -> Constraint:
    """An answer that is one call of one of the tools; with `or_text`, or any text that does not begin with a brace."""
    definitions, calls = {}, []
    for number, tool in enumerate(tools):
        inside = f"tool{number}"
        parameters = tool.function.parameters or {"type": "object"}
        try:
            definitions[inside] = _moved(parameters, f"#/$defs/{inside}")
        except RecursionError:
            raise ApiError(422, "tools: a schema is nested too deeply", code="unusable_constraint") from None
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/{inside}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    root = calls[0] if len(calls) == 1 else {"anyOf": calls}
    try:
        return Constraint(json_schema=json.dumps({**root, "$defs": definitions}), or_text=or_text)
    except (CabochonError, ValueError, RecursionError) as error:
        said = spoken(error) if isinstance(error, CabochonError) else "a schema cannot be used"
        raise ApiError(422, f"tools: {said}", code="unusable_constraint", param="tools") from None


def _moved(value: Any, to: str) -> Any:
    """A schema whose references to itself point to where it has been put."""
    if isinstance(value, list):
        return [_moved(item, to) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item, to) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = to + reference[1:]
    return moved


class CallReader:
    """Turns the text of an answer into what a chat message is made of: content, or the pieces of one call."""

    def __init__(self) -> None:
        self.called = False
        self._state, self._held = "undecided", ""

    def push(self, text: str) -> list[dict[str, Any]]:
        """More text: the deltas that are now certain."""
        self._held += text
        if self._state == "undecided" and self._held.strip():
            self._state = "head" if self._held.lstrip().startswith("{") else "text"
        if self._state == "head":
            return self._begin()
        if self._state == "call":
            return self._arguments()
        if self._state == "text":
            return self._content()
        return []

    def finish(self, whole: bool) -> list[dict[str, Any]]:
        """The end of the answer; `whole` unless it was cut off."""
        if self._state == "call":
            rest, self._held = self._held, ""
            if whole:  # behind the arguments stands the brace that closes the call
                rest = rest.rstrip().removesuffix("}").rstrip()
            return [_more(rest)] if rest else []
        return self._content()

    def _content(self) -> list[dict[str, Any]]:
        text, self._held = self._held, ""
        return [{"content": text}] if text else []

    def _begin(self) -> list[dict[str, Any]]:
        found = _HEAD.match(self._held)
        if not found:
            return []
        self._state, self.called, self._held = "call", True, self._held[found.end() :]
        function = {"name": found[1], "arguments": ""}
        call = {"index": 0, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        return [{"tool_calls": [call]}, *self._arguments()]

    def _arguments(self) -> list[dict[str, Any]]:
        # The last brace closes the call and not its arguments; it is known to be the last only at the end.
        certain = self._held.rstrip("} \n\t")
        self._held = self._held[len(certain) :]
        return [_more(certain)] if certain else []


def _more(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}
