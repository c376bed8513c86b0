"""The `cabochon` command: which command lives in which module, and how every error looks.

Nothing heavy is imported here. A command's module is imported when that command is chosen, and it imports
torch only once its arguments have been understood.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError

from cabochon.base.errors import CabochonError
from cabochon.base.version import package_version
from cabochon.cli.usage import explain

# name: (module:function, what is typed behind the name, what `cabochon --help` says about it)
COMMANDS = {
    "chat": ("cabochon.cli.chat:chat", "[MODEL]", "Talk to a model in the terminal."),
    "run": ("cabochon.cli.run:run", "[MODEL] PROMPT|-", "Print the answer to one prompt."),
    "pull": ("cabochon.cli.pull:pull", "REPO", "Fetch a model from the Hugging Face Hub."),
    "list": ("cabochon.cli.models:list_models", "", "List the models on this machine."),
    "show": ("cabochon.cli.show:show", "[MODEL]", "Describe a model without loading its weights."),
    "doctor": ("cabochon.cli.doctor:doctor", "", "Check what this machine can run, and that it is exact."),
    "bench": ("cabochon.cli.bench:bench", "[MODEL]", "Measure how fast a model runs on this machine."),
    "quantize": ("cabochon.cli.quantize:quantize", "SRC DST --bits 8|4", "Write a model with 8- or 4-bit weights."),
    "merge": ("cabochon.cli.merge:merge", "CONFIG OUT", "Merge models as a mergekit file says."),
    "init": ("cabochon.cli.init:init", "--preset SIZE --out FOLDER", "Make a model with random weights."),
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def application(chosen: str | None = None) -> App:
    """The command line, built anew for each call so that no state is shared between calls."""
    app = App(
        name="cabochon",
        help="Gemma 2, exact, from a prompt to an answer.\n\nExample: cabochon chat",
        version=package_version(),
        # Plain text and not markdown: help must not load a markdown parser.
        help_format="plaintext",
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    for name, (path, arguments, summary) in COMMANDS.items():
        usage = " ".join(f"Usage: cabochon {name} {arguments} [OPTIONS]".split())
        # The chosen command is described by its own docstring, the others by a line that needs no import.
        app.command(path, name=name, usage=usage, help=None if name == chosen else summary)
    app["--help"].group = app["--version"].group = "Options"
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and gives its exit code; `sys.argv` when no arguments are given."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = application(*tokens[:1])(tokens)  # None, or what a command that judges something came to
        sys.stdout.flush()
    except CycloptsError as problem:
        return _report(explain(problem, COMMANDS))
    except CabochonError as error:
        return _report(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _report(error: CabochonError) -> int:
    print(error, file=sys.stderr)
    return error.exit_code
