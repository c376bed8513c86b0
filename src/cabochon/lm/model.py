"""A model and its tokenizer behind one name: what the command line, the server and Python programs call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.generate.constrain import Grammars
from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.sampling import SamplingParams
from cabochon.generate.speculate import Speculator
from cabochon.lm.answers import Answers, Completion, Stream, sampling_params
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import logit_chunks
from cabochon.text.chat import Message, encode_chat
from cabochon.text.tokenizer import Tokenizer
from cabochon.weights.save import save_model

Prompt = str | Sequence[int]  # text, or token ids used as they are


@dataclass(frozen=True)
class Score:
    """Log-probability in nats of a continuation, whether it is the greedy one, and its tokens."""

    logprob: float
    is_greedy: bool
    tokens: int


@dataclass
class LM:
    """A model and, unless its folder has none, a tokenizer. Made by `load`."""

    model: Gemma2
    tokenizer: Tokenizer | None = None
    engine_config: EngineConfig = field(default_factory=EngineConfig)
    speculator: Speculator | None = None

    @cached_property
    def engine(self) -> Engine:
        """What answers, several requests side by side. After a change of weights call its `weights_changed`."""
        ours = self.tokenizer.stop_ids if self.tokenizer else frozenset()
        stop_ids = frozenset(self.config.eos_ids) | ours
        return Engine(self.model, stop_ids, self.engine_config, self.speculator)

    @cached_property
    def grammars(self) -> Grammars:
        """What turns a constraint into what may come next, for this tokenizer."""
        return Grammars(self.text_tokenizer, self.config.vocab_size, self.engine.stop_ids)

    @property
    def config(self) -> Gemma2Config:
        """The model's numbers."""
        return self.model.config

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.config.max_position

    def generate(self, prompt: Prompt | Sequence[Prompt], **sampling: Any) -> Any:
        """Continue a prompt, or several side by side.

        Args:
            prompt: a text, a list of token ids, or a list of either.
            sampling: fields of `SamplingParams`, such as max_new_tokens=32, temperature=0.7, seed=1, n=2; or what the
                answer has to be: json_schema={...}, regex="[0-9]+" or choice=["yes", "no"].

        Returns:
            A `Completion` for one prompt, else a list; with n > 1 the n answers of a prompt are neighbours.

        Raises:
            BadInput: a prompt is empty or does not fit the context.
            UsageError: a sampling field is unknown or out of range.
        """
        params = sampling_params(**sampling)
        several = not isinstance(prompt, str) and not all(isinstance(p, int) for p in prompt)
        prompts: Sequence[Any] = prompt if several else [prompt]
        answers = self._answers([self._encode(p) for p in prompts], params)
        for _ in answers.run():
            pass
        completions = [answers.completion(i) for i in range(len(prompts) * params.n)]
        return completions if several or params.n > 1 else completions[0]

    def stream(self, prompt: Prompt, **sampling: Any) -> Stream:
        """Continue a prompt piece by piece; arguments and errors as in `generate`, n is 1."""
        return self._stream(self._encode(prompt), sampling)

    def chat(self, messages: Sequence[Message], **sampling: Any) -> Completion:
        """Answer a conversation (roles user and model in turn, the last from the user) in Gemma's chat format."""
        stream = self.stream_chat(messages, **sampling)
        for _ in stream:
            pass
        return stream.completion

    def stream_chat(self, messages: Sequence[Message], **sampling: Any) -> Stream:
        """Answer a conversation piece by piece."""
        return self._stream(encode_chat(self.text_tokenizer, messages), sampling)

    def count_chat(self, messages: Sequence[Message]) -> int:
        """Tokens that a conversation takes as a prompt."""
        return len(encode_chat(self.text_tokenizer, messages))

    @torch.inference_mode()
    def logits(self, token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Soft-capped logits float32 [batch, seq, vocab] of token ids [batch, seq]."""
        ids = torch.as_tensor(token_ids, dtype=torch.long)
        if ids.ndim != 2 or 0 in ids.shape:
            raise BadInput("no logits", f"token ids of shape {list(ids.shape)} are not [batch, seq]", "pass two axes")
        self._check_ids(ids.flatten().tolist(), ids.shape[1])
        out: Tensor = self.model(ids.to(self.model.device))
        return out

    @torch.inference_mode()
    def score(self, prompt: str, continuation: str) -> Score:
        """How likely the model finds `continuation` after `prompt`.

        Both are encoded together and split where the prompt's own tokens end, spaces at its end counted to the
        continuation, as EleutherAI's evaluation harness does.
        """
        trimmed = prompt.rstrip()
        whole = self.text_tokenizer.encode(prompt + continuation)
        start = len(self.text_tokenizer.encode(trimmed))
        if not continuation or start >= len(whole):
            raise BadInput("nothing to score", "the continuation adds no token to the prompt", "pass some text")
        self._check_ids(whole, len(whole))
        ids = torch.tensor(whole, device=self.model.device)
        hidden = self.model.hidden(ids[None, :-1])[0, start - 1 :]
        total, greedy, position = 0.0, True, start
        for logits in logit_chunks(self.model.head, hidden, self.config.vocab_size):
            targets = ids[position : position + len(logits), None]
            total += logits.log_softmax(-1).gather(1, targets).sum().item()
            greedy &= bool((logits.argmax(-1, keepdim=True) == targets).all())
            position += len(logits)
        return Score(total, greedy, len(whole) - start)

    def save(self, folder: str | Path, *, format: str = "hf", overwrite: bool = False) -> None:
        """Write a folder that transformers loads and that answers the same."""
        if format != "hf":
            raise UsageError(f"no format named {format!r}", "models are saved as Hugging Face folders", 'use "hf"')
        if self.config.attn_softcap is None:
            raise UsageError(
                f"{folder} was not written",
                "this model was loaded with its soft cap off, and would be saved as another model",
                "load it again with softcap=True",
            )
        files = self.tokenizer.files() if self.tokenizer else None
        save_model(self.model, Path(folder), tokenizer_files=files, overwrite=overwrite)

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, or `MissingResource` when the model's folder has none."""
        if self.tokenizer is None:
            raise MissingResource(
                "this model cannot read or write text",
                "its folder has no tokenizer.json and no tokenizer.model",
                "copy one of them into the folder, or pass token ids",
            )
        return self.tokenizer

    def _stream(self, ids: list[int], sampling: dict[str, Any]) -> Stream:
        params = sampling_params(**sampling)
        if params.n != 1:
            raise UsageError(f"a stream cannot have n={params.n}", "it is one answer", "use n=1, or generate()")
        self._check_ids(ids, len(ids) + 1)
        return Stream(self._answers([ids], params))

    def _answers(self, prompts: Sequence[list[int]], params: SamplingParams) -> Answers:
        tokenizer = self.text_tokenizer if params.stop else self.tokenizer
        wanted = params.constraint
        matcher = None if wanted is None else partial(self.grammars.compile, wanted)
        return Answers(self.engine, tokenizer, prompts, params, matcher)

    def _encode(self, prompt: Prompt) -> list[int]:
        empty = not prompt.strip() if isinstance(prompt, str) else not len(prompt)
        if empty:
            raise BadInput("the prompt is empty", "there is nothing to continue", "type some text")
        ids = self.text_tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        self._check_ids(ids, len(ids) + 1)
        return ids

    def _check_ids(self, ids: Iterable[int], length: int) -> None:
        wrong = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise BadInput(
                f"token id {wrong} does not exist",
                f"the vocabulary has ids 0 to {self.config.vocab_size - 1}",
                "use the ids of this model's own tokenizer",
            )
        if length > self.context_length:
            raise BadInput(
                "the prompt does not fit",
                f"it needs {length} tokens with one for the answer; the context has {self.context_length}",
                "shorten the prompt, or split it",
            )
