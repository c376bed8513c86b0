"""Turns what the argument parser objects to into the three lines that all our errors have."""

from collections.abc import Collection

from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError

from cabochon.base.errors import UsageError, nearest


def explain(problem: CycloptsError, commands: Collection[str]) -> UsageError:
    """The same complaint with a cause and with what to type next, naming the nearest command or option."""
    command = " ".join(["cabochon", *(problem.command_chain or ())])
    see = f"`{command} --help` lists what can be typed"
    if isinstance(problem, UnknownCommandError):
        typed = (problem.unused_tokens or ["?"])[0]
        kind = "option" if typed.startswith("-") else "command"
        cause = f"the commands are {', '.join(commands)}"
        return UsageError(f"there is no {kind} {typed}", cause, _did_you_mean(nearest(typed, commands), see))
    if isinstance(problem, UnknownOptionError):
        typed = (problem.token.keyword or problem.token.value).split("=")[0]
        known = [name for argument in problem.argument_collection for name in argument.names]
        cause = f"`{command}` does not know it"
        if problem.token.source != "cli":  # a key of a configuration file, in brackets
            typed, cause = typed.strip("[]"), f"{problem.token.source} has it, and {cause}"
            known = [name.removeprefix("--").replace("-", "_") for name in known]
        return UsageError(f"there is no option {typed}", cause, _did_you_mean(nearest(typed, known), see))
    problem.verbose = False
    return UsageError(f"`{command}` could not be understood", _lower_first(str(problem)), see)


def _did_you_mean(guess: str | None, otherwise: str) -> str:
    return f"did you mean {guess}? {otherwise}" if guess else otherwise


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
