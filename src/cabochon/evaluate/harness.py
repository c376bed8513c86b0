"""Our models as a backend of EleutherAI's lm-evaluation-harness (`lm_eval`, the `eval` extra).

Requests are answered as its Hugging Face backend answers them, with three differences. What requests have in common is
computed once. Every text begins with exactly one BOS, where that backend puts two in front of rolling texts. Control
pieces that an item spells are text.

This module needs `lm_eval`; `run.py` says so kindly where it is missing.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM as HarnessModel  # noqa: N811 (its own name is that of ours)
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from cabochon.base.errors import BadInput
from cabochon.base.progress import track
from cabochon.evaluate.answers import Asked, answer
from cabochon.evaluate.cache import Store, request_key
from cabochon.evaluate.prompts import Encoder, render
from cabochon.evaluate.scores import score
from cabochon.evaluate.tree import Scored
from cabochon.generate.sampling import SamplingParams
from cabochon.lm import LM, load
from cabochon.text.chat import CHAT_TEMPLATE, encode_chat

LONGEST_ANSWER = 256  # tokens, where a task does not say


@register_model("cabochon")
class Backend(HarnessModel):  # type: ignore[misc]
    """A model as the harness sees it.

    Args:
        lm: the model.
        store: finished requests.
        seed: of answers that are drawn.

    Attributes:
        truncated: by task, requests that did not fit the context and lost their beginning.
        unsaid: prompts whose instructions were left out, since Gemma's chats have no place for them.
    """

    def __init__(self, lm: LM, store: Store | None = None, seed: int = 0) -> None:
        super().__init__()
        self.lm, self.store, self.seed = lm, store or Store(), seed
        self.encoder = Encoder(lm.text_tokenizer)
        self.truncated: Counter[str] = Counter()
        self.unsaid = 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Backend":
        """For `lm_eval --model cabochon --model_args pretrained=...`; the other arguments are those of `load`."""
        wanted = dict(arg_dict)
        device = wanted.pop("device", None) or (additional_config or {}).get("device")
        return cls(load(wanted.pop("pretrained", None), device=device, **wanted))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "Backend":
        """As `create_from_arg_obj`, of `name=value` separated by commas."""
        pairs = (part.partition("=") for part in arg_string.split(",") if part)
        return cls.create_from_arg_obj({name: value for name, _, value in pairs}, additional_config)

    @property
    def max_length(self) -> int:
        """Tokens that are read at once."""
        return self.lm.context_length

    @property
    def tokenizer_name(self) -> str:
        """What the harness knows the chat format by."""
        return "cabochon"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The published template, for the record."""
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text that `Encoder` reads. Gemma 2 has no system role: such a turn is left out."""
        turns = [turn for turn in chat_history if turn["role"] != "system"]
        self.unsaid += len(turns) < len(chat_history)
        return render(turns, answer_begins=add_generation_prompt)

    def check_chat(self) -> None:
        """Raises `BadInput` when the model's tokenizer has no turns."""
        encode_chat(self.lm.text_tokenizer, [{"role": "user", "content": "Hello"}])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each continuation behind its context."""
        texts = [self._scored(r, *self.encoder.pair(*r.args)) for r in _tracked(requests, "reading prompts")]
        return self._score(texts, "scoring choices")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token of it predicted once, in windows of one context."""
        windows: list[Scored] = []
        counts = []
        for request in _tracked(requests, "reading texts"):
            (text,) = request.args
            ids = self.lm.text_tokenizer.encode(text, bos=False)
            parts = list(get_rolling_token_windows(ids, self.lm.text_tokenizer.bos_id, self.max_length, 1))
            windows += [Scored(array("i", [*seen, told[-1]]), len(seen) + 1 - len(told)) for seen, told in parts]
            counts.append(len(parts))
        scores = iter(self._score(windows, "scoring texts"))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to what ends it."""
        seen: Counter[str] = Counter()
        asked, keys = [], []
        for request in _tracked(requests, "reading prompts"):
            one = self._asked(request)
            key = request_key("answer", list(one.ids), str(one.params))
            if one.params.temperature:  # several draws for one prompt
                one = Asked(one.ids, _drawn(one.params, self.seed, seen[key]))
                seen[key] += 1
                key = request_key(key, one.params.seed)
            asked.append(one)
            keys.append(key)
        return self._finished(keys, lambda left: answer(self.lm, [asked[n] for n in left]), "answering")

    def _scored(self, request: Instance, ids: "array[int]", start: int) -> Scored:
        """A text cut on the left to what the context holds and one predicted token, as the harness does."""
        cut = max(0, len(ids) - self.max_length - 1)
        self.truncated[request.task_name or ""] += cut > 0
        return Scored(ids[cut:], min(max(1, start - cut), len(ids) - cut))

    def _asked(self, request: Instance) -> Asked:
        context, wanted = request.args
        wanted = normalize_gen_kwargs(wanted, LONGEST_ANSWER)
        longest = wanted["max_gen_toks"]
        if longest >= self.max_length:
            raise BadInput(
                f"{request.task_name} cannot be answered",
                f"its answers may have {longest} tokens, and the context of this model has {self.max_length}",
                "use a model with a longer context",
            )
        ids = self.encoder.encode(context)
        cut = max(0, len(ids) - (self.max_length - longest))
        self.truncated[request.task_name or ""] += cut > 0
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        settings = {name: wanted[name] for name in names if wanted.get(name) is not None}
        until = wanted.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return Asked(ids[cut:], SamplingParams(max_new_tokens=longest, stop=stop, **settings))

    def _score(self, texts: Sequence[Scored], label: str) -> list[tuple[float, bool]]:
        keys = [request_key("score", text.ids.tolist(), text.start) for text in texts]

        def run(left: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
            for found in score(self.lm, [texts[n] for n in left]):
                yield found.number, [found.logprob, found.is_greedy]

        return [(logprob, greedy) for logprob, greedy in self._finished(keys, run, label)]

    def _finished(
        self, keys: Sequence[str], run: Callable[[Sequence[int]], Iterator[tuple[int, Any]]], label: str
    ) -> list[Any]:
        """What each key stands for: from the store, or else as `run` yields it for the numbers that are left."""
        found = [self.store.get(key) for key in keys]
        first = {key: n for n, key in reversed(list(enumerate(keys)))}  # of equal requests one is enough
        left = [n for n in sorted(first.values()) if found[n] is None]
        with track(len(left), label, unit="requests") as advance:
            for place, value in run(left) if left else ():
                found[left[place]] = value
                self.store.put(keys[left[place]], value)
                advance(1)
        return [found[first[key]] for key in keys]


def _drawn(params: SamplingParams, seed: int, number: int) -> SamplingParams:
    return replace(params, seed=seed * 1000 + number)


def _tracked(requests: Sequence[Instance], label: str) -> Iterator[Instance]:
    with track(len(requests), label, unit="requests") as advance:
        for request in requests:
            yield request
            advance(1)
