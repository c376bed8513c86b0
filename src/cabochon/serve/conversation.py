"""Messages as OpenAI's clients write them, as the turns that Gemma 2 knows: user and model, one after the other.

Gemma 2 was trained without a system role, without tools, and with roles that take turns. Instructions therefore lead
the next user turn, an empty line between them; what a tool has answered comes as a user turn; and neighbours of one
role become one turn. With `strict` none of this is done, and such conversations are errors.
"""

import json
from collections.abc import Sequence
from typing import Any

from cabochon.serve.errors import ApiError
from cabochon.serve.fields import ChatMessage, Tool
from cabochon.text.chat import Message

_CALLING = (
    "You can call a function. To call one, answer with nothing but JSON of this form:\n"
    '{"name": "the function", "arguments": {"its parameter": "a value"}}\n'
    "The functions:\n"
)


def turns(messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), *, strict: bool = False) -> list[Message]:
    """The conversation for `encode_chat`, tools described at its beginning.

    Raises `ApiError` for contents that are not text, and with `strict` for whatever would have to be rewritten.
    """
    if strict:
        if tools:
            raise ApiError(400, "tools: this server rewrites nothing", code="unsupported_tools", param="tools")
        for number, message in enumerate(messages):
            if message.role not in ("user", "assistant") or message.tool_calls:
                raise _refused(number, message.role)
        return [{"role": m.role, "content": content(m, i)} for i, m in enumerate(messages)]
    instructions = [describe(tools)] if tools else []
    folded: list[tuple[str, list[str]]] = []
    for number, message in enumerate(messages):
        text = content(message, number)
        if message.role in ("system", "developer"):
            instructions += [text.strip()] if text.strip() else []
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if role == "user" and instructions:
            text, instructions = "\n\n".join([*instructions, text.strip()]), []
        _append(folded, role, text)
    if instructions:
        _append(folded, "user", "\n\n".join(instructions))
    return [{"role": role, "content": "\n\n".join(texts)} for role, texts in folded]


def content(message: ChatMessage, number: int) -> str:
    """The text of a message: its content, the parts of it, or the call that it stands for."""
    if isinstance(message.content, list):
        for place, part in enumerate(message.content):
            if part.type not in ("text", "refusal") or part.text is None:
                param = f"messages[{number}].content[{place}]"
                raise ApiError(400, f"{param}: this model reads text only", code="unsupported_content", param=param)
        text = "".join(part.text or "" for part in message.content)
    else:
        text = message.content or ""
    calls = [_as_answered(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    if message.role == "tool":
        text = f"The function answered:\n{text}"
    return "\n".join([*([text] if text or not calls else []), *calls])


def describe(tools: Sequence[Tool]) -> str:
    """What the model is told of its tools."""
    lines: list[dict[str, Any]] = [
        {
            "name": tool.function.name,
            **({"description": tool.function.description} if tool.function.description else {}),
            "parameters": tool.function.parameters or {"type": "object"},
        }
        for tool in tools
    ]
    return _CALLING + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)


def _as_answered(name: str, arguments: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments or "{}"}}}'


def _append(folded: list[tuple[str, list[str]]], role: str, text: str) -> None:
    if folded and folded[-1][0] == role:
        folded[-1][1].append(text)
    else:
        folded.append((role, [text]))


def _refused(number: int, role: str) -> ApiError:
    said = f"messages[{number}]: Gemma 2 knows no such role or field ({role}), and this server rewrites nothing"
    return ApiError(400, said, code="unsupported_role", param=f"messages[{number}].role")
