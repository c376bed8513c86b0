"""Whatever logits say, a constrained answer is what was asked for, and a constraint without an answer is refused."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, CabochonError, UsageError
from cabochon.generate import constrain
from cabochon.generate.constrain import Constraint, Grammars, Matcher
from cabochon.generate.schema import MAX_CHARACTERS, MAX_LEVELS
from cabochon.recipe.tokenizer import build_tokenizer, save_tokenizer
from cabochon.text.tokenizer import Tokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from json_check import satisfies

GOLDEN = Path(__file__).parents[2] / "golden" / "text"
DOCUMENTS = ['{"name": "the red house", "year": 1987, "tags": ["a", "b"]}', "yes and no, the answer is\n  true"] * 20
SPARE = 13  # rows that the model has beyond its tokenizer
Complete = Callable[[str], bool]


class Setup:
    """A tokenizer with its grammars, and the tokens that never may come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, tokenizer.vocab_size + SPARE, tokenizer.stop_ids)
        size = self.grammars.vocab_size
        self.stops = sorted(tokenizer.stop_ids)
        self.bytes = [tokenizer.token_bytes(i) for i in range(size)]
        self.never = torch.tensor([not text and i not in self.stops for i, text in enumerate(self.bytes)])
        self.closing = torch.tensor([i in self.stops or set(t) <= set(b'"}]') for i, t in enumerate(self.bytes)])

    def spell(self, text: str) -> list[int]:
        """One token for each byte."""
        return [self.bytes.index(bytes([byte])) for byte in text.encode()]


@pytest.fixture(scope="module", params=["recipe", "tokenizer.json", "tokenizer.model"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "recipe":
        save_tokenizer(build_tokenizer(DOCUMENTS, 600), folder)
    else:
        if request.param == "tokenizer.model":
            pytest.importorskip("sentencepiece")
        shutil.copy(GOLDEN / request.param, folder)
    return Setup(load_tokenizer(folder))


def walk(setup: Setup, matcher: Matcher, seed: int, complete: Complete) -> str:
    """An answer drawn from random logits under the mask, checked at every step; closing gets likelier with time."""
    draw, text = torch.Generator().manual_seed(seed), b""
    for step in range(3000):
        mask = matcher.mask()
        assert mask.shape == (setup.grammars.vocab_size,) and mask.dtype == torch.bool and mask.any()
        assert not (mask & setup.never).any()
        stops = mask[setup.stops]
        assert stops.all() == stops.any() == is_complete(text, complete)
        if text:
            assert matcher.finished == (int(mask.sum()) == len(setup.stops) and bool(stops.all()))
        logits = 3 * torch.randn(len(mask), generator=draw) + setup.closing * max(0, step - 40) / 4
        chances = logits.masked_fill(~mask, -torch.inf).softmax(0)
        token = int(torch.multinomial(chances, 1, generator=draw))
        matcher.accept(token)
        if token in setup.stops:
            assert matcher.finished and matcher.mask().nonzero().flatten().tolist() == setup.stops
            return text.decode()
        text += setup.bytes[token]
    raise AssertionError(f"no end after {text!r}")


def is_complete(text: bytes, complete: Complete) -> bool:
    try:
        return complete(text.decode())
    except ValueError:  # half a character, or half a JSON text
        return False


def write(setup: Setup, matcher: Matcher, text: str) -> list[int]:
    """A text in the longest pieces that the mask allows."""
    tokens, left = [], text.encode()
    while left:
        allowed = [i for i in matcher.mask().nonzero().flatten().tolist() if setup.bytes[i]]
        token = max((i for i in allowed if left.startswith(setup.bytes[i])), key=lambda i: len(setup.bytes[i]))
        matcher.accept(token)
        tokens.append(token)
        left = left[len(setup.bytes[token]) :]
    return tokens


def tricky(minimum: int = 0, maximum: int = 8) -> st.SearchStrategy[str]:
    """Texts with what is special in JSON, in expressions, in tokenizers, and what no vocabulary has a piece for."""
    special = st.sampled_from([*'"\\/{}[]|().*+?^$#&~- \n\t\x00\x7f\u2581\u2028é漢👍', "<eos>", "the ", "<0x41>"])
    return st.lists(special | st.characters(codec="utf-8"), min_size=minimum, max_size=maximum).map("".join)


# JSON


def bounded(kind: str, numbers: st.SearchStrategy[Any], low: str, high: str) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.tuples(numbers, numbers).map(sorted)
    return st.one_of(
        st.just({"type": kind}),
        pairs.map(lambda pair: {"type": kind, low: pair[0], high: pair[1]}),
    )


SMALL = st.integers(0, 3)
VALUES = st.none() | st.booleans() | st.integers(-99, 99) | tricky()
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}, {"type": "object"}]),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]+é$"}, {"type": "integer", "multipleOf": 7}]),
    bounded("integer", st.integers(-1000, 1000), "minimum", "maximum"),
    bounded("number", st.integers(-1000, 1000), "minimum", "maximum"),
    bounded("string", SMALL, "minLength", "maxLength"),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(bounded("array", SMALL, "minItems", "maxItems"), inner).map(lambda t: {**t[0], "items": t[1]})
    properties = st.dictionaries(tricky(), inner, max_size=3)
    objects = st.tuples(properties, st.randoms(), st.sampled_from([{}, {"additionalProperties": False}])).map(
        lambda t: {
            "type": "object",
            "properties": t[0],
            "required": [name for name in t[0] if t[1].random() < 0.6],
            **t[2],
        }
    )
    return arrays | objects | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})


