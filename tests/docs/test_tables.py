"""Tables that repeat what the code says: fields with their defaults, exit codes, names and shapes of tensors."""

import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import Any

import pytest
import torch
from blocks import ROOT, table

import cabochon
from cabochon.base import errors
from cabochon.generate.engine import EngineConfig
from cabochon.generate.sampling import SamplingParams, TokenLogprob
from cabochon.lm import Completion, Score, Usage
from cabochon.model.attention import BACKENDS
from cabochon.model.config import Gemma2Config
from cabochon.model.proof import TOLERANCE, probes
from cabochon.weights.names import shapes, to_hf

PYTHON, NUMERICS, FORMATS = (ROOT / "docs" / f"{name}.md" for name in ("python", "numerics", "formats"))


def spelled(kind: Any) -> str:
    """A type as the tables write it, without the modules of its names."""
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return "`" + re.sub(r"[\w.]+[.]", "", name) + "`"


def written(default: Any) -> str:
    """A default as the tables write it; a field without one has an empty cell."""
    if default is MISSING or default is inspect.Parameter.empty:
        return ""
    return f"`{dict(default) if isinstance(default, dict) else default!r}`"


def default_of(f: "Field[Any]") -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


@pytest.mark.parametrize("kind", [Completion, Usage, Score], ids=lambda kind: kind.__name__)
def test_results(kind: type) -> None:
    rows = table(PYTHON, f"`{kind.__name__}`:", "field", "type", "meaning")
    assert {name: cells[0] for name, cells in rows.items()} == {f.name: spelled(f.type) for f in fields(kind)}
    assert list(rows) == [f.name for f in fields(kind)]


@pytest.mark.parametrize(
    ("kind", "section"),
    [(SamplingParams, "## How an answer"), (EngineConfig, "`EngineConfig`:"), (Gemma2Config, "## The parts alone")],
    ids=["sampling", "engine", "config"],
)
def test_settings(kind: type, section: str) -> None:
    rows = table(PYTHON, section, "field", "default", "meaning")
    assert {name: cells[0] for name, cells in rows.items()} == {f.name: written(default_of(f)) for f in fields(kind)}
    assert list(rows) == [f.name for f in fields(kind)]


def test_arguments_of_load() -> None:
    rows = table(PYTHON, "## Load", "argument", "default", "meaning")
    expected = {p.name: written(p.default) for p in inspect.signature(cabochon.load).parameters.values()}
    assert {name: cells[0] for name, cells in rows.items()} == expected


def test_errors_and_exit_codes() -> None:
    rows = table(PYTHON, "## Errors", "class, in `cabochon.base.errors`", "exit code", "when")
    assert {name: int(cells[0]) for name, cells in rows.items()} == {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.CabochonError)
    }


def test_fields_of_a_token_logprob() -> None:
    text = PYTHON.read_text(encoding="utf-8")
    (sentence,) = [line for line in text.splitlines() if line.startswith("A `TokenLogprob` has ")]
    assert all(f"`{f.name}`" in sentence for f in fields(TokenLogprob))


def test_tensors() -> None:
    rows = table(FORMATS, "## Tensor names", "here", "in a folder", "shape")
    config = Gemma2Config.preset("9b")
    letters = {"V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size,
               "N·H": config.num_heads * config.head_dim, "K·H": config.num_kv_heads * config.head_dim}  # fmt: skip
    first_layer = (item for item in shapes(config) if not item[0].startswith("layers.") or ".0." in item[0])
    real = {name: (to_hf(name), shape) for name, shape in first_layer}
    told = {
        name.format(i=0): (theirs.strip("`").format(i=0), tuple(letters[part] for part in shape.split(" × ")))
        for name, (theirs, shape) in rows.items()
    }
    assert told == real


def test_backends() -> None:
    rows = table(NUMERICS, "## Attention backends", "backend", "used for", "memory for scores")
    assert set(rows) == {*BACKENDS, "kernel"}


def test_probes_and_tolerances() -> None:
    told = table(NUMERICS, "## Attention backends", "probe", "what is crafted")
    assert list(told) == [probe.feature for probe in probes("cpu", torch.float32)]
    tolerances = table(NUMERICS, "## Attention backends", "dtype", "tolerance")
    assert {name: float(cells[0]) for name, cells in tolerances.items()} == {
        str(dtype).removeprefix("torch."): value for dtype, value in TOLERANCE.items()
    }


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_cache_sizes(size: str) -> None:
    """What everything everywhere would take follows from the configuration alone: two tensors of two bytes."""
    rows = table(NUMERICS, "## The hybrid cache", "one row of 8192 tokens, bfloat16", "all-global", "hybrid")
    c = Gemma2Config.preset(size)
    whole = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim * 8192
    assert rows[size] == [f"{whole // 2**20} MiB", f"{c.cache_bytes(8192) // 2**20} MiB"]
