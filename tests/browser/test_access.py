"""Everyone can use the page: by keyboard alone, by ear, in the dark, on a phone; and nothing foreign runs in it."""

import base64
import re
from typing import Any

import pytest
from chat_page import Chat
from playwright.sync_api import Browser, expect

ANSWER = """# Title

Text with `code`, **bold**, a [link](https://example.org) and ~~gone~~.

> quoted

- [x] done
- open

| a | b |
|---|--:|
| 1 | 2 |

```python
import os  # comment
def f(): return "text" + str(1.5)
```
"""

# Everything that takes part, with its name as a browser would tell it to a screen reader.
UNNAMED = """() => [...document.querySelectorAll(
    'button, a[href], input, select, textarea, [role=region], [role=group], nav, dialog, meter')]
  .filter(e => !(e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.textContent.trim()
    || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent))
  .map(e => e.outerHTML)"""

# (text, ratio, size) of all text that is seen: WCAG 2.2's relative luminance, backgrounds laid over each other.
CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) ?? []).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((x, i) => x * a + under[i] * (1 - a));
  const ground = e => {
    const colors = [];
    for (; e; e = e.parentElement) colors.unshift(parse(getComputedStyle(e).backgroundColor));
    return colors.reduce((under, c) => over(c, under), [255, 255, 255]);
  };
  const light = c => c.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const found = [];
  const root = document.querySelector('dialog[open]') ?? document.body;
  for (const e of root.querySelectorAll('*')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.matches('select, textarea, input');
    const style = getComputedStyle(e);
    if (!own || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (e.closest('.unseen, :disabled, .skip, noscript')) continue;
    const under = ground(e);
    found.push([e.textContent.trim().slice(0, 40) || e.id, ratio(over(parse(style.color), under), under)]);
    if (e.matches('textarea, input[type=number], input[type=password], .new, .plain, .chief')) {
      const edge = e.closest('.composer') ?? e;
      const line = parse(getComputedStyle(edge).borderTopColor);
      found.push(['edge of ' + (e.id || e.className), 1.5 * ratio(line, ground(edge.parentElement))]);
    }
  }
  return found;
}"""


def weak(chat: Chat) -> list[Any]:
    """What has less contrast than WCAG's AA: 4.5 for text, 3 for the edge of what can be filled in."""
    found = chat.page.evaluate(CONTRAST)
    assert len(found) > 8
    return [each for each in found if each[1] < 4.5]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chat: Chat, scheme: str) -> None:
    chat.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert weak(chat) == []
    chat.ask("A question", ANSWER)
    chat.server.says(status=400, message="refused")
    chat.expected.append("400")
    chat.send("Another one")
    expect(chat.page.locator(".remark.wrong")).to_be_visible()
    assert weak(chat) == []
    chat.page.keyboard.press("ArrowUp")
    expect(chat.page.locator(".editor")).to_be_visible()
    assert weak(chat) == []
    chat.page.keyboard.press("Escape")
    chat.button("Settings").click()
    assert weak(chat) == []


def test_weak_contrast_is_seen(chat: Chat) -> None:
    chat.page.evaluate("document.querySelector('.greeting').style.color = '#999'")
    assert [text for text, _ in weak(chat)] == ["What would you like to know?"]


def test_everything_has_a_name(chat: Chat) -> None:
    chat.ask("A question", ANSWER)
    chat.button("Give another answer").click()
    chat.idle()
    chat.button("Settings").click()
    assert chat.page.evaluate(UNNAMED) == []
    chat.page.evaluate("document.getElementById('stop').removeAttribute('aria-label')")
    assert len(chat.page.evaluate(UNNAMED)) == 1


