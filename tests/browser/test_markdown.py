"""The page's own Markdown, held to markdown-it: the same elements with the same text, for whatever models write.

Where the page departs on purpose (headings two levels down, line ends that stay, images as links), the oracle is told.
"""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from playwright.sync_api import Browser, Page
from scripted import ScriptedServer

ORACLE = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])

# A tree as text: tags with what they hold, without what only the page has (copy buttons, wrappers of tables, classes).
OUTLINE = """
const skipped = 'figcaption, input, button';
const bare = new Set(['BODY', 'DIV', 'FIGURE']);
const outline = node => {
    // Line ends are elements; those in the text only lay out the oracle's HTML.
    if (node.nodeType === 3) return node.parentElement?.closest('pre') ? node.data : node.data.replaceAll('\\n', '');
    if (node.nodeType !== 1 || node.matches(skipped)) return '';
    const inside = [...node.childNodes].map(outline).join('');
    if (bare.has(node.tagName)) return inside;
    if (node.closest('pre') && node.tagName === 'SPAN') return inside;
    const href = node.tagName === 'A' ? ` ${node.getAttribute('href')}` : '';
    return `<${node.tagName.toLowerCase()}${href}>${inside}</>`;
};
"""
SETUP = """async () => {
    const markdown = await import('/static/markdown.js');
    OUTLINE;
    window.ours = text => {
        const root = document.createElement('div');
        root.append(...markdown.render(text));
        return outline(root);
    };
    window.parts = html => outline(new DOMParser().parseFromString(html, 'text/html').body);
    window.streamed = (text, cuts) => {
        const root = document.createElement('div');
        const live = new markdown.LiveMarkdown(root);
        for (const cut of [...cuts, text.length]) live.update(text.slice(0, cut));
        const whole = document.createElement('div');
        whole.append(...markdown.render(text));
        return root.isEqualNode(whole);
    };
    window.tags = text => {
        const root = document.createElement('div');
        root.append(...markdown.render(text));
        return [...root.querySelectorAll('*')].map(e => e.tagName);
    };
}""".replace("OUTLINE;", OUTLINE)


@pytest.fixture(scope="module")
def renderer(browser: Browser, _server: ScriptedServer) -> Any:
    """The page with its renderer at hand. The policy is bypassed here alone: the oracle's HTML has to be parsed."""
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    page.goto(_server.address)
    page.evaluate(SETUP)
    yield page
    context.close()


def expected(renderer: Page, text: str) -> str:
    """The oracle's outline."""
    tokens = ORACLE.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    html = ORACLE.renderer.render(tokens, ORACLE.options, {})
    found: str = renderer.evaluate("html => parts(html)", html)
    # Behind the last line of code the oracle has one more line end.
    return found.replace("\n</></>", "</></>")


SAMPLES = [
    "Plain words.",
    "Two\nlines, and\n\nanother paragraph.",
    "**bold** and *slanted* and ***both*** and ~~gone~~ and __bold__ and _slanted_",
    "snake_case_name and 2 * 3 * 4 and a*b*c and **not closed",
    "`code` and ``a ` b`` and ` `` ` and `not closed",
    "**bold with `code*` in it** and `**code**`",
    "\\*not slanted\\* and \\`not code\\` and C:\\dir",
    "# One\n## Two ##\n### Three\n#### Four\n##### Five\n###### Six\n####### seven\n#hash",
    "- one\n- two\n  - inner\n  - more\n- three",
    "* star\n\n* loose\n* items",
    "1. one\n2. two\n   1. inner\n3. three",
    "7. seven\n8. eight",
    "1) round\n2) brackets",
    "- one\n\n  second paragraph of one\n- two",
    "- code inside:\n\n  ```py\n  x = 1\n  ```\n- after",
    "Words:\n- list without a line between\n- two\n\nEnd",
    "Words:\n1. list\n2. two",
    "Words in 2024.\n2023. is no list",
    "- one\n+ another list\n\n1. and\n\n- another",
    "> quoted\n> more\n>\n> - with a list\n\nafter",
    "> > twice\n\nafter",
    "```python\ndef f():\n    return '<b>'\n```",
    "````\n```\ninner\n```\n````",
    "~~~js\n`x`\n~~~\ntext",
    "```\nnot closed\n\n**still code**",
    "text\n```\ncode\n```\ntext",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n| **2** | 3 |\n\nafter",
    "a | b\n--|--\n1 | 2\n3",
    "| a | b |\n|---|---|\n| 1 |\n| 1 | 2 | 3 |",
    "no | table\nhere",
    "---\n\ntext\n\n***\n\n_ _ _",
    "[name](https://example.org/a_b?c=d&e=f) and [with *style*](http://example.org \"title\")",
    "[paren](https://example.org/a_(b)) and [not a link] and [x](",
    "<https://example.org/x> and [mail](mailto:a@example.org)",
    "<script>alert(1)</script>\n\n<b>not bold</b>\n\n<!-- no comment -->",
    "<end_of_turn> <start_of_turn>user <bos> <unused0>",
    "5 < 6 > 4 & 3",
    "**Note:** text\n\n**Title**\ntext",
    "* **Item:** text *with* `code`\n    * **Inner:** text\n        * third\n",
    "1. **First**\n\n   Text.\n\n2. **Second**\n\n   Text.",
]  # fmt: skip


