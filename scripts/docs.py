"""Write what the docs do not type by hand: `docs/cli.md` from every command's help, and the examples that docs quote.

    make docs

`tests/docs/test_generated.py` fails when a file is not what this script would write.
"""

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from cabochon.cli.main import COMMANDS, application
from cabochon.cli.repl import COMMANDS as CHAT_COMMANDS

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns of the help: what a code block shows without a scroll bar
QUOTED = re.compile(r"(<!-- file: (\S+) -->\n)```(\w+)\n.*?^```$", re.DOTALL | re.MULTILINE)

_CLI = """\
# The command line

<!-- Generated from the help of each command. Do not edit: type `make docs`. -->

Every command takes `--help`, which answers before torch is loaded. Answers go to standard output, everything else to
standard error. `--json` makes them JSON for programs; `chat --json` prints one object a line.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check failed: an attention backend that would be used on this machine is not exact |
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
    application(name)([name, "--help"], console=Console(file=screen, width=WIDTH, color_system=None))
    return "\n".join(line.rstrip() for line in screen.getvalue().strip().splitlines()) + "\n"


def with_quotes(text: str, root: Path = ROOT) -> str:
    """A page with every block below a `file:` comment replaced by what that file holds now."""

    def quote(found: re.Match[str]) -> str:
        return f"{found[1]}```{found[3]}\n{(root / found[2]).read_text(encoding='utf-8').rstrip()}\n```"

    return QUOTED.sub(quote, text)


def pages() -> dict[Path, str]:
    """Every page with a generated part, as it has to be."""
    written = {ROOT / "docs" / "cli.md": cli_reference()}
    by_hand = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {page: with_quotes(page.read_text(encoding="utf-8")) for page in by_hand if page not in written} | written


def main() -> None:
    """Write the pages that are not as they have to be, and name them."""
    for page, text in pages().items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
