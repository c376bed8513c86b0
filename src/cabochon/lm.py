"""A language model as a user sees it: text in, text out, with the tokenizer and the weights behind one name.

lm = cabochon.load()                  # the model that ships inside; or a folder, or a Hub id
lm.generate("The capital of France is").text
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.generate.plain import PlainLoop, Sampled
from cabochon.generate.sampling import SamplingParams, TokenLogprob
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.head import logit_chunks
from cabochon.text.chat import Message, encode_chat
from cabochon.text.detokenize import StreamDecoder
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.hub import resolve

Prompt = str | Sequence[int]  # text, or token ids used as they are


@dataclass(frozen=True)
class Usage:
    """Tokens in and out, and seconds from the call to the first and to the last token."""

    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Completion:
    """One answer. `finish_reason` is "stop" (the model or a stop string ended it) or "length"."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    usage: Usage


@dataclass(frozen=True)
class Score:
    """Log-probability in nats of a continuation, whether it is the greedy one, and its tokens."""

    logprob: float
    is_greedy: bool
    tokens: int


class Stream(Iterator[str]):
    """Pieces of one answer as they come; whole characters only. `completion` is there after the last."""

    def __init__(self, answers: "_Answers") -> None:
        self._answers = answers
        self._pieces = (piece for _, piece in answers.run())

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The answer so far, as it would be had it ended here."""
        return self._answers.completion(0)


@dataclass
class LM:
    """A model and, unless its folder has none, a tokenizer. Made by `load`."""

    model: Gemma2
    tokenizer: Tokenizer | None = None

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
            sampling: fields of `SamplingParams`, such as max_new_tokens=32, temperature=0.7, seed=1, n=2.

        Returns:
            A `Completion` for one prompt, else a list; with n > 1 the n answers of a prompt are neighbours.

        Raises:
            BadInput: a prompt is empty or does not fit the context.
            UsageError: a sampling field is unknown or out of range.
        """
        params = sampling_params(**sampling)
        several = not isinstance(prompt, str) and not all(isinstance(p, int) for p in prompt)
        prompts: Sequence[Any] = prompt if several else [prompt]
        answers = _Answers(self, [self._encode(p) for p in prompts], params)
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
        out: Tensor = self.model(ids.to(self._device))
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
        ids = torch.tensor(whole, device=self._device)
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

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def _stream(self, ids: list[int], sampling: dict[str, Any]) -> Stream:
        params = sampling_params(**sampling)
        if params.n != 1:
            raise UsageError(f"a stream cannot have n={params.n}", "it is one answer", "use n=1, or generate()")
        self._check_ids(ids, len(ids) + 1)
        return Stream(_Answers(self, [ids], params))

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


def load(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    softcap: bool = True,
) -> LM:
    """Load a model for use.

    Args:
        model: a folder, a Hub id such as "google/gemma-2-9b-it", or None for the model that ships inside.
        dtype: "bfloat16" or "float32"; None keeps what the folder stores.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU when there is one.
        revision, token, offline: for the Hub: a branch, tag or commit; an access token; use only what is here.
        softcap: False leaves the soft cap on attention scores out, which is faster in places and another
            model than the one that was trained: an explicit choice, for inference only.

    Raises:
        BadInput, MissingResource: the folder or the Hub cannot give a whole, sound model.
    """
    folder = resolve(model, revision=revision, token=token, offline=offline)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = load_model(folder, dtype=_dtype(dtype), device=where, softcap=softcap).eval()
    try:
        tokenizer = load_tokenizer(folder)
    except MissingResource:  # only text calls need one
        return LM(net)
    tokenizer.check_fits(net.config.vocab_size)
    return LM(net, tokenizer)


def sampling_params(**sampling: Any) -> SamplingParams:
    """`SamplingParams` from keywords, with an error that names the nearest field for an unknown one."""
    from dataclasses import fields

    from cabochon.base.errors import nearest

    names = [f.name for f in fields(SamplingParams)]
    for name in sampling:
        if name not in names:
            close = nearest(name, names)
            raise UsageError(
                f"no sampling setting named {name!r}",
                f"there are {', '.join(names)}",
                f"did you mean {close!r}?" if close else "use one of these",
            )
    if isinstance(sampling.get("stop"), list):
        sampling["stop"] = tuple(sampling["stop"])
    elif isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    return SamplingParams(**{"max_new_tokens": 256, **sampling})


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in known:
        raise UsageError(f"no dtype named {name!r}", "weights are bfloat16 or float32", "use one of these")
    return known[name]


@dataclass
class _Answer:
    prompt_tokens: int
    decoder: StreamDecoder | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "length"
    first: float = 0.0
    seconds: float = 0.0


class _Answers:
    """Drives the token loop and turns ids into text, row by row."""

    def __init__(self, lm: LM, prompts: list[list[int]], params: SamplingParams) -> None:
        self._params, self._started = params, time.perf_counter()
        tokenizer = lm.tokenizer if lm.tokenizer or not params.stop else lm.text_tokenizer
        stop_ids = frozenset(lm.config.eos_ids) | (tokenizer.stop_ids if tokenizer else frozenset())
        self._loop = PlainLoop(lm.model, prompts, [params] * len(prompts), stop_ids)
        self._rows = [
            _Answer(len(prompt), StreamDecoder(tokenizer, params.stop) if tokenizer else None)
            for prompt in prompts
            for _ in range(params.n)
        ]

    def run(self) -> Iterator[tuple[int, str]]:
        """Pieces of text with their row's number, in the order they are ready."""
        while self._loop.live:
            for sampled in self._loop.step():
                piece = self._take(self._rows[sampled.row], sampled)
                if piece:
                    yield sampled.row, piece

    def _take(self, row: _Answer, sampled: Sampled) -> str:
        row.seconds = time.perf_counter() - self._started
        row.first = row.first or row.seconds
        row.token_ids.append(sampled.token)
        if sampled.logprob:
            row.logprobs.append(sampled.logprob)
        piece = row.decoder.push(sampled.token) if row.decoder and sampled.last != "stop" else ""
        if sampled.last and row.decoder:
            piece += row.decoder.finish()
        if row.decoder and row.decoder.stopped:
            self._loop.stop([sampled.row])
            row.finish_reason = "stop"
        elif sampled.last:
            row.finish_reason = sampled.last
        row.pieces.append(piece)
        return piece

    def completion(self, number: int) -> Completion:
        row = self._rows[number]
        usage = Usage(row.prompt_tokens, len(row.token_ids), row.first, row.seconds)
        logprobs = None if self._params.logprobs is None else row.logprobs
        return Completion("".join(row.pieces), row.token_ids, logprobs, row.finish_reason, usage)
