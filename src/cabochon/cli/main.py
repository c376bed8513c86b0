"""The `cabochon` command: which command lives in which module, and how every error looks.

Nothing heavy is imported here. A command's module is imported when that command is chosen, and it imports
torch only once its arguments have been understood.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError

from cabochon.base.errors import CabochonError, Elsewhere
from cabochon.base.version import package_version
from cabochon.cli.config import Config, read_config
from cabochon.cli.usage import explain

# name: (module:function, what is typed behind the name, what `cabochon --help` says about it)
COMMANDS = {
    "chat": ("cabochon.cli.chat:chat", "[MODEL]", "Talk to a model in the terminal."),
    "run": ("cabochon.cli.run:run", "[MODEL] PROMPT|-", "Print the answer to one prompt."),
    "serve": ("cabochon.cli.serve:serve", "[MODEL]", "Serve a model over HTTP, with a chat page."),
    "deploy hf": ("cabochon.cli.deploy:hf", "OUT --repository R --image I", "For Hugging Face Inference Endpoints."),
    "deploy vertex": (
        "cabochon.cli.deploy:vertex_ai",
        "OUT --project P --storage S --image I",
        "For Google Vertex AI.",
    ),
    "deploy gke": ("cabochon.cli.deploy:kubernetes", "OUT --model M --image I", "For Google Kubernetes Engine."),
    "pull": ("cabochon.cli.pull:pull", "REPO", "Fetch a model from the Hugging Face Hub."),
    "list": ("cabochon.cli.models:list_models", "", "List the models on this machine."),
    "show": ("cabochon.cli.show:show", "[MODEL]", "Describe a model without loading its weights."),
    "doctor": ("cabochon.cli.doctor:doctor", "", "Check what this machine can run, and that it is exact."),
    "bench": ("cabochon.cli.bench:bench", "[MODEL]", "Measure how fast a model runs on this machine."),
    "quantize": ("cabochon.cli.quantize:quantize", "SRC DST --bits 8|4", "Write a model with 8- or 4-bit weights."),
    "train pretrain": ("cabochon.cli.train:pretrain", "[MODEL] --data D --out RUN", "Learn to continue text."),
    "train sft": ("cabochon.cli.train:sft", "[MODEL] --data D --out RUN", "Learn to answer, from conversations."),
    "train distill": ("cabochon.cli.train:distill", "[MODEL] --teacher T --data D --out RUN", "Learn from a teacher."),
    "train dpo": ("cabochon.cli.train_dpo:dpo", "[MODEL] --data PAIRS --out RUN", "Learn from preferred answers."),
    "train reward": (
        "cabochon.cli.train_reward:reward",
        "[MODEL] --data PAIRS --out RUN",
        "Learn to tell better answers from worse.",
    ),
    "train policy": (
        "cabochon.cli.train_policy:policy",
        "[MODEL] --prompts P --reward R --out RUN",
        "Learn from rewards for own answers.",
    ),
    "teacher-logits": (
        "cabochon.cli.teacher_logits:teacher_logits",
        "[MODEL] --data D --out FOLDER",
        "Store what a teacher says.",
    ),
    "synthesize": ("cabochon.cli.synthesize:synthesize", "[MODEL] --data D --out FILE", "Let a teacher write answers."),
    "generate-dataset": (
        "cabochon.cli.generate_dataset:generate_dataset",
        "PROMPTS OUT",
        "Answer a whole file of prompts, on one machine or many.",
    ),
    "merge": ("cabochon.cli.merge:merge", "CONFIG OUT", "Merge models as a mergekit file says."),
    "warp": ("cabochon.cli.warp:warp", "CONFIG OUT", "Align a model: train policies, merge them, start again."),
    "eval": ("cabochon.cli.evaluate:evaluate", "[MODEL] --tasks A,B", "Score a model on tasks, as the report did."),
    "init": ("cabochon.cli.init:init", "--preset SIZE --out FOLDER", "Make a model with random weights."),
}

# What `cabochon --help` says of the first words of commands that have two.
GROUPS = {
    "deploy": "Write what a platform needs to run a model: Hugging Face, Vertex AI, Kubernetes.",
    "train": "Train a model: on text, on conversations, from a teacher, from preferences or rewards.",
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def application(chosen: str | None = None, config: Config | None = None) -> App:
    """The command line, built anew for each call so that no state is shared between calls.

    Args:
        chosen: the command that is going to run: its module is described by its own docstring.
        config: values for flags that are not typed.
    """
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
        config=config,
    )
    groups = {name: App(name=name, help=told, help_format="plaintext") for name, told in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, (path, arguments, summary) in COMMANDS.items():
        usage = " ".join(f"Usage: cabochon {name} {arguments} [OPTIONS]".split())
        first, _, last = name.rpartition(" ")
        # The chosen command is described by its own docstring, the others by a line that needs no import.
        groups.get(first, app).command(path, name=last, usage=usage, help=None if name == chosen else summary)
    for one in (app, *groups.values()):
        one["--help"].group = one["--version"].group = "Options"
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and gives its exit code; `sys.argv` when no arguments are given."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = application(_chosen(tokens), read_config(tokens))(
            tokens
        )  # None, or what a command that judges something came to
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


def _chosen(tokens: Sequence[str]) -> str | None:
    """The command that a line begins with."""
    begins = (" ".join(tokens[:words]) for words in (2, 1))
    return next((name for name in begins if name in COMMANDS), None)


def _report(error: CabochonError) -> int:
    if not isinstance(error, Elsewhere):
        print(error, file=sys.stderr)
    return error.exit_code
