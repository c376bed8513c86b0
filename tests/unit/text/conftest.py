"""The two golden tokenizers: the same pieces, read by two libraries."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer as Library

from cabochon.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "text"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """The script that made the golden files."""
    spec = importlib.util.spec_from_file_location("make_golden_text", GOLDEN / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library() -> Library:
    """The tokenizers library on its own, which sees control pieces in text."""
    return Library.from_file(str(GOLDEN / "tokenizer.json"))


@pytest.fixture(scope="session")
def from_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("json")
    shutil.copy(GOLDEN / "tokenizer.json", folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def from_model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name = "from_json" if request.param == "tokenizer.json" else "from_model"
    found: Tokenizer = request.getfixturevalue(name)
    return found