@pytest.mark.parametrize("text", SAMPLES)
def test_like_markdown_it(renderer: Page, text: str) -> None:
    assert renderer.evaluate("text => ours(text)", text) == expected(renderer, text)


def test_departures(renderer: Page) -> None:
    def ours(text: str) -> str:
        return str(renderer.evaluate("text => ours(text)", text))

    # Models indent without meaning code.
    assert ours("x:\n\n    y") == "<p>x:</><p>y</>"
    assert ours("![a gem](https://example.org/gem.png)") == "<p><a https://example.org/gem.png>a gem</></>"
    assert ours("see https://example.org/a_b.") == "<p>see <a https://example.org/a_b>https://example.org/a_b</>.</>"
    assert ours("&lt;b&gt;") == "<p>&lt;b&gt;</>"


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:alert(1)", "java\tscript:alert(1)", "data:text/html,x",
     "vbscript:x", "file:///etc/passwd", "//example.org", "/static/app.js", "blob:x", "\x01javascript:alert(1)"],
)  # fmt: skip
def test_addresses_that_are_no_links(renderer: Page, address: str) -> None:
    for text in (f"[x]({address})", f"[x](<{address}>)", f"![x]({address})", f"<{address}>"):
        assert "A" not in renderer.evaluate("text => tags(text)", text)


INLINE = st.sampled_from(
    ["word", "*em*", "**strong**", "`code`", "~~gone~~", "[link](https://example.org)", "a_b_c", "3 < 4"]
)
LINE = st.lists(INLINE, min_size=1, max_size=4).map(" ".join)
CODE = st.lists(st.sampled_from(["x = 1", "  indented", "", "# not a heading", "- no list", "**x**"]), max_size=4)
ITEMS = st.lists(LINE, min_size=1, max_size=3)
BLOCK = st.one_of(
    LINE,
    st.lists(LINE, min_size=2, max_size=3).map("\n".join),
    st.tuples(st.integers(1, 6), LINE).map(lambda t: "#" * t[0] + " " + t[1]),
    ITEMS.map(lambda items: "\n".join(f"- {item}" for item in items)),
    ITEMS.map(lambda items: "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))),
    st.tuples(LINE, ITEMS).map(lambda t: f"- {t[0]}\n" + "\n".join(f"  - {item}" for item in t[1])),
    ITEMS.map(lambda items: "\n".join(f"> {item}" for item in items)),
    CODE.map(lambda lines: "```py\n" + "\n".join([*lines, "```"])),
    ITEMS.map(lambda rows: "| a | b |\n|---|---|\n" + "\n".join(f"| {row} | x |" for row in rows)),
    st.just("---"),
)
# The same list marker behind a blank line goes on with the list before: blocks are kept apart by words.
DOCUMENT = st.lists(BLOCK, min_size=1, max_size=5).map("\n\nbetween\n\n".join)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=DOCUMENT)
def test_documents_like_markdown_it(renderer: Page, text: str) -> None:
    assert renderer.evaluate("text => ours(text)", text) == expected(renderer, text)


NOISE = st.lists(
    st.sampled_from([*"*_`~[]()<>!#|-+>\\:.1 \n\n", "```", "   ", "ab", "- ", "1. ", "> ", "|-|-|", "https://a.b", "é",
                     "<b>"]),
    max_size=60,
).map("".join)  # fmt: skip
ALLOWED = set("P BR STRONG EM S CODE A H3 H4 H5 H6 HR BLOCKQUOTE OL UL LI INPUT FIGURE FIGCAPTION SPAN BUTTON svg use "
              "PRE DIV TABLE THEAD TBODY TR TH TD".split())  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=NOISE, seed=st.integers(0, 9))
def test_any_text_is_drawn_and_streams_to_the_same_page(renderer: Page, text: str, seed: int) -> None:
    cuts = sorted(random.Random(seed).randrange(len(text) + 1) for _ in range(8))
    assert set(renderer.evaluate("text => tags(text)", text)) <= ALLOWED
    assert renderer.evaluate(f"text => streamed(text, {json.dumps(cuts)})", text)


@pytest.mark.parametrize("text", SAMPLES)
def test_every_cut_of_a_stream_ends_the_same(renderer: Page, text: str) -> None:
    assert renderer.evaluate("text => streamed(text, [...Array(text.length).keys()])", text)


UNITS = ["*", "**a ", "_a", "`", "`` ` ", "[", "[a](", "> ", "- ", "1. ", "|", "|-", "<", "~~", "\\", "#", "h", "https://a",
         "```\n", "- a\n  ", "a\n", "(", "![", "* a **b "]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_long_hostile_text_takes_no_time_to_speak_of(renderer: Page, unit: str) -> None:
    """100,000 characters: a quadratic search would take minutes, and the browser's own limit end it."""
    renderer.evaluate(
        "text => { ours(text); ours('# ' + text); ours('| a |\\n|---|\\n| ' + text); }", unit * (100_000 // len(unit))
    )
