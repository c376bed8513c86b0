"""What is written as TOML is read as what it was."""

import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.toml import toml_value

TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
ONE = TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)


@given(st.recursive(ONE, lambda inner: st.lists(inner, max_size=4), max_leaves=8))
def test_there_and_back(value: object) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}


@pytest.mark.parametrize(
    ("value", "read"),
    [(Path("a/b\x7f"), "a/b\x7f"), ((1, 2), [1, 2]), ("\U0001f600", "\U0001f600"), ([math.inf], [math.inf])],
)
def test_what_json_would_write_otherwise(value: object, read: object) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": read}