SCHEMAS = st.recursive(LEAVES, larger, max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_json_satisfies_its_schema(setup: Setup, schema: dict[str, Any], seed: int) -> None:
    matcher = setup.grammars.compile(Constraint.json(schema))
    walk(setup, matcher, seed, lambda text: satisfies(json.loads(text), schema))


@pytest.mark.parametrize("seed", range(5))
def test_any_object(setup: Setup, seed: int) -> None:
    text = walk(setup, setup.grammars.compile(Constraint.json()), seed, lambda t: isinstance(json.loads(t), dict))
    assert text[0] == "{" and text[-1] == "}"


LIST = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["of"],
        }
    },
    "allOf": [{"$ref": "#/$defs/node"}],
}
MAYBE = {"type": ["object", "null"], "properties": {"of": {"$ref": "#"}}, "required": ["of"]}


@pytest.mark.parametrize("schema", [LIST, TREE, MAYBE], ids=["list", "tree", "maybe"])
@pytest.mark.parametrize("seed", range(3))
def test_schemas_that_contain_themselves_and_end(setup: Setup, schema: dict[str, Any], seed: int) -> None:
    matcher = setup.grammars.compile(Constraint.json(schema))
    walk(setup, matcher, seed, lambda text: satisfies(json.loads(text), schema))


def test_properties_come_in_the_order_of_the_schema(setup: Setup) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a", "b"]}
    matcher = setup.grammars.compile(Constraint.json(schema))
    for token in setup.spell('{"'):
        matcher.accept(token)
    assert {setup.bytes[i][:1] for i in matcher.mask().nonzero().flatten().tolist()} == {b"b"}


def test_blanks_have_an_end(setup: Setup) -> None:
    matcher, blank = setup.grammars.compile(Constraint.json()), setup.spell(" ")[0]
    for token in setup.spell("{\n" + 20 * " "):
        matcher.accept(token)
    allowed = {setup.bytes[i] for i in matcher.mask().nonzero().flatten().tolist()}
    assert b'"' in allowed and b"}" in allowed
    assert not any(text[:1].isspace() for text in allowed)
    with pytest.raises(BadInput):
        matcher.accept(blank)


def test_what_a_schema_may_be_given_as() -> None:
    class Model:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {"type": "null"}

    assert Constraint.json(Model) == Constraint.json({"type": "null"}) == Constraint(json_schema='{"type": "null"}')
    assert Constraint.json('{"b": 1, "a": 2}').json_schema == '{"b": 1, "a": 2}'
    assert len({Constraint.json(), Constraint.json({"type": "object"}), Constraint(regex="a")}) == 2


# Expressions and choices

NARROW = ["a", "[a-f]", r"\d", "(ab|cd)", "é", r"\.", "\u2581", "\n", "/", "👍", r"\\", " ", '"']
WIDE = ["[^x]", ".", "(?s:.)", r"[^\d]"]  # never without a bound: among so many tokens, the end might not come
PARTS = st.one_of(
    st.tuples(st.sampled_from(NARROW), st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}"])).map("".join),
    st.tuples(st.sampled_from(WIDE), st.sampled_from(["", "?", "{2}", "{1,3}"])).map("".join),
)
REGEXES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("".join), min_size=1, max_size=3).map("|".join)


