"""What can be taken out of a Markdown page, each piece with its line: blocks, commands, tables, headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)")
COMMENT = re.compile(r"<!-- (.*) -->")


def name_of(page: Path) -> str:
    """A page as a test id: its path in the repository, or its bare name elsewhere."""
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its opening fence, and what stands on the line above."""

    page: Path
    line: int
    language: str
    text: str
    above: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def is_quoted(self) -> bool:
        """Whether it repeats a file, which is run where it lies."""
        found = COMMENT.fullmatch(self.above)
        return bool(found and found[1].startswith("file: "))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. A fence that is never closed is an error."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None and FENCE.fullmatch(line):
            start = number
        elif start is not None and line == "```":
            text = "".join(f"{inner}\n" for inner in lines[start + 1 : number])
            above = lines[start - 1] if start else ""
            found.append(Block(page, start + 1, lines[start][3:], text, above))
            start = None
    assert start is None, f"{name_of(page)}:{(start or 0) + 1} opens a block that is never closed"
    return found


def with_output(page: Path) -> Iterator[tuple[Block, Block | None]]:
    """Every block with the ```text block right behind it, which is what it prints; None without one."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = blocks(page)
    for block, following in zip_longest(found, found[1:]):
        end = block.line + block.text.count("\n") + 1
        is_output = following and following.language == "text" and not any(lines[end : following.line - 1])
        yield block, following if is_output else None


@dataclass(frozen=True)
class Command:
    """A shell command that a page shows, and what the page says it prints; None: the page does not say."""

    where: str
    text: str
    shown: str | None = None


def commands(page: Path) -> list[Command]:
    """Lines of sh blocks, lines behind `$` in console blocks with what follows them, and examples in help texts."""
    found: list[Command] = []
    for block, output in with_output(page):
        if block.language == "sh":
            typed = [line for line in block.text.splitlines() if line and not line.startswith("#")]
            assert output is None or len(typed) == 1, f"{block.where}: output below several commands belongs to none"
            found += [Command(block.where, line, output.text if output else None) for line in typed]
        elif block.language == "console":
            found += _console(block)
        elif block.language == "text":
            found += _help_examples(block)
    return found


def _console(block: Block) -> Iterator[Command]:
    _, *parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    for part in parts:
        text, _, shown = part.partition("\n")
        yield Command(block.where, text, shown)


def _help_examples(block: Block) -> Iterator[Command]:
    """`Example: COMMAND`, which help wraps at its width, up to the next empty line."""
    for found in re.finditer(r"^Example: (.+?)\n(?=\n|$)", block.text, re.MULTILINE | re.DOTALL):
        yield Command(block.where, " ".join(found[1].split("\n")))


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of everything outside fenced blocks."""
    inside = {number for block in blocks(page) for number in range(block.line, block.line + block.text.count("\n") + 2)}
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if number not in inside:
            yield number, line


def headings(page: Path) -> list[str]:
    """The anchors of a page, made as GitHub makes them: small letters, no marks, dashes for spaces, -1 for a double."""
    found: list[str] = []
    for _, line in prose(page):
        if title := re.fullmatch(r"#+ (.+)", line):
            slug = re.sub(r"[^\w\- ]", "", title[1].lower()).replace(" ", "-")
            same = sum(other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found)
            found.append(f"{slug}-{same}" if same else slug)
    return found


@dataclass(frozen=True)
class Table:
    """A table: the line of its head, the cells of the head, and of each row."""

    line: int
    head: list[str]
    rows: list[list[str]]


def tables(page: Path) -> list[Table]:
    """The tables of a page, in order."""
    found: list[Table] = []
    before = 0
    for number, line in prose(page):
        if not line.startswith("|"):
            continue
        row = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if number != before + 1:
            found.append(Table(number, row, []))
        elif not re.fullmatch(r"[|\- :]+", line):
            found[-1].rows.append(row)
        before = number
    return found


def table(page: Path, section: str, *head: str) -> dict[str, list[str]]:
    """The first table below a heading or line that begins with `section`, with this head: first cell to the others."""
    start = next(number for number, line in prose(page) if line.startswith(section))
    rows = next(t.rows for t in tables(page) if t.line > start and t.head == list(head))
    return {row[0].strip("`"): row[1:] for row in rows}
