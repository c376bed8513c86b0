"""What pages point at exists: links and anchors, files, tests, and the names in the table of papers."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from blocks import PAGES, ROOT, headings, name_of, prose, tables

SOURCE = ROOT / "src" / "cabochon"
PAPERS = ROOT / "docs" / "papers.md"
# A path in code quotes, with the name of a test behind it or not. A star or a brace makes it a pattern.
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|c|h|json|toml|jinja|model)|(?:[\w-]+/)+)(?:::(\w+))?`")
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


def broken_links(page: Path) -> list[str]:
    """Relative links to files that are not there, and anchors that no heading has. Other sites are not asked."""
    complaints = []
    for line, target in links(page):
        if re.match(r"https://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path) if path else page
        if not file.exists():
            complaints.append(f"{name_of(page)}:{line} links to {target}: there is no such file")
        elif anchor and anchor not in headings(file):
            complaints.append(f"{name_of(page)}:{line} links to {target}: there is no such heading")
    return complaints


def links(page: Path) -> Iterator[tuple[int, str]]:
    for line, text in prose(page):
        yield from ((line, target) for target in re.findall(r"\]\(([^)\s]+)\)", text))


def missing_files(page: Path, roots: tuple[Path, ...] = (ROOT, SOURCE)) -> list[str]:
    """Files named in code quotes that are neither in the repository nor in the package, and tests they do not have."""
    complaints = []
    for line, text in prose(page):
        for path, test in FILE.findall(text):
            found = next((root / path for root in roots if (root / path).exists()), None)
            if found is None:
                complaints.append(f"{name_of(page)}:{line} names {path}, which does not exist")
            elif test and test not in top_names(found):
                complaints.append(f"{name_of(page)}:{line} names {path}::{test}: the file has no such test")
    return complaints


def top_names(file: Path) -> set[str]:
    return {n.name for n in parsed(file).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def all_names(file: Path) -> set[str]:
    """Every function, class, method and assigned name of a file."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def missing_names(places: str, source: Path) -> list[str]:
    """What a cell such as "`a.py` · `f`, `g`; `b.py` · `h`" names and the tree does not have."""
    complaints = []
    for place in places.split(";"):
        path, *names = re.findall(r"`([^`]+)`", place)
        if not (source / path).is_file():
            complaints.append(path)
        else:
            complaints += [f"{path} · {name}" for name in names if name not in all_names(source / path)]
    return complaints


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests(page: Path) -> None:
    assert missing_files(page) == []


@pytest.mark.parametrize("row", tables(PAPERS)[0].rows, ids=lambda row: row[0])
def test_paper(row: list[str]) -> None:
    assert row[1]
    assert missing_names(row[2], SOURCE) == []


def test_papers_that_the_code_cites_are_in_the_table() -> None:
    told = set(ARXIV.findall(PAPERS.read_text(encoding="utf-8")))
    cited = {n for file in SOURCE.rglob("*.py") for n in ARXIV.findall(file.read_text(encoding="utf-8"))}
    assert cited
    assert cited - told == set()


# The checks themselves, on a page that breaks them


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two` three\n\n## Same\n\n## Same\n")
    page = tmp_path / "page.md"
    good = "[a](other.md#one-two-three) [b](other.md#same-1) [c](https://x.org/no) [d](#here)\n\n# Here\n"
    page.write_text(good)
    assert broken_links(page) == []
    page.write_text(good + "[a](gone.md)\n[b](#there) [c](other.md#same-2)\n\n```text\n[d](gone.md)\n```\n")
    assert [complaint.split()[0] for complaint in broken_links(page)] == ["page.md:4", "page.md:5", "page.md:5"]


def test_missing_files_and_tests_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("def test_it():\n    pass\n")
    page = tmp_path / "page.md"
    page.write_text("`a/b.py` `a/` `a/b.py::test_it` `{a}/b.py` `x`\n`a/c.py`\n`a/b.py::test_other`\n`c/`\n")
    found = missing_files(page, roots=(tmp_path,))
    assert [complaint.split()[0] for complaint in found] == ["page.md:2", "page.md:3", "page.md:4"]


def test_missing_names_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("TABLE = {}\nclass A:\n    def f(self): ...\n")
    assert missing_names("`a.py` · `A`, `f`; `a.py` · `TABLE`", tmp_path) == []
    assert missing_names("`a.py` · `A`, `g`; `b.py` · `h`", tmp_path) == ["a.py · g", "b.py"]
