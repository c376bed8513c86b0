"""The model in training writes: the engine over its weights as they are at this moment.

With float32 products, or adapters beside frozen weights, the engine runs the trained model itself. Where products are
bfloat16 over float32 weights, or weights are sharded, it runs a copy in the type of the products, which is filled
before answers are written and on a CPU let go behind them: it is never there together with gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.model.gemma2 import Gemma2
from cabochon.model.kernels.losses import large
from cabochon.model.lora import adapters
from cabochon.model.paged import page_bytes, pages_for
from cabochon.train.config import Precision
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.shards import is_sharded


@dataclass(frozen=True)
class Answer:
    """What was written to a prompt.

    Args:
        ids: with the token that ended it, unless it was cut; at least one.
        logprobs: of each id, in nats, at temperature 1 and before anything that steers sampling.
        cut: it came to `max_new_tokens`.
    """

    ids: list[int]
    logprobs: list[float]
    cut: bool


class Sampler:
    """Answers of a model in training. What it remembers of prompts lasts exactly as long as the weights do.

    Args:
        model: in training, sharded or not.
        stop_ids: tokens that end an answer.
        config: how answers are drawn; see `RolloutConfig`.
        longest: tokens that a prompt and its answer have together at most.
        precision: of products.
        ranks: of the run; all of them call `sample` at the same time, each with prompts of its own.

    Raises `UsageError` when no rank has whole layers, or adapters are trained on several.
    """

    def __init__(
        self,
        model: Gemma2,
        stop_ids: frozenset[int],
        config: RolloutConfig,
        *,
        longest: int,
        precision: Precision = "float32",
        ranks: Ranks = SINGLE,
    ) -> None:
        _check(model, ranks)
        self.trained, self.config = model, config
        self._mixed = precision == "bf16"
        self._copy: Gemma2 | None = None
        if ranks.world > 1 or (self._mixed and not adapters(model)):
            self._copy = _empty_copy(model, torch.bfloat16 if self._mixed else torch.float32)
        writer = self._copy or model
        # As much memory as this many answers can need: no answer ever waits for another's pages, so that what is
        # computed together depends on nothing but the prompts.
        pages = config.side_by_side * pages_for(model.config, longest)
        cache = pages * page_bytes(model.config, writer.cache_dtype)
        self.engine = Engine(writer, stop_ids, EngineConfig(cache_bytes=cache, max_requests=config.side_by_side))
        self._written_with: tuple[int, ...] | None = None

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Answer]]:
        """`config.samples` answers to each prompt, all written side by side.

        The same weights, prompts and seeds give the same answers. What is known of a prompt from an earlier call with
        the same weights is not computed again, see `forget`.
        """
        self._take_weights()
        was_training = self.trained.training
        self.trained.eval()
        requests = [self._submit(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        try:
            with torch.autocast(self.trained.device.type, torch.bfloat16, enabled=self._mixed and self._copy is None):
                while not self.engine.idle:
                    self.engine.step()
        finally:
            for request in (one for group in requests for one in group):
                self.engine.cancel(request)
            self.trained.train(was_training)
            self._let_go()
        return [[_answer(request) for request in group] for group in requests]

    def forget(self) -> None:
        """Forget all prompts, so that what follows has the same bits as in a process that has just begun."""
        self.engine.prefixes.clear()

    def _submit(self, prompt: Sequence[int], seed: int) -> list[Request]:
        params = SamplingParams(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.sample_temperature,
            logprobs=0,
            seed=seed,
        )
        return [self.engine.submit(prompt, params, choice) for choice in range(self.config.samples)]

    @torch.no_grad()
    def _take_weights(self) -> None:
        now = _version(self.trained)
        if self._copy is not None:
            given = dict(self.trained.named_parameters())
            for name, p in self._copy.named_parameters():
                if not p.numel():
                    p.data = large(torch.empty(given[name].shape, dtype=p.dtype, device=p.device))
                p.copy_(_whole(given[name]))
        if now is None or now != self._written_with:
            self.engine.weights_changed(in_place=True)
            self._written_with = now

    def _let_go(self) -> None:
        if self._copy is not None and self._copy.device.type == "cpu":
            for p in self._copy.parameters():
                p.data = p.data.new_empty(0)


def _answer(request: Request) -> Answer:
    if request.failure:
        raise request.failure
    logprobs = [event.logprob.logprob for event in request.events if event.logprob]
    return Answer(request.generated, logprobs, request.events[-1].last == "length")


def _version(model: Gemma2) -> tuple[int, ...] | None:
    """Another one after every change of what is trained; None: nobody counts, so suppose that it has changed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return None if any(map(is_sharded, trained)) else tuple(p._version for p in trained)


def _whole(p: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return p.full_tensor() if is_sharded(p) else p  # type: ignore[attr-defined]


def _empty_copy(model: Gemma2, dtype: torch.dtype) -> Gemma2:
    """The same network without gradients; untouched memory of a CPU costs nothing."""
    with torch.device("meta"):
        copy = Gemma2(model.config)
    copy.attention_backend = model.attention_backend
    return copy.to(dtype).to_empty(device=model.device).requires_grad_(False).eval()


def _check(model: Gemma2, ranks: Ranks) -> None:
    if ranks.tensor_parallel > 1:
        raise UsageError(
            "answers cannot be written with split layers",
            f"{ranks.tensor_parallel} processes share the matrices of each layer",
            "leave --tensor-parallel out: weights are sharded, and gathered to write",
        )
    if ranks.world > 1 and adapters(model):
        raise UsageError(
            "answers cannot be written with adapters on several processes",
            "each process writes with a copy of the whole weights",
            "train all weights, or adapters in one process",
        )
