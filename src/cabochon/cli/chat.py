"""`cabochon chat`: in a terminal a conversation with all comforts, behind a pipe one answer per line."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cabochon.cli.options import (
    DeviceOptions,
    HubOptions,
    Json,
    Model,
    SamplingOptions,
    SystemPrompt,
    load_lm,
)
from cabochon.cli.stdin import lines


def chat(
    model: Model = None,
    /,
    *,
    system_prompt: SystemPrompt = None,
    json: Json = False,
    hub: HubOptions = HubOptions(),
    device: DeviceOptions = DeviceOptions(),
    sampling: SamplingOptions = SamplingOptions(),
) -> None:
    """Talk to a model in the terminal.

    Without a terminal, each line of input is a message and only the answers are printed.

    Example: cabochon chat google/gemma-2-2b-it --system-prompt "Answer briefly."

    Example: printf '2+2\\n' | cabochon chat
    """
    from cabochon.cli.repl import ChatSession

    settings = sampling.arguments()
    session = ChatSession(load_lm(model, hub, device), settings, system_prompt)
    if sys.stdin.isatty() and sys.stdout.isatty() and not json:
        from cabochon.cli.terminal import converse

        converse(session, model or "the model inside")
    else:
        _answer_lines(session, lines(sys.stdin.buffer), as_json=json)


def _answer_lines(session: Any, typed: Iterator[str], *, as_json: bool) -> None:
    """Answers to standard output, everything else to standard error. An error ends it: scripts want to know."""
    from cabochon.cli.repl import Ask, Leave

    for line in typed:
        if not line.strip():
            continue
        step = session.step(line)
        if isinstance(step, Leave):
            return
        if not isinstance(step, Ask):
            print(step.text, file=sys.stderr)
            continue
        if step.notice:
            print(step.notice, file=sys.stderr)
        stream = session.model.stream_chat(step.messages, **step.sampling)
        answer = "".join(stream)
        session.record(answer)
        print(_as_json(line, answer, stream.completion) if as_json else answer, flush=True)


def _as_json(prompt: str, answer: str, completion: Any) -> str:
    usage = asdict(completion.usage)
    record = {"prompt": prompt, "text": answer, "finish_reason": completion.finish_reason, "usage": usage}
    return json.dumps(record, ensure_ascii=False)
