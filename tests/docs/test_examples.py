"""Every file in examples/ runs as its docstring says, on the model inside, and does what it claims."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from blocks import ROOT
from shell import environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@dataclass(frozen=True)
class Run:
    """What is typed into an example, what it has to print (a pattern for each claim), and whether it takes long."""

    prints: tuple[str, ...]
    typed: str = ""
    slow: bool = False


RUNS = {
    "chat.py": Run((r"^You begin\.", r"So 2 \+ 2 = 4\.", r"So 3 \+ 4 = 7\.", r"tokens in .* s, stop$"),
                   typed="What is 2 + 2?\nWhat is 3 + 4?\n\nnever read\n"),
    "sample.py": Run((r"^1\. ", r"^5\. \w.*\.  \[stop\]$", r"^the same seed, the same answers: True$", r"likeliest: ")),
    "save_and_reload.py": Run((r" model\.safetensors$", r"^the same logits: True$", r"^  hint: ")),
    "score.py": Run((r"^answer: Paris\.$", r"Paris\. .*greedy")),
    "train.py": Run((r"^step +120 ", r"^61 62 63 64 65 66 67 68$"), slow=True),
}  # fmt: skip


def missing(run: Run, printed: str) -> list[str]:
    return [pattern for pattern in run.prints if not re.search(pattern, printed, re.MULTILINE)]


def documented(example: Path) -> list[str]:
    """The commands of its docstring."""
    told = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    return re.findall(r"^    \.venv/bin/python (\S+)", told, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if run.slow else []) for name, run in RUNS.items()]
)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=tmp_path, env=environment(tmp_path), input=RUNS[name].typed, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert missing(RUNS[name], done.stdout) == [], done.stdout


def test_every_example_is_run() -> None:
    assert [example.name for example in EXAMPLES] == sorted(RUNS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_docstrings_name_their_own_file(example: Path) -> None:
    assert set(documented(example)) == {f"examples/{example.name}"}


def test_a_missing_line_is_seen() -> None:
    assert missing(Run((r"^yes$", r"^no$")), "well\nyes\n") == [r"^no$"]
