"""Rows of data to token ids and a mask of what is to be learned, in the shapes that data sets come in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cabochon.base.errors import BadInput
from cabochon.data.config import Shape
from cabochon.data.pack import Example
from cabochon.data.records import BadRow, Record
from cabochon.text.chat import Message, encode_chat_with_mask, fold_system
from cabochon.text.tokenizer import Tokenizer

# The keys of each shape. A row that has those of several is of the first.
SHAPES: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("messages", ("conversations",)),
    ("preference", ("chosen", "rejected")),
    ("completion", ("prompt", "completion")),
    ("text", ("text",)),
)
COLUMNS = frozenset({"prompt", *(key for _, keys in SHAPES for key in keys)})  # all that is ever looked at

_SHAREGPT = {"human": "user", "gpt": "model"}
_SYSTEM_HINT = "fold_system = true (--fold-system) puts system messages before the first user message"


class Pair(NamedTuple):
    """Two answers to one prompt, in one row of a batch as documents 2k and 2k + 1."""

    chosen: Example
    rejected: Example


def detect_shape(keys: Iterable[str], place: str) -> Shape:
    """The shape of rows with these keys. Raises `BadInput` when it is none that is known."""
    present = set(keys)
    for shape, needed in SHAPES:
        if present.issuperset(needed):
            return shape
    raise BadInput(
        f"{place} is not of a known shape",
        f"its keys are {', '.join(map(repr, sorted(present)[:8])) or 'none'}",
        "rows have text, or messages, or prompt and completion, or prompt, chosen and rejected: rename the keys",
    )


def text_example(tokenizer: Tokenizer, text: str, *, begins: bool = True, ends: bool = True) -> Example:
    """Running text between the begin and the end token, as far as it `begins` and `ends`; everything is learned."""
    ids = tokenizer.encode(text, bos=begins)
    if ends:
        ids.append(tokenizer.eos_id)
    return Example(ids, [True] * len(ids))


def completion_example(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """A text that goes on; what follows the prompt is learned, the end token included.

    The two are encoded apart, because that is how a model meets a prompt when it is used.
    """
    given, following = tokenizer.encode(prompt), [*tokenizer.encode(completion, bos=False), tokenizer.eos_id]
    return Example(given + following, [False] * len(given) + [True] * len(following))


def chat_example(tokenizer: Tokenizer, messages: Sequence[Message], *, given: int = 0) -> Example:
    """A conversation in Gemma's format; the model's turns after the first `given` messages are learned, with their end.

    Raises `BadInput` as `encode_chat_with_mask`.
    """
    ids, learned = encode_chat_with_mask(tokenizer, messages)
    if given:
        before = len(encode_chat_with_mask(tokenizer, messages[:given])[0])
        learned[:before] = [False] * before
    return Example(ids, learned)


def record_examples(tokenizer: Tokenizer, record: Record, shape: Shape, *, fold: bool) -> tuple[Example, ...]:
    """What a row teaches: one example, or for preferences a `Pair`. `fold`: system messages go before the user's.

    Raises `BadRow` when something is missing, empty, of another type, or no conversation that Gemma can have.
    """
    row = record.row()
    try:
        if shape == "text":
            return (text_example(tokenizer, _text(row, "text"), begins=record.begins, ends=record.ends),)
        if shape == "preference":
            return _pair(tokenizer, row, fold)
        if shape == "completion":
            return (_continued(tokenizer, _required(row, "prompt"), row, "completion", fold),)
        messages, _ = folded(turns_of(row, "conversations" if "conversations" in row else "messages"), fold)
        return (_learnable(chat_example(tokenizer, messages)),)
    except BadInput as error:
        raise BadRow(f"{error.what}: {error.cause}") from None


def check_shape(tokenizer: Tokenizer, shape: Shape) -> None:
    """Raise `BadInput` when the tokenizer cannot write conversations and the shape needs them."""
    if shape == "messages":
        encode_chat_with_mask(tokenizer, [{"role": "user", "content": "?"}])


def _pair(tokenizer: Tokenizer, row: Mapping[str, Any], fold: bool) -> Pair:
    chosen, rejected = _required(row, "chosen"), _required(row, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str) or _has_prompt(chosen, row):
        prompt = _required(row, "prompt")
        return Pair(*(_continued(tokenizer, prompt, row, key, fold) for key in ("chosen", "rejected")))
    # Whole conversations: what they share is the prompt.
    both = [turns_of(row, key) for key in ("chosen", "rejected")]
    shared = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    examples = []
    for turns in both:
        messages, left_out = folded(turns, fold)
        examples.append(_learnable(chat_example(tokenizer, messages, given=max(0, shared - left_out))))
    return Pair(*examples)


def _has_prompt(answer: Any, row: Mapping[str, Any]) -> bool:
    """Whether an answer needs the row's prompt before it, because it does not begin with a user's turn itself."""
    first = answer[0] if isinstance(answer, list) and answer else None
    role = (first.get("role") or first.get("from")) if isinstance(first, Mapping) else None
    return role in ("assistant", "model", "gpt") or isinstance(row.get("prompt"), list)


def _continued(tokenizer: Tokenizer, prompt: Any, row: Mapping[str, Any], key: str, fold: bool) -> Example:
    """Prompt and answer, both texts or both lists of messages; the answer is learned."""
    answer = _required(row, key)
    if isinstance(prompt, str) and isinstance(answer, str):
        return completion_example(tokenizer, prompt, _text(row, key))
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise BadRow(f"prompt and {key} have to be both texts or both lists of messages")
    before = turns_of(row, "prompt")
    messages, left_out = folded(before + turns_of(row, key), fold)
    return _learnable(chat_example(tokenizer, messages, given=len(before) - left_out))


def turns_of(row: Mapping[str, Any], key: str) -> list[Message]:
    """The messages under a key, with the roles of Gemma where those of ShareGPT stand."""
    messages = _required(row, key)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{key} has to be a list with at least one message")
    turns: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {number} of {key} is not an object with a role and a content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(f"message {number} of {key} needs a role and a content, both texts")
        if not content.strip() and role != "system":
            raise BadRow(f"message {number} of {key} is empty")
        turns.append({"role": _SHAREGPT.get(role, role), "content": content})
    return turns


def folded(turns: list[Message], fold: bool) -> tuple[list[Message], int]:
    """The conversation without a system message in front, and how many messages fewer that is.

    Raises `BadRow` when it has one that is not to be folded into the first user message.
    """
    if not turns or turns[0]["role"] != "system":
        return turns, 0
    system, rest = turns[0]["content"], turns[1:]
    if not system.strip():
        return rest, 1
    if not fold:
        raise BadRow("it has a system message, and Gemma 2 was trained without that role", hint=_SYSTEM_HINT)
    return fold_system(rest, system), 1


def _learnable(example: Example) -> Example:
    if not any(example.learned):
        raise BadRow("the model says nothing in it that could be learned")
    return example


def _required(row: Mapping[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise BadRow(f"it has no {key!r}")
    return row[key]


def _text(row: Mapping[str, Any], key: str) -> str:
    text = _required(row, key)
    if not isinstance(text, str):
        raise BadRow(f"{key!r} is not a text")
    if not text.strip():
        raise BadRow(f"{key!r} is empty")
    return text
