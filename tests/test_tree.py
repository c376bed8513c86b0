"""The shape of the source tree: arrows between folders, sizes, what may be imported, and what help costs.

Every check is a function from a folder to a list of complaints. It is run on the package, where the list has to
be empty, and on small broken trees, where it must not be.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cabochon.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cabochon"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OTHER_FRAMEWORKS = {"transformers", "trl", "mergekit", "peft", "accelerate"}
HEAVY = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "prompt_toolkit",
         "rich.markdown", "sentencepiece"}  # fmt: skip


# What a file imports


def files(source: Path) -> list[Path]:
    return sorted(source.rglob("*.py"))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path, source: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, wherever it stands, and of import_module with a constant."""
    package = [source.name, *file.relative_to(source).parts[:-1]]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            # `from package import name` may name a module: the longer form shows which part is meant.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            constants = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in constants)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


# The checks


def layers(architecture: Path) -> dict[str, int]:
    """Part to layer, from the table."""
    rows = re.findall(r"^\| (\d+) \| (\S+) \|", architecture.read_text(encoding="utf-8"), re.MULTILINE)
    return {part.replace("\\", ""): int(layer) for layer, part in rows}


def part_of(file: Path, source: Path) -> str:
    return file.relative_to(source).parts[0].removesuffix(".py")


def wrong_parts(source: Path, table: dict[str, int]) -> list[str]:
    found = {part_of(file, source) for file in files(source)}
    missing = [f"{part} is not in the table" for part in sorted(found - set(table))]
    return missing + [f"{part} is in the table but not in the tree" for part in sorted(set(table) - found)]


def wrong_arrows(source: Path, table: dict[str, int]) -> list[str]:
    complaints = []
    for file in files(source):
        own = part_of(file, source)
        for line, module in imports(file, source):
            root, _, rest = module.partition(".")
            other = rest.split(".")[0] or "__init__"
            if root != source.name or other == own:
                continue
            if table.get(other, 99) >= table[own]:
                complaints.append(f"{file.relative_to(source)}:{line} ({own}) imports {other}")
    return complaints


def too_long(source: Path) -> list[str]:
    complaints = []
    for file in files(source):
        length = len(file.read_text(encoding="utf-8").splitlines())
        if length > MAX_FILE_LINES:
            complaints.append(f"{file.relative_to(source)} has {length} lines")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    complaints.append(f"{file.relative_to(source)}: {node.name} has {length} lines")
    return complaints


def beyond_standard_library(file: Path, source: Path) -> list[str]:
    allowed = sys.stdlib_module_names
    modules = (module for _, module in imports(file, source))
    return [m for m in modules if m.split(".")[0] not in allowed and not m.startswith(f"{source.name}.base.")]