def test_the_structure_is_told(chat: Chat) -> None:
    chat.ask("A question", ANSWER)
    page = chat.page
    assert page.evaluate("document.documentElement.lang") == "en"
    expect(page).to_have_title("A question · cabochon")
    expect(page.get_by_role("navigation", name="Conversations")).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("A question")
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["You", "Model"]
    expect(page.get_by_role("heading", level=3)).to_have_text("Title")  # the answer's, below the page's own
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    expect(page.get_by_role("link", name="A question")).to_have_attribute("aria-current", "page")
    expect(page.locator("#announcer")).to_have_attribute("aria-live", "polite")
    expect(page.locator("#notice")).to_have_attribute("role", "status")
    expect(page.get_by_role("columnheader")).to_have_count(2)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    named = page.evaluate("""[...document.querySelectorAll('[aria-describedby], [aria-controls], label[for]')]
        .flatMap(e => [e.getAttribute('aria-describedby'), e.getAttribute('aria-controls'), e.getAttribute('for')])
        .filter(Boolean)""")
    assert set(named) <= set(ids)


def test_the_keyboard_is_enough(chat: Chat) -> None:
    keys = chat.page.keyboard
    chat.button("New conversation").focus()
    keys.press("Shift+Tab")  # to the very first thing on the page
    expect(chat.page.locator("#skip")).to_be_focused()
    expect(chat.page.locator("#skip")).to_be_in_viewport()
    keys.press("Enter")
    expect(chat.page.locator("#prompt")).to_be_focused()
    chat.server.says("First answer")
    keys.type("Line one")
    keys.press("Shift+Enter")
    keys.type("line two")
    keys.press("Enter")
    expect(chat.answers).to_have_text(["First answer"])
    assert chat.server.asked[0]["messages"][0]["content"] == "Line one\nline two"
    keys.press("Alt+n")
    expect(chat.said).to_have_count(0)
    chat.ask("Second conversation")
    keys.press("Alt+ArrowDown")
    expect(chat.answers).to_have_text(["First answer"])
    keys.press("Alt+ArrowUp")
    expect(chat.said).to_have_text(["Second conversation"])
    # Backwards from the message box: what can be done with the answer, then the messages, then the head.
    names = []
    for _ in range(12):
        keys.press("Shift+Tab")
        names.append(
            chat.page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")
        )
        outline = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", names[-1]  # one sees where one is
    assert names[:6] == [
        "Give another answer", "Copy this answer", "Edit and send again", "Copy this message", "Messages", "Settings",
    ]  # fmt: skip
    chat.button("Settings").focus()
    keys.press("Enter")
    expect(chat.page.get_by_role("dialog", name="Settings")).to_be_visible()
    for _ in range(30):  # the focus does not leave the sheet
        keys.press("Tab")
        inside = "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        assert chat.page.evaluate(inside)
    keys.press("Escape")
    expect(chat.page.get_by_role("dialog")).to_be_hidden()
    chat.page.locator("#scroller").focus()
    keys.type("typed while reading")
    expect(chat.page.locator("#prompt")).to_have_value("typed while reading")


def test_enter_that_ends_a_word_of_an_input_method_does_not_send(chat: Chat) -> None:
    chat.page.locator("#prompt").fill("日本")
    chat.page.evaluate("""document.getElementById('prompt').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))""")
    expect(chat.page.locator("#prompt")).to_have_value("日本")
    assert chat.server.asked == []


def brightness(chat: Chat) -> tuple[float, float]:
    """Mean and spread of a screenshot's pixels, 0 to 255; decoded by a page of its own."""
    shot = base64.b64encode(chat.page.screenshot()).decode()
    page = chat.page.context.new_page()
    mean, spread = page.evaluate(
        """async data => {
        const image = await createImageBitmap(await (await fetch('data:image/png;base64,' + data)).blob());
        const context = new OffscreenCanvas(image.width, image.height).getContext('2d');
        context.drawImage(image, 0, 0);
        const { data: pixels } = context.getImageData(0, 0, image.width, image.height);
        let sum = 0, squares = 0;
        for (let i = 0; i < pixels.length; i += 4) {
            const x = (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3;
            sum += x; squares += x * x;
        }
        const n = pixels.length / 4;
        return [sum / n, Math.sqrt(squares / n - (sum / n) ** 2)];
    }""",
        shot,
    )
    page.close()
    return mean, spread


