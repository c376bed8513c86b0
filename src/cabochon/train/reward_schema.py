"""Whether a value conforms to a JSON schema, for the keywords that answers of models are described with.

The order of keys does not matter, as in the standard (JSON Schema 2020-12, validation). A keyword that is not known
here is refused, since passing over it would reward what the schema forbids.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from cabochon.base.errors import BadInput

_NOTES = {"$schema", "$id", "title", "description", "default", "examples", "$comment"}
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
}


def check_schema(schema: Any, place: str) -> None:
    """Raise `BadInput` when a schema has something that `conforms` does not know."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _refused(place, "a schema is an object, true or false")
    for keyword, given in schema.items():
        if keyword not in _RULES and keyword not in _NOTES:
            raise _refused(place, f"the keyword {keyword!r} is not known")
        if keyword in _RULES and not _makes_sense(keyword, given):
            raise _refused(place, f"{keyword} cannot be {given!r}")
    inner = list(schema.get("properties", {}).values()) + list(schema.get("anyOf", []))
    inner += [schema[name] for name in ("items", "additionalProperties") if name in schema]
    for part in inner:
        check_schema(part, place)


def conforms(value: Any, schema: Any) -> bool:
    """Whether a JSON value is what a schema describes; the schema was checked."""
    if isinstance(schema, bool):
        return schema
    return all(_RULES[keyword](value, given, schema) for keyword, given in schema.items() if keyword in _RULES)


def _refused(place: str, cause: str) -> BadInput:
    known = ", ".join(sorted(_RULES))
    return BadInput(f"{place} cannot be used as a schema", cause, f"use {known}")


def _makes_sense(keyword: str, given: Any) -> bool:
    """Whether a known keyword has what the standard lets it have; schemas within it are not looked at."""
    match keyword:
        case "type":
            return all(isinstance(name, str) and name in _TYPES for name in _several(given))
        case "enum" | "anyOf":
            return isinstance(given, list) and bool(given)
        case "properties":
            return isinstance(given, dict)
        case "required":
            return isinstance(given, list) and all(isinstance(name, str) for name in given)
        case "minItems" | "maxItems" | "minLength" | "maxLength":
            return _TYPES["integer"](given) and given >= 0
        case "minimum" | "maximum":
            return _is_number(given)
        case "pattern":
            return isinstance(given, str) and _compiles(given)
    return True


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _several(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _properties(value: Any, given: Any, schema: Mapping[str, Any]) -> bool:
    return not isinstance(value, dict) or all(conforms(value[name], given[name]) for name in given if name in value)


def _others(value: Any, given: Any, schema: Mapping[str, Any]) -> bool:
    named = schema.get("properties", {})
    return not isinstance(value, dict) or all(conforms(value[name], given) for name in value if name not in named)


# keyword: value, what the keyword says, the whole schema -> whether the value conforms. Values of other types do.
_RULES: Mapping[str, Callable[[Any, Any, Mapping[str, Any]], bool]] = {
    "type": lambda value, given, _: any(_TYPES[name](value) for name in _several(given)),
    "enum": lambda value, given, _: any(_same(value, one) for one in given),
    "const": lambda value, given, _: _same(value, given),
    "anyOf": lambda value, given, _: any(conforms(value, one) for one in given),
    "properties": _properties,
    "additionalProperties": _others,
    "required": lambda value, given, _: not isinstance(value, dict) or set(given) <= set(value),
    "items": lambda value, given, _: not isinstance(value, list) or all(conforms(part, given) for part in value),
    "minItems": lambda value, given, _: not isinstance(value, list) or len(value) >= given,
    "maxItems": lambda value, given, _: not isinstance(value, list) or len(value) <= given,
    "minLength": lambda value, given, _: not isinstance(value, str) or len(value) >= given,
    "maxLength": lambda value, given, _: not isinstance(value, str) or len(value) <= given,
    "pattern": lambda value, given, _: not isinstance(value, str) or re.search(given, value) is not None,
    "minimum": lambda value, given, _: not _is_number(value) or value >= given,
    "maximum": lambda value, given, _: not _is_number(value) or value <= given,
}
