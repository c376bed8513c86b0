"""Every Python block of every page runs, a page from top to bottom, and prints what the page says."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from blocks import PAGES, blocks, name_of, with_output

WITH_PYTHON = [page for page in PAGES if any(b.language == "python" and not b.is_quoted for b in blocks(page))]


def wrong_outputs(page: Path) -> list[str]:
    """Runs the blocks of a page in one namespace. A block that raises does so with the page's own line numbers."""
    names: dict[str, object] = {"__name__": "__main__"}
    complaints = []
    for block, output in with_output(page):
        if block.language != "python" or block.is_quoted:
            continue
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * block.line + block.text, name_of(page), "exec"), names)
        real = printed.getvalue()
        if output and real != output.text:
            complaints.append(f"{output.where}: the page shows\n{output.text}but the block prints\n{real}")
    return complaints


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wrong_outputs(page) == []


def test_the_pages_with_python_are_found() -> None:
    assert {"README.md", "docs/python.md", "docs/formats.md"} <= set(map(name_of, WITH_PYTHON))


# The check itself, on small pages


def page_of(folder: Path, *parts: str) -> Path:
    page = folder / "page.md"
    page.write_text("\n".join(parts))
    return page


def test_a_wrong_output_is_seen(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python", "x = 1", "print(x)", "```", "", "```text", "2", "```", "")
    (complaint,) = wrong_outputs(page)
    assert complaint.startswith("page.md:6: ")


def test_names_go_from_block_to_block(tmp_path: Path) -> None:
    first, then = ("```python", "x = 1", "```", ""), ("```python", "print(x)", "```", "```text", "1", "```", "")
    assert wrong_outputs(page_of(tmp_path, *first, *then)) == []


def test_text_further_down_is_no_output(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python", "print(1)", "```", "", "A file looks so:", "", "```text", "2", "```", "")
    assert wrong_outputs(page) == []


def test_an_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        wrong_outputs(page_of(tmp_path, "# Title", "", "```python", "x = 1", "x / 0", "```", ""))
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == ("page.md", 5)


def test_a_block_that_is_never_closed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:1 opens a block"):
        blocks(page_of(tmp_path, "```python", "x = 1", ""))
