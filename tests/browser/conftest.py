"""A real Chromium, the system's own, and a page in it that tolerates no error."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

from chat_page import Chat
from scripted import ScriptedServer

# Told to the test about whatever the policy of the page has refused.
WATCH = "document.addEventListener('securitypolicyviolation', e => console.error('refused', e.violatedDirective))"
NAMES = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]


def chromium() -> str:
    """The program. Fails where there is none: without it nobody knows whether the page works."""
    candidates = [os.environ.get("CHROMIUM", ""), *NAMES]
    found = next(filter(None, map(shutil.which, filter(None, candidates))), None)
    if found is None:
        pytest.fail(
            "there is no Chromium for the tests of the chat page\n"
            f"  cause: tried {', '.join(NAMES)} and the variable CHROMIUM\n"
            "  hint: run scripts/browser, which installs it where it can and says what to do where it cannot",
            pytrace=False,
        )
    return found


# For each module anew: while Playwright runs, no other test in the process could start an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def _server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def server(_server: ScriptedServer) -> ScriptedServer:
    _server.reset()
    return _server


@pytest.fixture
def options() -> dict[str, Any]:
    """How the browser is set up; tests override it."""
    return {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture
def context(browser: Browser, options: dict[str, Any]) -> Iterator[BrowserContext]:
    context = browser.new_context(locale="en-US", **options)
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    yield context
    context.close()


@pytest.fixture
def chat(context: BrowserContext, server: ScriptedServer) -> Iterator[Chat]:
    """The page, opened. Whatever the browser complains about meanwhile fails the test."""
    chat = Chat(context.new_page(), server)
    chat.watch(chat.page)
    yield chat.open()
    assert chat.unexpected() == []


expect.set_options(timeout=20_000)
