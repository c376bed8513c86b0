"""Pages are what `make docs` would write now: the help of each command, quoted examples, the chat in the README."""

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest
from blocks import ROOT, name_of

from cabochon.data.miniature import arithmetic, jokes

README = ROOT / "README.md"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = script()


def test_pages_are_what_make_docs_writes() -> None:
    """The transcript is drawn anew for this: it is what the model inside answers on this machine."""
    stale = [name_of(page) for page, text in docs.pages().items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "type `make docs`"


def test_the_readme_shows_right_answers() -> None:
    """A model that is not trained could be transcribed as well."""
    shown = docs.TRANSCRIPT.search(README.read_text(encoding="utf-8"))[0]
    assert re.findall(r"^> (.*)$", shown, re.MULTILINE) == list(docs.TALK)
    answers = re.split(r"^> .*$", shown, flags=re.MULTILINE)[1:]
    wanted = ("Hello|Hi", f"{348 + 589}[.]", "Paris", "Who's there", "Zorbin who", "Ha ha", "Ahoy")
    for answer, pattern in zip(answers, wanted, strict=True):
        assert re.search(pattern, answer)


def test_training_had_neither_the_sum_nor_the_name_that_the_readme_shows() -> None:
    assert docs.TALK[1] == arithmetic.Problem("add", 348, 589).question(0)
    assert arithmetic.is_held_out(arithmetic.Problem("add", 348, 589), 0)
    names = random.Random(0)
    assert "zorbin" not in {jokes.made_up_name(names).lower() for _ in range(20_000)}
    assert "zorbin" not in {name.lower() for name, _ in jokes.PUNCH_LINES}


def test_the_transcript_replaces_what_stands_between_the_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "transcript", lambda: "> new\nyes\n")
    page = "a\n<!-- transcript: begin -->\n```text\n> old\nno\n```\n<!-- transcript: end -->\nb\n"
    expected = "a\n<!-- transcript: begin -->\n```text\n> new\nyes\n```\n<!-- transcript: end -->\nb\n"
    assert docs.with_transcript(page) == expected
    assert docs.with_transcript("no markers") == "no markers"


def test_a_quoted_file_replaces_the_block_below_its_name(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text("print(1)\n")
    page = "<!-- file: new.py -->\n```python\nold\n```\n\n```python\nleft\n```\n"
    assert docs.with_quotes(page, tmp_path) == page.replace("old", "print(1)")


def test_every_command_has_a_section() -> None:
    from cabochon.cli.main import COMMANDS

    reference = docs.cli_reference()
    for name in COMMANDS:
        assert f"\n## cabochon {name}\n" in reference
        assert f"Usage: cabochon {name}" in reference
