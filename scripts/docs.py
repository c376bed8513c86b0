"""Write what the docs do not type by hand: `docs/cli.md`, the examples that pages quote, and the chat in the README.

    make docs

`tests/docs/test_generated.py` fails when a page is not what this script would write.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from io import StringIO
from pathlib import Path

from rich.console import Console

from cabochon.cli.main import COMMANDS, application
from cabochon.cli.repl import COMMANDS as CHAT_COMMANDS

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns of the help: what a code block shows without a scroll bar
QUOTED = re.compile(r"(<!-- file: (\S+) -->\n)```(\w+)\n.*?^```$", re.DOTALL | re.MULTILINE)
TRANSCRIPT = re.compile(r"(<!-- transcript: begin -->\n).*?(<!-- transcript: end -->)", re.DOTALL)

# What the README asks the model inside, in one conversation. Its training had neither this sum nor this name.
TALK = (
    "Hello!",
    "What is 348 + 589?",
    "What is the capital of France?",
    "Knock knock.",
    "Zorbin.",
    "Zorbin is at the door!",
    "Say it like a pirate: Hello, my friend, where is the money?",
)

_CLI = """\
# The command line

<!-- Generated from the help of each command. Do not edit: type `make docs`. -->

Every command takes `--help`, which answers before torch is loaded. Answers go to standard output, everything else to
standard error. `--json` prints one JSON object, or one for each answer, for programs.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check failed: an attention backend that this machine needs is not exact |
| 2 | usage: what was typed cannot be understood |
| 3 | bad input: a file, a prompt or a conversation cannot be used as it is |
| 4 | missing resource: a file, the network, access, memory or a device is not there |
| 130 | stopped with Ctrl-C |

An error is three lines: what failed, the cause, and what to type next.

## In a chat

A line that begins with `/` is a command. To send such a line as a message, begin it with a space. Enter sends;
Alt-Enter, or a backslash at the end of the line, begins a new line; Ctrl-C stops an answer and keeps what has come;
Ctrl-D leaves. When the context is full the oldest turns are dropped, and a notice says so.

| command | what it does |
|---|---|
{chat}

Saved chats are described in [formats.md](formats.md#saved-chats).
{commands}"""


def cli_reference() -> str:
    """The text of `docs/cli.md`."""
    chat = "\n".join(f"| `/{name}` | {told} |" for name, (_, told) in CHAT_COMMANDS.items())
    commands = "".join(f"\n## cabochon {name}\n\n```text\n{command_help(name)}```\n" for name in COMMANDS)
    return _CLI.format(chat=chat, commands=commands)


def command_help(name: str) -> str:
    """What `cabochon NAME --help` prints on a screen of `WIDTH` columns."""
    screen = StringIO()
    application(name)([*name.split(), "--help"], console=Console(file=screen, width=WIDTH, color_system=None))
    return "\n".join(line.rstrip() for line in screen.getvalue().strip().splitlines()) + "\n"


def with_quotes(text: str, root: Path = ROOT) -> str:
    """A page with every block below a `file:` comment replaced by what that file holds now."""

    def quote(found: re.Match[str]) -> str:
        return f"{found[1]}```{found[3]}\n{(root / found[2]).read_text(encoding='utf-8').rstrip()}\n```"

    return QUOTED.sub(quote, text)


@cache
def transcript(talk: Sequence[str] = TALK) -> str:
    """A real conversation with the model inside: each message behind "> ", below it the answer."""
    # In float32, which the test repeats: where two tokens are nearly as likely, the rounding of bfloat16 could decide
    # otherwise on another processor. Greedy, as every answer without --temperature.
    command = [sys.executable, "-m", "cabochon", "chat", "--json", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run(command, input="\n".join(talk), stdout=subprocess.PIPE, encoding="utf-8", check=True)
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    return "\n\n".join(f"> {turn['prompt']}\n{_wrap(turn['text'])}" for turn in turns) + "\n"


def _wrap(text: str) -> str:
    return "\n".join("\n".join(textwrap.wrap(line, WIDTH)) for line in text.splitlines())


def with_transcript(text: str) -> str:
    """A page with the conversation between its markers; any other page as it is."""
    return TRANSCRIPT.sub(lambda found: f"{found[1]}```text\n{transcript()}```\n{found[2]}", text)


def pages() -> dict[Path, str]:
    """Every page with a generated part, as it has to be."""
    written = {ROOT / "docs" / "cli.md": cli_reference()}
    transcript()  # takes a while: pages are read after it, or what is typed into one meanwhile would be lost
    by_hand = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    read = {page: page.read_text(encoding="utf-8") for page in by_hand if page not in written}
    return {page: with_transcript(with_quotes(text)) for page, text in read.items()} | written


def main() -> None:
    """Write the pages that are not as they have to be, and name them."""
    for page, text in pages().items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
