"""Gemma's chat format, built from token ids so that nothing in a message can act as a control piece.

    <bos><start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>
    <start_of_turn>model

The format is that of the Jinja template published with google/gemma-2-9b-it: contents are trimmed, roles alternate
and begin with the user, the assistant's role is `model`, there is no system role.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from cabochon.base.errors import BadInput
from cabochon.text.tokenizer import Tokenizer

_ALIASES = {"assistant": "model"}

# The format in Jinja, for programs that read tokenizer_config.json. Nothing here does.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ raise_exception('Gemma 2 has no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{% if role != ('user' if loop.index0 is even else 'model') %}"
    "{{ raise_exception('roles have to alternate between user and model') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Message(TypedDict):
    """One turn. `role` is "user", or "model" for which "assistant" may stand as well."""

    role: str
    content: str


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation with every role by Gemma's name and contents as they were.

    Raises:
        BadInput: no message, a message that is not a role and a text, a system role, or roles that do not take
            turns beginning with the user.
    """
    if not messages:
        raise BadInput("the conversation is empty", "there is no message", "begin with a user message")
    checked: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role, content = _role_and_content(message, number)
        expected = "user" if number % 2 else "model"
        if role != expected:
            raise _wrong_role(number, role, expected)
        checked.append({"role": role, "content": content})
    return checked


def fold_system(messages: Sequence[Mapping[str, Any]], system: str) -> list[Message]:
    """The conversation with instructions put before the first user message, an empty line between them.

    Gemma 2 was trained without a system role; this is what its users do instead. Raises as `check_messages`.
    """
    checked = check_messages(messages)
    if system.strip():
        content = f"{system.strip()}\n\n{checked[0]['content'].strip()}"
        checked[0] = {"role": "user", "content": content}
    return checked


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation, one BOS in front; by default up to where the model's answer begins.

    Raises:
        BadInput: as `check_messages`; the tokenizer has no turn pieces; or an answer is asked for although the
            model has spoken last.
    """
    checked = check_messages(messages)
    _check_end(checked, add_generation_prompt)
    ids, _ = _encode_turns(tokenizer, checked)
    if add_generation_prompt:
        start, _ = _turn_ids(tokenizer)
        ids += [start, *tokenizer.encode("model\n", bos=False)]
    return ids


def encode_chat_with_mask(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the model says it: its contents and `<end_of_turn>`.

    What a training loss counts. Raises as `encode_chat`.
    """
    return _encode_turns(tokenizer, check_messages(messages))


def render_chat(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """The conversation as text, as the published template renders it; to be shown, not to be encoded.

    Raises `BadInput` as `encode_chat`.
    """
    checked = check_messages(messages)
    _check_end(checked, add_generation_prompt)
    turns = [f"<start_of_turn>{m['role']}\n{m['content'].strip()}<end_of_turn>\n" for m in checked]
    return "".join(["<bos>", *turns, "<start_of_turn>model\n" if add_generation_prompt else ""])


def _encode_turns(tokenizer: Tokenizer, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
    start, end = _turn_ids(tokenizer)
    line_end = tokenizer.encode("\n", bos=False)
    header = tokenizer.encode("model\n", bos=False)
    ids, mask = [tokenizer.bos_id], [False]
    for message in messages:
        # Role and content are encoded together, as one text between two control pieces.
        text = tokenizer.encode(f"{message['role']}\n{message['content'].strip()}", bos=False)
        given = _common(header, text) if message["role"] == "model" else len(text) + 1
        ids += [start, *text, end, *line_end]
        mask += [False] * (1 + given) + [True] * (len(text) + 1 - given) + [False] * len(line_end)
    return ids, mask


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids are the same at the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _turn_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        raise BadInput(
            "this model cannot chat",
            "its tokenizer has no <start_of_turn> and <end_of_turn>",
            "use a tokenizer of Gemma 2, or continue a plain text with generate",
        )
    return start, end


def _role_and_content(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadInput(
            f"message {number} of the conversation cannot be used",
            "a message has a role and a content, and both are text",
            'write it as {"role": "user", "content": "Hello"}',
        )
    return _ALIASES.get(role, role), content


def _wrong_role(number: int, role: str, expected: str) -> BadInput:
    if role == "system":
        return BadInput(
            f"message {number} of the conversation has the role system",
            "Gemma 2 was trained without a system role",
            "put the instructions before the first user message: --system-prompt TEXT, or fold_system() in Python",
        )
    return BadInput(
        f"message {number} of the conversation has the role {role[:40]!r}",
        "the roles user and model take turns, and the user begins",
        f"this message has to come from {expected!r}",
    )


def _check_end(messages: Sequence[Message], answer_follows: bool) -> None:
    if answer_follows and messages[-1]["role"] == "model":
        raise BadInput(
            "there is nothing to answer",
            "the last message of the conversation comes from the model",
            "end with a user message, or pass add_generation_prompt=False",
        )
