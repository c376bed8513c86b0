"""Rows of data to token ids and a mask of what is to be learned."""

from collections.abc import Sequence

from cabochon.data.pack import Example
from cabochon.text.chat import Message, encode_chat_with_mask
from cabochon.text.tokenizer import Tokenizer


def text_example(tokenizer: Tokenizer, text: str) -> Example:
    """Running text between the begin and the end token; everything is learned."""
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    return Example(ids, [True] * len(ids))


def chat_example(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """A conversation in Gemma's format; the model's turns are learned, their end included."""
    return Example(*encode_chat_with_mask(tokenizer, messages))
