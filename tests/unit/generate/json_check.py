"""Whether a value satisfies a JSON schema: the slow and obvious way, for the keywords that the tests use."""

import re
from typing import Any

ABOUT: dict[str, Any] = {
    **dict.fromkeys(["minimum", "maximum", "multipleOf"], int | float),
    **dict.fromkeys(["minLength", "maxLength", "pattern"], str),
    **dict.fromkeys(["items", "minItems", "maxItems"], list),
    **dict.fromkeys(["properties", "additionalProperties", "required"], dict),
}
TYPES = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def satisfies(value: Any, schema: Any, root: Any = None) -> bool:
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_holds(keyword, wanted, value, schema, root) for keyword, wanted in schema.items())


def has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: True is not 1."""
    return type(a) is type(b) and a == b


def _holds(keyword: str, wanted: Any, value: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, ABOUT.get(keyword, object)):
        return True  # a keyword says nothing about values of other types
    match keyword:
        case "type":
            return any(has_type(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted))
        case "const":
            return same(value, wanted)
        case "enum":
            return any(same(value, one) for one in wanted)
        case "anyOf":
            return any(satisfies(value, one, root) for one in wanted)
        case "allOf":
            return all(satisfies(value, one, root) for one in wanted)
        case "$ref":
            target = root
            for step in wanted.split("/")[1:]:
                target = target[step]
            return satisfies(value, target, root)
        case "minimum":
            return value >= wanted
        case "maximum":
            return value <= wanted
        case "multipleOf":
            return value % wanted == 0
        case "minLength":
            return len(value) >= wanted
        case "maxLength":
            return len(value) <= wanted
        case "pattern":
            return re.search(wanted, value) is not None
        case "items":
            return all(satisfies(item, wanted, root) for item in value)
        case "minItems":
            return len(value) >= wanted
        case "maxItems":
            return len(value) <= wanted
        case "properties":
            return all(satisfies(value[name], part, root) for name, part in wanted.items() if name in value)
        case "additionalProperties":
            others = value.keys() - schema.get("properties", {}).keys()
            return all(satisfies(value[name], wanted, root) for name in others)
        case "required":
            return set(wanted) <= value.keys()
        case "$defs":
            return True
    raise AssertionError(f"the check does not know {keyword}")
