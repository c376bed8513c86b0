"""Code and English prose that every Python brings along: its library's source, docstrings and help topics.

What a run reads depends on the Python that runs it, so a model card has to name the version.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo", "__pycache__",
             "ensurepip", "pydoc_data", "dist-packages"}  # fmt: skip
_LARGEST = 120_000  # characters; what is larger is mostly tables


@cache
def code_files() -> dict[str, str]:
    """Path inside the library -> source text, in order of path."""
    return {path: text for path, text in _library() if 200 < len(text) < _LARGEST}


def docstrings_of_long_files() -> list[str]:
    """Prose of files that `code_files` leaves out for their length: training never sees it."""
    return [doc for _, text in _library() if len(text) >= _LARGEST for doc in _docstrings(text)]


def _library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p.relative_to(root) for p in root.rglob("*.py")):
        if _LEFT_OUT & set(path.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            yield path.as_posix(), (root / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a few files of old encodings
            continue


@cache
def prose() -> dict[str, str]:
    """Name -> help topic or docstring of some length, in order of name."""
    from pydoc_data.topics import topics

    texts = {f"topic {name}": text for name, text in sorted(topics.items())}
    for path, text in code_files().items():
        texts |= {f"{path} {i}": doc for i, doc in enumerate(_docstrings(text))}
    return texts


def _docstrings(text: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 150 and ">>>" not in doc:
                yield doc


def is_held_out(name: str) -> bool:
    """Whether a file, with all its docstrings, or a topic is kept for measuring perplexity: 3% of them."""
    key = name if name.startswith("topic ") else name.split(" ")[0]
    return hashlib.sha256(key.encode()).digest()[0] < 8
