"""The chat page as a person uses it."""

from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Locator, Page, expect


@dataclass
class Chat:
    """The page as a person uses it, and what went wrong in it."""

    page: Page
    server: Any  # a ScriptedServer, or another that has an address
    errors: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # parts of errors that the test is about

    def watch(self, page: Page) -> None:
        """Note whatever the browser complains about on a page."""
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._inside(request.url))

    def _inside(self, url: str) -> None:
        if not url.startswith((self.server.address, "data:", "blob:")):
            self.errors.append(f"asked another server: {url}")

    def unexpected(self) -> list[str]:
        """What went wrong and should not have."""
        return [error for error in self.errors if not any(part in error for part in self.expected)]

    def open(self, path: str = "/") -> "Chat":
        """Load the page and wait until it knows the model."""
        self.page.goto(self.server.address + path)
        expect(self.page.locator("#model option")).not_to_have_count(0)
        return self

    def send(self, text: str) -> None:
        """Type a message, line by line, and press Enter."""
        self.page.locator("#prompt").focus()
        for number, line in enumerate(text.split("\n")):
            if number:
                self.page.keyboard.press("Shift+Enter")
            self.page.keyboard.insert_text(line)
        self.page.keyboard.press("Enter")

    def ask(self, text: str, *pieces: str) -> None:
        """Send a message and wait for the whole answer."""
        self.server.says(*(pieces or ("Hello!",)))
        self.send(text)
        expect(self.page.locator("#prompt")).to_have_value("")  # it is on its way
        self.idle()

    def idle(self) -> None:
        """Wait until nothing is being answered."""
        expect(self.page.locator("#stop")).to_be_hidden()

    def until(self, condition: str) -> None:
        """Wait for something to be true in the page. (Playwright's own function for that needs eval.)"""
        for _ in range(400):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {condition}")

    @property
    def said(self) -> Locator:
        """The person's messages."""
        return self.page.locator(".message.user .text")

    @property
    def answers(self) -> Locator:
        """The model's messages."""
        return self.page.locator(".message.model .text")

    def button(self, name: str) -> Locator:
        """A button by what it says."""
        return self.page.get_by_role("button", name=name)
