"""What the page does when the server will not answer, breaks off, or cannot take the whole conversation."""

import pytest
from chat_page import Chat
from playwright.sync_api import expect


def test_a_key_is_asked_for_and_sent(chat: Chat) -> None:
    chat.expected.append("401")
    chat.server.key = "sesame"
    chat.open()
    chat.button("Enter a key").click()
    expect(chat.page.get_by_label("API key")).to_be_focused()
    chat.page.keyboard.type("sesame")
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#model")).to_have_value("gemma-2-tiny")
    chat.ask("Hi", "Welcome")
    expect(chat.answers).to_have_text(["Welcome"])
    assert chat.page.evaluate("JSON.stringify(localStorage).includes('sesame')") is False


def test_a_key_that_is_no_longer_good(chat: Chat) -> None:
    chat.expected.append("401")
    chat.server.key = "changed"
    chat.send("Hi")
    expect(chat.page.locator(".remark.wrong")).to_contain_text("an API key is needed")
    chat.button("Enter a key").click()
    expect(chat.page.get_by_label("API key")).to_be_focused()


def test_a_full_server_says_when_to_come_back(chat: Chat) -> None:
    chat.expected.append("429")
    chat.server.says(status=429, message="too many requests", headers={"Retry-After": "7"})
    chat.send("Hi")
    remark = chat.page.locator(".remark.wrong")
    expect(remark).to_have_text("too many requests It can be tried again in 7 s.")
    chat.server.says("Now")
    chat.button("Try again").click()
    expect(chat.answers).to_have_text(["Now"])
    expect(remark).to_have_count(0)
    expect(chat.page.locator(".versions")).to_have_count(0)  # what came to nothing is no version


def test_an_answer_that_breaks_off_is_kept_and_named(chat: Chat) -> None:
    chat.server.says("Half", breaks_off=True)
    chat.send("Hi")
    expect(chat.page.locator(".remark.wrong")).to_have_text("The answer broke off.")
    expect(chat.answers).to_have_text(["Half"])
    chat.page.reload()
    expect(chat.page.locator(".remark.wrong")).to_have_text("The answer broke off.")


def test_a_server_out_of_reach(chat: Chat) -> None:
    chat.expected.append("Failed to load resource")
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.send("Hi")
    expect(chat.page.locator(".remark.wrong")).to_have_text("The server cannot be reached.")
    chat.page.unroute("**/v1/chat/completions")
    chat.button("Try again").click()
    expect(chat.answers).to_have_text(["Hello!"])


def test_a_message_before_the_model_is_there_is_sent_when_it_is(chat: Chat) -> None:
    chat.expected.append("503")
    chat.page.route("**/v1/models", lambda route: route.fulfill(status=503, json={"error": {"message": "loading"}}))
    chat.open()
    chat.send("Hi")
    expect(chat.page.locator("#notice")).to_contain_text("not ready")
    chat.page.unroute("**/v1/models")
    expect(chat.answers).to_have_text(["Hello!"])


def test_an_answer_at_its_longest(chat: Chat) -> None:
    chat.server.says("And so", finish="length")
    chat.send("Hi")
    expect(chat.page.locator(".remark")).to_contain_text("cut here")


def test_the_oldest_turns_are_left_out_when_the_context_is_full(chat: Chat) -> None:
    chat.server.context = 64
    chat.open()
    for number in range(5):
        chat.ask(f"question {number} a b c d", f"answer {number}")
    sent = chat.server.asked[-1]["messages"]
    # A turn takes 10 and 6 tokens, a question 10; a quarter of the context is left for the answer.
    assert [m["content"] for m in sent] == [
        "question 2 a b c d", "answer 2", "question 3 a b c d", "answer 3", "question 4 a b c d",
    ]  # fmt: skip
    assert chat.server.asked[-1]["max_tokens"] == 64 - 42
    expect(chat.said).to_have_count(5)
    forgotten = chat.page.locator(".forgotten")
    expect(forgotten).to_have_count(1)
    expect(chat.page.locator(".forgotten + .message .text")).to_have_text("question 2 a b c d")


def test_a_message_longer_than_the_context(chat: Chat) -> None:
    chat.server.context = 16
    chat.open()
    chat.send("word " * 20)
    expect(chat.page.locator(".remark.wrong")).to_contain_text("it takes 24 tokens, and the context holds 16")
    assert chat.server.asked == []


def test_storage_that_is_full(chat: Chat) -> None:
    chat.page.evaluate("""() => {
        let size = 1 << 20, i = 0;
        while (size) try { localStorage.setItem('filler' + i++, 'x'.repeat(size)); } catch { size >>= 1; }
    }""")
    chat.ask("Hi", "Still here")
    expect(chat.answers).to_have_text(["Still here"])
    expect(chat.page.locator("#notice")).to_contain_text("no room left")


@pytest.mark.parametrize(
    "stored",
    [
        "nonsense",
        "null",
        '{"id": "a"}',
        '{"id": "a", "title": "", "updated": 1, "chosen": 0, "nodes": [{"id": 0, "text": "x", "role": "user", '
        '"parent": null, "chosen": 0}]}',
        '{"id": "a", "title": "", "updated": 1, "chosen": 9, "nodes": []}',
    ],
)
def test_damaged_storage_is_passed_over(chat: Chat, stored: str) -> None:
    write = (
        "stored => { localStorage['cabochon.conversation.a'] = stored; localStorage['cabochon.settings'] = stored; }"
    )
    chat.page.evaluate(write, stored)
    chat.open("/#c=a")
    expect(chat.page.locator("#conversations li")).to_have_count(0)
    chat.ask("Hi", "All is well")
    expect(chat.answers).to_have_text(["All is well"])