@settings(deadline=None, max_examples=60)
@given(pattern=REGEXES, seed=st.integers(0, 2**32))
def test_text_matches_its_expression(setup: Setup, pattern: str, seed: int) -> None:
    matcher = setup.grammars.compile(Constraint(regex=pattern))
    walk(setup, matcher, seed, lambda text: re.fullmatch(pattern, text, re.ASCII) is not None)


@pytest.mark.parametrize(
    "pattern", [r"^\d{4}-\d\d$", r"\A(yes|no)\z", "(?i)straSSe", r"[a-z.]{1,9}@[a-z-]+\.(com|org)"]
)
def test_usual_expressions(setup: Setup, pattern: str) -> None:
    ours = pattern.replace(r"\z", r"\Z")
    for seed in range(3):
        walk(setup, setup.grammars.compile(Constraint(regex=pattern)), seed, lambda t: bool(re.fullmatch(ours, t)))


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(tricky(1), min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_the_answer_is_one_of_the_choice(setup: Setup, texts: list[str], seed: int) -> None:
    constraint = Constraint(choice=tuple(texts))
    assert walk(setup, setup.grammars.compile(constraint), seed, texts.__contains__) in texts
    for text in texts:
        matcher = setup.grammars.compile(constraint)
        write(setup, matcher, text)
        assert matcher.mask()[setup.stops].all()


def test_certain_text_comes_in_the_pieces_of_the_tokenizer(setup: Setup) -> None:
    text = "the red house and the answer 12"
    matcher = setup.grammars.compile(Constraint(choice=(text,)))
    tokens: list[int] = []
    while not matcher.finished:
        (token,) = matcher.mask().nonzero().flatten().tolist()
        matcher.accept(token)
        tokens.append(token)
    assert tokens == setup.tokenizer.encode(text, bos=False)


def test_certain_text_may_be_long(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_LOOK_AHEAD", 100)
    text = "".join(random.Random(0).choices("the red house\n", k=600))
    write(setup, setup.grammars.compile(Constraint(choice=(text,))), text)


# Moving about


@settings(deadline=None, max_examples=40)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_taking_back_restores_the_mask(setup: Setup, schema: dict[str, Any], seed: int) -> None:
    draw, matcher = random.Random(seed), setup.grammars.compile(Constraint.json(schema))
    masks, tokens = [matcher.mask()], []
    for _ in range(60):
        if draw.random() < 0.7:
            token = draw.choice(masks[-1].nonzero().flatten().tolist())
            matcher.accept(token)
            tokens.append(token)
            masks.append(matcher.mask())
        else:
            back = draw.randint(0, min(5, len(tokens)))
            matcher.rollback(back)
            del tokens[len(tokens) - back :], masks[len(masks) - back :]
            assert torch.equal(matcher.mask(), masks[-1])
    other = setup.grammars.compile(Constraint.json(schema))
    for token in tokens:
        other.accept(token)
    assert torch.equal(other.mask(), masks[-1])
    assert other.finished == matcher.finished


@pytest.mark.parametrize("text", ["ab", "abc"])  # more may follow, and nothing may
def test_taking_back_stop_tokens(setup: Setup, text: str) -> None:
    matcher = setup.grammars.compile(Constraint(choice=("ab", "abc")))
    masks = [matcher.mask()]
    tokens = write(setup, matcher, text)
    masks.append(matcher.mask())
    assert matcher.finished == (text == "abc")
    for stop in setup.stops:
        matcher.accept(stop)
    assert matcher.finished and int(matcher.mask().sum()) == len(setup.stops)
    matcher.rollback(len(setup.stops))
    assert torch.equal(matcher.mask(), masks[1]) and matcher.finished == (text == "abc")
    matcher.accept(setup.stops[0])
    matcher.rollback(1 + len(tokens))
    assert torch.equal(matcher.mask(), masks[0]) and not matcher.finished


def test_a_copy_goes_its_own_way(setup: Setup) -> None:
    matcher = setup.grammars.compile(Constraint(choice=("yes", "no", "now")))
    copy = matcher.copy()
    write(setup, copy, "no")
    copy.accept(setup.stops[0])
    assert copy.finished and copy.copy().finished and not matcher.finished
    write(setup, matcher, "yes")


def test_a_token_that_may_not_come_changes_nothing(setup: Setup) -> None:
    matcher = setup.grammars.compile(Constraint(regex="[ab]{2}c*"))
    matcher.accept(setup.spell("a")[0])
    before = matcher.mask()
    never = setup.never.nonzero().flatten().tolist()
    for token in [*setup.stops, *setup.spell("xé"), never[0], never[-1]]:
        with pytest.raises(BadInput, match="may not come here"):
            matcher.accept(token)
    assert torch.equal(matcher.mask(), before)
    write(setup, matcher, "bc")
    matcher.accept(setup.stops[0])
    with pytest.raises(BadInput, match="may not come here"):
        matcher.accept(setup.spell("c")[0])


def test_a_stop_token_is_no_text(setup: Setup) -> None:
    """A model may be told to stop at a piece that spells something; another piece spells it then."""
    (stop,) = setup.tokenizer.encode("1", bos=False)
    (other,) = (i for i, text in enumerate(setup.bytes) if text == b"1" and i != stop)
    grammars = Grammars(setup.tokenizer, setup.tokenizer.vocab_size, frozenset({stop}))
    matcher = grammars.compile(Constraint(choice=("11",)))
    for _ in range(2):
        assert matcher.mask().nonzero().flatten().tolist() == [other]
        matcher.accept(other)
    assert matcher.mask().nonzero().flatten().tolist() == [stop]


# What is refused


def chain(length: int) -> dict[str, Any]:
    """Definitions that each need the next, in the way that costs llguidance most stack."""
    link = {f"d{i}": {"type": "object", "properties": {"a": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]}}}
            for i in range(length)}  # fmt: skip
    return {"$defs": {**link, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def selves(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"c": {"$ref": "#"}}} | more


BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"type": ', "not JSON"),
    "NaN": ('{"minimum": NaN}', "NaN is no number"),
    "infinity": ('{"minimum": 1e999}', "not JSON"),
    "no object": ("true", "not an object"),
    "type": ({"type": "strin"}, "Invalid type: strin"),
    "keyword": ({"not": {}}, "not"),
    "ignoring a keyword": ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "impossible": ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum (3) is greater"),
    "no value": ({"enum": []}, "empty"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "format": ({"type": "string", "format": "nonsense"}, "format"),
    "surrogate": ('{"const": "\\ud800"}', "surrogates"),
    "deep": ('{"items": ' * 2000 + "{}" + "}" * 2000, f"{MAX_LEVELS} levels"),
    "deeper": ('{"items": ' * 9000 + "{}" + "}" * 9000, "characters"),
    "deep by reference": (chain(300), f"{MAX_LEVELS} levels"),
    "large": ({"enum": ["x" * MAX_CHARACTERS]}, "characters"),
    "nowhere": ({"$ref": "#/$defs/a"}, "where there is nothing"),
    "elsewhere": ({"$ref": "https://example.com/schema"}, "outside of itself"),
    "many patterns": ({"patternProperties": {f"^a{i}$": {} for i in range(60)}}, "patterns"),
    "long pattern": ({"type": "string", "pattern": "a?" * 3000}, "patterns"),
    "multiple": ({"type": "integer", "multipleOf": 1000003}, "multipleOf"),
    "multiples": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 10.09}]}, "multipleOf"),
    "itself": ({"$ref": "#"}, "without end"),
    "each other": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                   "without end"),
    "in all": ({"allOf": [{"$ref": "#"}]}, "without end"),
    "in any": ({"anyOf": [{"$ref": "#"}, selves(required=["c"])]}, "without end"),
    "as a property": (selves(required=["c"]), "without end"),
    "as any property": ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "without end"),
    "as another property": ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]},
                            "without end"),
    "as an item": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "without end"),
    "as the first item": ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "without end"),
    "in parts": ({"allOf": [{"type": "object"}, {"properties": {"c": {"$ref": "#"}}, "required": ["c"]}]},
                 "without end"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_bad_schemas(setup: Setup, name: str) -> None:
    schema, cause = BAD_SCHEMAS[name]
    with pytest.raises(BadInput) as caught:
        setup.grammars.compile(Constraint.json(schema))
    assert cause in caught.value.cause
    assert caught.value.what == "the JSON schema cannot be used" and caught.value.hint


GOOD_SCHEMAS: dict[str, Any] = {
    "references as data": {"enum": [{"$ref": "nowhere"}, 1], "default": {"$ref": "x"}},
    "properties named as keywords": {
        "type": "object",
        "properties": {"$ref": {"type": "null"}, "enum": {"const": 1}, "pattern": {"type": "null"}},
        "required": ["$ref", "enum", "pattern"],
        "additionalProperties": False,
    },
    "optional": selves(additionalProperties=False),
    "an escaped pointer": {"$defs": {"a/b ~": {"const": 5}}, "$ref": "#/$defs/a~1b%20~0"},
    "a chain": chain(40),
    "a pattern that goes first": {
        "type": "object",
        "patternProperties": {"^a$": {"type": "null"}},
        "additionalProperties": {"$ref": "#"},
        "required": ["a"],
    },
    "no items": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "one way out": selves(required=["c"], properties={"c": {"anyOf": [{"$ref": "#"}, {"const": 1}]}}),
}


@pytest.mark.parametrize("name", GOOD_SCHEMAS)
def test_good_schemas(setup: Setup, name: str) -> None:
    walk(setup, setup.grammars.compile(Constraint.json(GOOD_SCHEMAS[name])), 0, is_json)


def is_json(text: str) -> bool:
    json.loads(text)
    return True


@pytest.mark.parametrize(
    ("constraint", "cause"),
    [
        (Constraint(regex="(a"), "unclosed group"),
        (Constraint(regex="(?=a)b"), "look-around"),
        (Constraint(regex=r"\bfoo"), "lookarounds"),
        (Constraint(regex=r"(a)\1"), "backreferences"),
        (Constraint(regex=""), "only an empty answer"),
        (Constraint(regex="a{0}"), "only an empty answer"),
        (Constraint(regex=r"[^\x00-\x{10FFFF}]"), "no text"),
        (Constraint(regex="a" * 5000), "characters"),
        (Constraint(regex="\ud800"), "Unicode"),
        (Constraint(choice=("a", "\ud800")), "Unicode"),
        (Constraint(choice=("a" * 40_000, "b" * 40_000)), "characters"),
    ],
)
def test_bad_expressions_and_choices(setup: Setup, constraint: Constraint, cause: str) -> None:
    with pytest.raises(BadInput) as caught:
        setup.grammars.compile(constraint)
    assert cause in caught.value.cause
    assert "cannot be used" in caught.value.what and str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    "arguments",
    [{}, {"choice": ()}, {"regex": "a", "choice": ("a",)}, {"regex": "a", "json_schema": "{}"}, {"choice": ("a", "")},
     {"choice": "ab"}, {"choice": ["ab"]}, {"choice": (1,)}],
)  # fmt: skip
def test_unclear_constraints(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Constraint(**arguments)


@pytest.mark.parametrize("schema", [object(), {"minimum": {1, 2}}, b"{}"])
def test_what_is_no_schema(schema: Any) -> None:
    with pytest.raises(BadInput, match="written as JSON"):
        Constraint.json(schema)


def test_what_becomes_too_complicated(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_MAX_LEXER_STATES", 60)
    grammars = Grammars(setup.tokenizer, setup.tokenizer.vocab_size, setup.tokenizer.stop_ids)
    matcher = grammars.compile(Constraint(regex="(a|b)*a(a|b){20}"))
    with pytest.raises(BadInput, match="too many states"):
        for token in setup.spell("aababbbabaabababbbaa" * 10):
            assert matcher.mask()[token]
            matcher.accept(token)
    for again in (matcher.mask, lambda: matcher.accept(setup.stops[0])):
        with pytest.raises(BadInput, match="too many states"):
            again()


def test_a_vocabulary_without_some_byte(tmp_path: Path) -> None:
    content = json.loads((GOLDEN / "tokenizer.json").read_bytes())
    del content["model"]["vocab"]["<0xC3>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="no piece for the byte 0xC3"):
        Grammars(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)


def test_a_model_smaller_than_its_tokenizer(setup: Setup) -> None:
    with pytest.raises(CabochonError, match="does not fit"):
        Grammars(setup.tokenizer, setup.tokenizer.vocab_size - 1, setup.tokenizer.stop_ids)


def test_compiling_needs_no_torch() -> None:
    script = (
        "import sys; from pathlib import Path; from cabochon.generate.constrain import *;"
        "from cabochon.text.tokenizer import load_tokenizer; t = load_tokenizer(Path(sys.argv[1]));"
        "Grammars(t, t.vocab_size, t.stop_ids).compile(Constraint(regex='a')); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(GOLDEN)], capture_output=True, text=True, check=True)
    assert "llguidance" in done.stdout.split() and "torch" not in done.stdout.split()
