"""Answers that have to be JSON of a schema, match a regular expression, or be one of several texts.

A grammar speaks of bytes, a model of tokens. llguidance (https://github.com/guidance-ai/llguidance) walks a trie of
the bytes that the pieces spell beside a parser that knows which byte may come next; what comes through is the mask of
the next token. Text that is certain is taken in the pieces that the tokenizer itself would use.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cabochon.base.errors import BadInput
from cabochon.generate.grammar import Constraint as Constraint
from cabochon.generate.grammar import complaint, grammar, unusable
from cabochon.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from torch import Tensor

_MAX_LEXER_STATES = 20_000  # of one answer, about 2 kB each; a schema of 44 kB needed fewer than 5,000
_LOOK_AHEAD = 1024  # characters of certain text to split for the next token: more than any piece has
_UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]


class Grammars:
    """Compiles constraints for one tokenizer. Making it takes a second or two for 256,000 pieces, compiling 1 ms.

    Args:
        vocab_size: V, the number of the model's logits.
        stop_ids: tokens that end an answer, at least one. None is part of its text, whatever it spells.

    Raises `BadInput` when the tokenizer has ids beyond V, or lacks a piece for some byte: there would be texts that
    it cannot spell.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        tokenizer.check_fits(vocab_size)
        assert stop_ids and max(stop_ids) < vocab_size
        self.vocab_size, self.stop_ids = vocab_size, stop_ids
        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, stop_ids))
        self._tokenizer = LLTokenizer(vocabulary, eos_token=sorted(stop_ids))
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)

    def compile(self, constraint: Constraint) -> "Matcher":
        """A matcher at the beginning of an answer.

        Raises `BadInput` for a constraint that cannot be read, is too large, or leaves nothing to say.
        """
        from llguidance import LLMatcher

        # Not a copy of an earlier matcher: copies share one lexer, which would keep the states of every answer.
        inner = LLMatcher(self._tokenizer, grammar(constraint), log_level=0, limits=self._limits)
        first = int.from_bytes(inner.compute_bitmask(), "little")
        if inner.is_error():
            raise unusable(constraint, complaint(inner.get_error()))
        if inner.is_accepting() and first.bit_count() == len(self.stop_ids):
            raise unusable(constraint, "only an empty answer satisfies it")
        return Matcher(inner, self.vocab_size, self.stop_ids)


class Matcher:
    """What may come next in one answer. Made by `Grammars.compile`. V is the vocabulary."""

    def __init__(self, inner: "LLMatcher", vocab_size: int, stop_ids: frozenset[int], stops: int = 0) -> None:
        self._inner, self._vocab_size, self._stop_ids = inner, vocab_size, stop_ids
        self._stops = stops  # accepted stop tokens: kept here because llguidance takes back some and not others

    def mask(self) -> "Tensor":
        """bool [V] on the CPU: the tokens that may come next, stop tokens exactly where the text is complete.

        Raises `BadInput` where the text has become too complicated to follow.
        """
        import numpy as np
        import torch

        self._check()
        if self.finished:
            return torch.zeros(self._vocab_size, dtype=torch.bool).index_fill_(0, torch.tensor([*self._stop_ids]), 1)
        packed = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._check()  # having failed, it would allow the stop tokens
        return torch.from_numpy(np.unpackbits(packed, count=self._vocab_size, bitorder="little")).view(torch.bool)

    def accept(self, token: int) -> None:
        """Go on behind a token. Raises `BadInput`, and stays where it is, for one that may not come here."""
        self._check()
        if token in self._stop_ids:
            allowed = self.finished or self._inner.is_accepting()
            self._stops += allowed
        else:
            allowed = not self._stops and self._inner.try_consume_tokens([token]) == 1
            self._check()
        if not allowed:
            raise _stuck(f"token {token} may not come here", "forbid fewer tokens, for example by logit_bias")

    def rollback(self, tokens: int) -> None:
        """Take back the last accepted tokens, such as guesses that were wrong."""
        stops = min(tokens, self._stops)
        self._stops -= stops
        done = self._inner.rollback(tokens - stops)
        assert done, self._inner.get_error()

    @property
    def finished(self) -> bool:
        """Whether nothing but a stop token may follow."""
        return self._stops > 0 or self._inner.is_stopped()

    def copy(self) -> "Matcher":
        """Another matcher at the same place."""
        return Matcher(self._inner.deep_copy(), self._vocab_size, self._stop_ids, self._stops)

    def _check(self) -> None:
        if self._inner.is_error():
            raise _stuck(complaint(self._inner.get_error()), "simplify the schema or the expression")


class _Vocabulary:
    """A tokenizer as llguidance wants to see one: the bytes of every piece, and a function that splits UTF-8."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()  # control pieces spell nothing, so no grammar reaches them

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, min(stop_ids)
        self.tokens = [b"" if i in stop_ids else tokenizer.token_bytes(i) for i in range(vocab_size)]
        self._single = {piece[0]: i for i, piece in enumerate(self.tokens) if len(piece) == 1}
        missing = [f"0x{byte:02X}" for byte in _UTF8_BYTES if byte not in self._single]
        if missing:
            cause = f"the tokenizer has no piece for the byte {missing[0]}, so that it cannot spell every text"
            raise BadInput("answers cannot be constrained", cause, "use a tokenizer with byte fallback, like Gemma's")

    def __call__(self, utf8: bytes) -> list[int]:
        text = utf8.decode()[:_LOOK_AHEAD]
        ids = self._tokenizer.encode(text, bos=False)
        if b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return [self._single[byte] for byte in text.encode()]  # tokenizers turn U+2581 into a space


def _stuck(cause: str, hint: str) -> BadInput:
    return BadInput("the answer cannot go on under its constraint", cause[:200], hint)
