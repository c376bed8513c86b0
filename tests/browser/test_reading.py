"""Reading while an answer streams in: nothing jumps, the place is the reader's, and listeners hear whole blocks."""

from typing import Any

import pytest
from chat_page import Chat
from playwright.sync_api import expect

LINES = [f"Line {number} of a long answer.\n\n" for number in range(60)]
MIXED = [
    "# A heading\n\n", "Some text that ", "goes **on and", " on** for a", " while.\n\n- one\n", "- two\n  - inner\n\n",
    "```python\n", "def f():\n", "    return 1\n", "```\n\n", "| a | b |\n", "|---|---|\n", "| 1 | 2 |\n", "\nThe end.",
]  # fmt: skip


@pytest.fixture
def options() -> dict[str, Any]:
    return {"viewport": {"width": 900, "height": 600}, "permissions": ["clipboard-read", "clipboard-write"]}


def distance(chat: Chat) -> float:
    """Pixels between what is seen and the end."""
    return float(
        chat.page.evaluate("""() => {
        const s = document.getElementById('scroller');
        return s.scrollHeight - s.clientHeight - s.scrollTop;
    }""")
    )


def test_at_the_end_the_page_follows(chat: Chat) -> None:
    answer = chat.server.says(*LINES, hold=30)
    chat.send("Go")
    expect(chat.answers).to_contain_text("Line 29")
    assert distance(chat) < 2
    answer.release()
    expect(chat.answers).to_contain_text("Line 59")
    chat.idle()
    assert distance(chat) < 2
    expect(chat.page.locator("#to-end")).to_be_hidden()


def test_elsewhere_it_stays_where_it_is(chat: Chat) -> None:
    answer = chat.server.says(*LINES, hold=30)
    chat.send("Go")
    expect(chat.answers).to_contain_text("Line 29")
    chat.page.locator("#scroller").hover()
    chat.page.mouse.wheel(0, -40)  # a small step, near the end
    expect(chat.page.locator("#to-end")).to_be_visible()
    place = chat.page.evaluate("document.getElementById('scroller').scrollTop")
    answer.release()
    expect(chat.answers).to_contain_text("Line 59")
    chat.idle()
    assert chat.page.evaluate("document.getElementById('scroller').scrollTop") == place
    chat.page.locator("#to-end").click()
    assert distance(chat) < 2
    expect(chat.page.locator("#to-end")).to_be_hidden()


def test_nothing_shifts_while_an_answer_grows(chat: Chat) -> None:
    chat.page.set_viewport_size({"width": 900, "height": 1400})  # nothing has to be scrolled
    chat.page.evaluate("""async () => {
        for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
        window.shifts = [];
        const describe = ({ node }) => node?.outerHTML ?? node?.parentElement?.outerHTML ?? 'gone';
        new PerformanceObserver(list => window.shifts.push(...list.getEntries().flatMap(e => e.sources.map(describe))))
            .observe({ type: 'layout-shift' });
    }""")
    first = chat.server.says(*MIXED, hold=1)
    chat.send("Go")
    expect(chat.answers).to_contain_text("A heading")
    top = chat.answers.locator("h3").bounding_box()
    first.release()
    expect(chat.answers).to_contain_text("The end.")
    chat.idle()
    assert chat.answers.locator("h3").bounding_box() == top
    assert chat.page.evaluate("window.shifts") == []
    # The measure sees a shift where there is one.
    chat.page.evaluate("document.getElementById('messages').prepend(Object.assign(document.createElement('li'), "
                       "{ textContent: 'x', className: 'forgotten' }))")  # fmt: skip
    chat.until("window.shifts.length > 0")


def test_finished_blocks_keep_their_elements(chat: Chat) -> None:
    answer = chat.server.says("First.\n\n```\nlong", " code", "\n```\n\nLast", " words", hold=2)
    chat.send("Go")
    expect(chat.answers.locator("code")).to_have_text("long code")
    chat.page.evaluate("window.kept = [...document.querySelectorAll('.prose > *')]")
    chat.answers.get_by_role("button", name="Copy").focus()
    answer.release()
    chat.idle()
    assert chat.page.evaluate("window.kept.every((e, i) => document.querySelectorAll('.prose > *')[i] === e)")
    expect(chat.answers.get_by_role("button", name="Copy")).to_be_focused()


def test_listeners_hear_whole_blocks_once(chat: Chat) -> None:
    answer = chat.server.says("One sent", "ence.\n\nAnother", " one.\n\n- a\n- b", hold=2)
    heard = chat.page.locator("#announcer p")
    chat.send("Go")
    expect(heard).to_have_text(["One sentence."])  # the other one may still grow
    answer.release()
    expect(heard).to_have_text(["One sentence.", "Another one.", "a b"])
    chat.idle()
    expect(chat.page.locator(".message.model")).to_have_attribute("aria-busy", "false")


def test_code_and_answers_are_copied_as_they_were_written(chat: Chat) -> None:
    chat.ask("Go", "Here:\n\n```python\n", "x = '<b>'\n\n", "y = 2\n```\n")
    clipboard = "navigator.clipboard.readText()"
    chat.answers.get_by_role("button", name="Copy").click()
    expect(chat.page.locator("#announcer")).to_contain_text("Copied.")
    assert chat.page.evaluate(clipboard) == "x = '<b>'\n\ny = 2"
    chat.button("Copy this answer").click()
    chat.until(f"{clipboard}.then(t => t === 'Here:\\n\\n```python\\nx = \\'<b>\\'\\n\\ny = 2\\n```\\n')")
    chat.page.locator(".message.user").hover()
    chat.button("Copy this message").click()
    chat.until(f"{clipboard}.then(t => t === 'Go')")


def test_text_is_copied_without_the_newer_interface(chat: Chat) -> None:
    chat.ask("Go", "Plain words")
    chat.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    chat.button("Copy this answer").focus()
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#announcer")).to_contain_text("Copied.")
    expect(chat.button("Copy this answer")).to_be_focused()
    chat.page.locator("#prompt").focus()
    chat.page.keyboard.press("Control+v")
    expect(chat.page.locator("#prompt")).to_have_value("Plain words")
