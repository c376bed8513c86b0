"""`cabochon run`: one prompt, one answer."""

import json as json_format
import re
import sys
from dataclasses import asdict, fields
from typing import Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import BadInput, UsageError, nearest
from cabochon.cli.options import (
    ConstraintOptions,
    DeviceOptions,
    HubOptions,
    Json,
    SamplingOptions,
    SystemPrompt,
    load_lm,
    text_argument,
)
from cabochon.cli.stdin import decode

OPTIONS = (HubOptions, DeviceOptions, SamplingOptions, ConstraintOptions)
Words = Annotated[
    str,
    # With the hyphen allowed a lone "-" gets here; so do misspelled options, which `_refuse_option` takes out.
    Parameter(
        name="[MODEL] PROMPT|-",
        help="A model, if not the one inside, and the prompt; -: read it.",
        allow_leading_hyphen=True,
    ),
]


def run(
    *words: Words,
    raw: Annotated[bool, Parameter(negative="", help="Continue the prompt as plain text, without turns.")] = False,
    system_prompt: SystemPrompt = None,
    json: Json = False,
    hub: HubOptions = HubOptions(),
    device: DeviceOptions = DeviceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    constraint: ConstraintOptions = ConstraintOptions(),
) -> None:
    """Print the answer to one prompt.

    The prompt is sent as a chat turn when the model's tokenizer has turn tokens; --raw continues it as it is.

    Example: cabochon run "What is 12 + 30?"

    Example: cabochon run google/gemma-2-2b --raw "The capital of France is"

    Example: cabochon run - < question.txt

    Example: cabochon run "Is the sky blue?" --choice yes --choice no
    """
    model, prompt = _model_and_prompt(words)
    if raw and system_prompt:
        raise UsageError("--raw takes no --system-prompt", "plain text has no turns", "put the text into the prompt")
    settings = sampling.arguments() | constraint.arguments()
    lm = load_lm(model, hub, device)
    chatting = not raw and lm.text_tokenizer.start_of_turn_id is not None
    question: Any = _turn(prompt, system_prompt) if chatting else prompt
    if sys.stdout.isatty() and not json:
        _stream(lm.stream_chat(question, **settings) if chatting else lm.stream(question, **settings))
        return
    completion = lm.chat(question, **settings) if chatting else lm.generate(question, **settings)
    print(_as_json(completion) if json else completion.text)


def _model_and_prompt(words: tuple[str, ...]) -> tuple[str | None, str]:
    """Raises `UsageError` unless there are one or two words, `BadInput` for a prompt without text."""
    for word in words:
        _refuse_option(word)
    if not 1 <= len(words) <= 2:
        cause = "no prompt was given" if not words else f"{len(words)} arguments were given, at most two are taken"
        raise UsageError("`cabochon run` needs a prompt", cause, 'type: cabochon run "your question" (in quotes)')
    *model, prompt = words
    text = decode(sys.stdin.buffer.read()) if prompt == "-" else text_argument(prompt, "the prompt")
    if not text.strip():
        raise BadInput("the prompt is empty", "it holds no text", 'type: cabochon run "your question"')
    return (model[0] if model else None), text


def _refuse_option(word: str) -> None:
    if not re.fullmatch(r"-\D\S*", word):
        return
    flags = [f"--{f.name}".replace("_", "-") for kind in OPTIONS for f in fields(kind)]
    guess = nearest(word.partition("=")[0], [*flags, "--raw", "--json", "--system-prompt", "--help"])
    hint = f"did you mean {guess}?" if guess else "`cabochon run --help` lists the options"
    hint += " A prompt that looks like an option can begin with a space"
    raise UsageError(f"there is no option {word}", "`cabochon run` does not know it", hint)


def _turn(prompt: str, system: str | None) -> Any:
    from cabochon.text.chat import Message, fold_system

    messages: list[Message] = [{"role": "user", "content": prompt}]
    return fold_system(messages, system) if system else messages


def _stream(pieces: Any) -> None:
    from cabochon.cli.render import printable

    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


def _as_json(completion: Any) -> str:
    fields = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": asdict(completion.usage),
    }
    return json_format.dumps(fields, ensure_ascii=False)