def test_light_and_dark(chat: Chat) -> None:
    chat.ask("A question", ANSWER)
    light, light_spread = brightness(chat)
    chat.page.emulate_media(color_scheme="dark")
    dark, dark_spread = brightness(chat)
    assert light > 220 and dark < 50
    assert min(light_spread, dark_spread) > 8  # something is to be seen on it
    chat.button("Settings").click()
    chat.page.get_by_label("Colours").select_option("light")
    chat.page.keyboard.press("Escape")
    chat.page.reload()
    expect(chat.answers).to_have_count(1)
    assert brightness(chat)[0] > 220  # the choice is kept, whatever the system has


@pytest.fixture
def phone(browser: Browser, options: dict[str, Any]) -> dict[str, Any]:
    options.update(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    return options


def sideways(chat: Chat) -> list[str]:
    """What sticks out of the page at its side, but for code and tables, which scroll for themselves."""
    found: list[str] = chat.page.evaluate("""() => [...document.querySelectorAll('main *, dialog[open] *')]
        .filter(e => !e.closest('pre, .table, .unseen') && e.checkVisibility())
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))""")
    return found


def test_on_a_phone(phone: dict[str, Any], chat: Chat) -> None:
    page = chat.page
    chat.server.says(ANSWER + "\n" + "x" * 200)
    page.locator("#prompt").tap()
    page.keyboard.type("A question")
    page.keyboard.press("Enter")  # there is no Shift-Enter on glass
    page.keyboard.type("w" * 80)
    page.locator("#send").tap()
    expect(chat.said).to_have_text(["A question\n" + "w" * 80])
    expect(page.locator("#prompt")).to_have_value("")
    chat.idle()
    assert sideways(chat) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.locator("#sidebar-open").tap()
    expect(page.get_by_role("navigation")).to_be_visible()
    expect(page.locator("#sidebar-close")).to_be_focused()
    assert page.evaluate("document.getElementById('main').inert")
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.locator("#sidebar-open")).to_be_focused()
    page.locator("#sidebar-open").tap()
    page.get_by_role("button", name="New conversation").tap()
    expect(page.get_by_role("navigation")).to_be_hidden()
    assert sideways(chat) == []
    page.locator("#settings-open").tap()
    assert sideways(chat) == []
    small = page.evaluate("""[...document.querySelectorAll('main button, dialog button')]
        .filter(e => e.checkVisibility()).map(e => [e.id, e.getBoundingClientRect()])
        .filter(([, box]) => box.width < 36 || box.height < 36).map(([id]) => id)""")
    assert small == []  # a finger is wide
    mean, spread = brightness(chat)
    assert mean > 200 and spread > 8


def test_the_policy_refuses_what_is_not_ours(chat: Chat) -> None:
    """The headers work: script and style in the page, HTML made of text, and other servers."""
    chat.expected.append("")  # any error
    assert chat.page.evaluate("""async () => {
        const script = document.createElement('script');
        script.append('window.ran = 1');
        document.body.append(script);
        document.body.setAttribute('style', 'margin-top: 7px');
        const done = [window.ran, getComputedStyle(document.body).marginTop];
        try { document.body.innerHTML = '<p>x'; done.push('allowed'); } catch { done.push('refused'); }
        await fetch('http://127.0.0.1:9/').then(() => done.push('allowed'), () => done.push('refused'));
        return done;
    }""") == [None, "0px", "refused", "refused"]
    assert any("style-src" in error for error in chat.errors)
    assert any("trusted" in error.lower() for error in chat.errors)
    assert any("connect-src" in error for error in chat.errors)


def test_the_page_has_no_inline_code_and_no_outside_resource() -> None:
    from cabochon.serve import pages

    html = (pages.STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|<style|\son[a-z]+=|<script>|javascript:", html)
    for file in pages.STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, file.name
        foreign = text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in foreign and "http://" not in foreign, file.name
        assert len(text.splitlines()) < 300, file.name
