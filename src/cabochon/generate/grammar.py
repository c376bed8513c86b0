"""What an answer may be asked to look like, and how that is said in the language of llguidance."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cabochon.base.errors import BadInput, UsageError
from cabochon.generate.schema import read_schema, refused

MAX_REGEX, MAX_CHOICE = 4096, 65_536  # characters; for expressions, time may grow with the square

# What models write: a space, or a line end with some indentation. Unbounded, weak models write blanks for ever.
_JSON_OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,20}", "lenient": False, "coerce_one_of": False}
_JSON_OR_TEXT = "start: TEXT | json\nTEXT: /(?s:[ \\n\\t]*[^{ \\n\\t].*)/\njson: %json "


@dataclass(frozen=True)
class Constraint:
    """What an answer has to be, in exactly one way. Raises `UsageError` for none, for two, and for empty choices.

    Attributes:
        json_schema: a JSON schema (draft 2020-12) as JSON text. Properties come in its order.
        regex: an expression for the whole answer (https://docs.rs/regex, no look-around); `\\d` means [0-9].
        choice: the texts of which the answer is one.
        or_text: beside the JSON of the schema, an object, allow any text whose first character is not its brace.
    """

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    or_text: bool = False

    def __post_init__(self) -> None:
        if (self.json_schema is not None) + (self.regex is not None) + bool(self.choice) != 1:
            raise UsageError(
                "the constraint is not clear",
                "it needs exactly one of a JSON schema, a regular expression and a choice of at least one text",
                "give one of the three",
            )
        if not isinstance(self.choice, tuple) or not all(isinstance(text, str) and text for text in self.choice):
            raise UsageError("the choice cannot be used", "it is not a list of texts, none empty", "correct the list")

    @classmethod
    def json(cls, schema: Any = None) -> "Constraint":
        """JSON that satisfies a schema (JSON text, a dict, or a pydantic model); without one, any JSON object.

        Raises `BadInput` for what JSON cannot say.
        """
        if schema is None:
            schema = {"type": "object"}
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        try:
            return cls(json_schema=schema if isinstance(schema, str) else json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            hint = "build it of dicts, lists, texts, numbers, true and null"
            raise refused(f"it cannot be written as JSON: {error}", hint) from None


@lru_cache(maxsize=128)
def grammar(constraint: Constraint) -> str:
    """A constraint in the language of llguidance. Raises `BadInput` for one that is too large, or a bad schema."""
    from llguidance import regex_to_lark

    if constraint.json_schema is not None:
        schema = {**read_schema(constraint.json_schema), "x-guidance": _JSON_OPTIONS}
        if constraint.or_text:
            return json.dumps({"grammars": [{"lark_grammar": f"{_JSON_OR_TEXT}{json.dumps(schema)}"}]})
        return json.dumps({"grammars": [{"json_schema": schema}]})
    pattern, limit = constraint.regex, MAX_REGEX
    if pattern is None:
        escaped = (re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text) for text in constraint.choice)
        pattern, limit = "|".join(escaped), MAX_CHOICE
    if len(pattern) > limit:
        raise unusable(constraint, f"it has more than {limit:,} characters")
    try:
        return json.dumps({"grammars": [{"lark_grammar": f"start: /{regex_to_lark(pattern, 'd')}/"}]})
    except UnicodeEncodeError:
        raise unusable(constraint, "it is not valid Unicode") from None


def unusable(constraint: Constraint, cause: str) -> BadInput:
    """The error for a constraint that nothing can be done with."""
    if constraint.json_schema is not None:
        return refused(cause[:200], "leave that part out, or say it in another way")
    if constraint.regex is not None:
        what = f"the regular expression {constraint.regex[:60]!r}"
        return BadInput(f"{what} cannot be used", cause[:200], "see https://docs.rs/regex#syntax, without look-around")
    return BadInput("the choice cannot be used", cause[:200], "offer other texts, or fewer of them")


def complaint(message: str) -> str:
    """What an error of llguidance comes down to: what its parser of expressions says last, or the first line."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    found = re.search(r"^error: (.+)|\(in regex\): (?!regex parse)(.+)", message, re.MULTILINE)
    return (found[1] or found[2]) if found else message.partition("\n")[0]