def unsafe(source: Path) -> list[str]:
    """Whatever could run code out of a file: unpickling, torch.load, eval, exec."""
    complaints = []
    for file in files(source):
        where = file.relative_to(source)
        for line, module in imports(file, source):
            if module.split(".")[0] in UNPICKLERS or module == "torch.load":
                complaints.append(f"{where}:{line} imports {module}")
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.serialization.load",
            ):
                complaints.append(f"{where}:{node.lineno} uses torch.load")
            if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
                complaints.append(f"{where}:{node.lineno} uses {node.id}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                complaints.append(f"{where}:{node.value.lineno} uses allow_pickle")
    return complaints


def other_frameworks(source: Path) -> list[str]:
    return [
        f"{file.relative_to(source)}:{line} imports {module}"
        for file in files(source)
        for line, module in imports(file, source)
        if module.split(".")[0] in OTHER_FRAMEWORKS
    ]


# The package


def test_parts_are_the_table() -> None:
    assert wrong_parts(SOURCE, layers(ROOT / "docs" / "architecture.md")) == []


def test_arrows_point_down() -> None:
    assert wrong_arrows(SOURCE, layers(ROOT / "docs" / "architecture.md")) == []


def test_sizes() -> None:
    assert too_long(SOURCE) == []


def test_configuration_needs_only_the_standard_library() -> None:
    assert beyond_standard_library(SOURCE / "model" / "config.py", SOURCE) == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert unsafe(SOURCE) == []


def test_no_other_framework() -> None:
    assert other_frameworks(SOURCE) == []


def test_every_kernel_is_compiled() -> None:
    stated = re.findall(r'"src/cabochon/(model/kernels/\w+\.c)"', (ROOT / "pyproject.toml").read_text())
    assert stated == sorted(file.relative_to(SOURCE).as_posix() for file in SOURCE.rglob("*.c"))


def loaded_modules(code: str) -> set[str]:
    """The modules in memory after running code in a process of its own."""
    # The script keeps quiet on standard output itself: what it prints there goes to standard error.
    script = f"import sys; out, sys.stdout = sys.stdout, sys.stderr\n{code}\nprint(*sys.modules, file=out)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], *([*name.split(), "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_modules(f"from cabochon.cli.main import main\nassert main({arguments!r}) == 0")
    assert "cabochon.cli.main" in loaded
    assert loaded & HEAVY == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_modules("import cabochon; cabochon.__version__; cabochon.CabochonError") & HEAVY == set()


# The checks themselves, on trees that break them


def broken(folder: Path, **sources: str) -> Path:
    """A tree of one-file parts: `broken(tmp, low="import os")` writes tmp/pkg/low/a.py."""
    for part, text in sources.items():
        file = folder / "pkg" / part / "a.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return folder / "pkg"


TABLE = {"low": 0, "left": 1, "right": 1, "top": 2}


@pytest.mark.parametrize(
    "text",
    [
        "import pkg.top.a",
        "from pkg.top import a",
        "from pkg import top",
        "from ..top import a",
        "from .. import top",
        "def f():\n    from pkg.right.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pkg.right.a",
        "import importlib\nimportlib.import_module('pkg.right.a')",
        "import pkg",
        "from pkg.unknown import x",
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path: Path, text: str) -> None:
    assert len(wrong_arrows(broken(tmp_path, left=text), TABLE)) == 1


@pytest.mark.parametrize("text", ["from pkg.low.a import x", "from . import b", "import pkg.left.b", "import os.path"])
def test_a_right_arrow_is_allowed(tmp_path: Path, text: str) -> None:
    assert wrong_arrows(broken(tmp_path, left=text), TABLE) == []


def test_an_unlisted_and_a_missing_part_are_seen(tmp_path: Path) -> None:
    assert len(wrong_parts(broken(tmp_path, low="", new=""), {"low": 0, "gone": 1})) == 2


def test_long_files_and_functions_are_seen(tmp_path: Path) -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    source = broken(
        tmp_path, low="x = 1\n" * (MAX_FILE_LINES + 1), left=function, right=f"class A:\n{_indent(function)}"
    )
    assert len(too_long(source)) == 3


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_a_foreign_import_in_the_configuration_is_seen(tmp_path: Path) -> None:
    source = broken(
        tmp_path,
        low="import json\nfrom pkg.base.errors import E\ndef f():\n    import torch\n    import pkg.low.b",
    )
    assert beyond_standard_library(source / "low" / "a.py", source) == ["torch", "pkg.low.b"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "def f():\n    exec('1')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_an_unsafe_line_is_seen(tmp_path: Path, text: str) -> None:
    assert len(unsafe(broken(tmp_path, low=text))) == 1


def test_putting_a_model_into_evaluation_mode_is_safe(tmp_path: Path) -> None:
    assert unsafe(broken(tmp_path, low="model.eval()\nx.load('y')")) == []


def test_another_framework_is_seen(tmp_path: Path) -> None:
    assert len(other_frameworks(broken(tmp_path, low="def f():\n    from trl import x"))) == 1


def test_a_heavy_import_is_seen() -> None:
    assert "numpy" in loaded_modules("import numpy") & HEAVY
