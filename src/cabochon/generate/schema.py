"""What a JSON schema has to be before it is compiled: small, shallow, and true of some value that ends.

llguidance checks the rest. It trusts what stands here: a long chain of references overflows its stack and takes the
process along, a large `multipleOf` or a long pattern keeps it busy for minutes, and a value that has to contain
itself would be begun and never end.
"""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from cabochon.base.errors import BadInput

MAX_CHARACTERS = 65_536
MAX_LEVELS = 500  # of nesting, references followed; llguidance needs 8 MiB of stack for about 2,000
MAX_PATTERNS, MAX_PATTERN_CHARACTERS = 50, 4096  # of all patterns together; they are compared pair by pair
MAX_MULTIPLE = 100_000  # the least common multiple of every `multipleOf`: half a second

_DATA = {"const", "enum", "default", "example", "examples"}  # values, not schemas, whatever they look like
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # their keys are names, not keywords


def read_schema(text: str) -> dict[str, Any]:
    """The schema in a JSON text. Raises `BadInput` for one that is no JSON object, too large, too deep or endless."""
    if len(text) > MAX_CHARACTERS:
        raise refused(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}", "leave out what is not needed")
    try:
        schema = json.loads(text, parse_constant=_no_constant)
        if not isinstance(schema, dict):
            raise refused("it is JSON, but not an object", 'write something like {"type": "object"}')
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()  # no infinity (1e999), no half of a character
        nodes = _reachable(schema)
        _check_size(schema, nodes)
        if not _has_end(schema, nodes):
            raise refused("a value of it has to contain itself, without end", "make one of the steps optional")
    except RecursionError:
        raise refused(f"it has more than {MAX_LEVELS} levels", "nest it less deeply") from None
    except ValueError as error:
        raise refused(f"it is not JSON: {error}", "check it with: python -m json.tool") from None
    return schema


def refused(cause: str, hint: str) -> BadInput:
    """The error for a schema that is not used."""
    return BadInput("the JSON schema cannot be used", cause, hint)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _reachable(root: dict[str, Any]) -> list[dict[str, Any]]:
    """Every schema in the schema, each once, and whatever its references point at."""
    found: dict[int, dict[str, Any]] = {}
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and id(node) not in found:
            found[id(node)] = node
            waiting += _parts(node)
            if isinstance(node.get("$ref"), str):
                waiting.append(_follow(root, node["$ref"]))
    return list(found.values())


def _parts(node: dict[str, Any]) -> Iterator[Any]:
    for keyword, value in node.items():
        if isinstance(value, dict) and keyword in _NAMED:
            yield from value.values()
        elif isinstance(value, list) and keyword not in _DATA:
            yield from value
        elif keyword not in _DATA:
            yield value


def _follow(root: Any, reference: str) -> Any:
    """What a reference points at (a JSON pointer, RFC 6901)."""
    base, _, pointer = reference.partition("#")
    if base or (pointer and not pointer.startswith("/")):
        raise refused(f"it refers to {reference[:80]!r}, outside of itself", "refer to a part of it: #/$defs/name")
    node = root
    for step in unquote(pointer).split("/")[1:]:
        try:
            node = node[int(step)] if isinstance(node, list) else node[step.replace("~1", "/").replace("~0", "~")]
        except (KeyError, IndexError, ValueError, TypeError):
            raise refused(f"it refers to {reference[:80]!r}, where there is nothing", "correct the reference") from None
    return node


def _check_size(root: dict[str, Any], nodes: list[dict[str, Any]]) -> None:
    references = {node["$ref"] for node in nodes if isinstance(node.get("$ref"), str)}
    levels = _levels(root)  # no path is longer than this: it enters what a reference points at once
    for reference in references:
        levels += _levels(_follow(root, reference))
        if levels > MAX_LEVELS:
            raise RecursionError
    patterns = [node["pattern"] for node in nodes if isinstance(node.get("pattern"), str)]
    patterns += [pattern for node in nodes for pattern in _object(node.get("patternProperties"))]
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_PATTERN_CHARACTERS:
        limit = f"{MAX_PATTERNS} patterns or {MAX_PATTERN_CHARACTERS:,} characters in them"
        raise refused(f"it has more than {limit}", "use fewer or shorter ones")
    steps = [node["multipleOf"] for node in nodes if type(node.get("multipleOf")) in (int, float)]
    digits = (int("".join(map(str, Decimal(str(step)).as_tuple().digits))) for step in steps)
    if math.lcm(*digits) > MAX_MULTIPLE:
        raise refused(f"its multipleOf come to more than {MAX_MULTIPLE:,} together", "use rounder steps")


def _levels(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, children), default=0)


def _has_end(root: dict[str, Any], nodes: list[dict[str, Any]]) -> bool:
    """Whether some value of it does not contain another of its kind for ever: the least fixpoint, from below."""
    ended: set[int] = set()

    def ends(part: Any) -> bool:
        return not isinstance(part, dict) or id(part) in ended

    left = nodes[::-1]  # inner ones first
    while True:
        before = len(ended)
        for node in left:
            if all(map(ends, _needed(root, node))) and all(any(map(ends, among)) for among in _alternatives(node)):
                ended.add(id(node))
        left = [node for node in left if id(node) not in ended]
        if len(ended) == before:
            return id(root) in ended


def _alternatives(node: dict[str, Any]) -> list[list[Any]]:
    return [node[k] for k in ("anyOf", "oneOf") if isinstance(node.get(k), list)]


def _needed(root: dict[str, Any], node: dict[str, Any]) -> Iterator[Any]:
    """The schemas that a value satisfies besides, and those of the values that it cannot be without.

    Where no type is given, `required` is taken to mean an object and `minItems` an array.
    """
    if isinstance(node.get("$ref"), str):
        yield _follow(root, node["$ref"])
    yield from _list(node.get("allOf"))
    kind = node.get("type")
    if kind in ("object", ["object"], None):
        properties, others = _object(node.get("properties")), node.get("additionalProperties")
        others = None if "patternProperties" in node else others
        yield from (properties.get(name, others) for name in _list(node.get("required")) if isinstance(name, str))
        if not properties and _count(node.get("minProperties")):
            yield others
    if kind in ("array", ["array"], None):
        first, least = _list(node.get("prefixItems")) or _list(node.get("items")), _count(node.get("minItems"))
        yield from first[:least]
        if least > len(first):
            yield node.get("items")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value > 0 else 0
