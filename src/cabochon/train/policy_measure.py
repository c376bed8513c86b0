"""What a policy gets for its answers to held-out prompts, and how far it is from the model where it started."""

import math
from dataclasses import dataclass
from statistics import fmean

import torch

from cabochon.base.errors import BadInput
from cabochon.data.pack import IGNORED
from cabochon.data.prompts import Prompts
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer
from cabochon.train.anchor import look, of_model
from cabochon.train.config import TrainConfig
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.policy_stream import sample_of
from cabochon.train.rollout import Rollout, pack_rollouts
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.sampler import Sampler
from cabochon.train.scoring import Rewards, Scored, check_failures
from cabochon.train.step import precision

ROWS = 16  # of answers, that both models look at together


@dataclass(frozen=True)
class PolicyMeasure:
    """Called with a model, gives its means over all answers, the same for the same weights.

    Args:
        reference: the model where it all started, on the device of the models that are measured.
        prompts: what is asked; every model gets the same seeds.
        rewards: of answers. Those that have none are left out.
        tokenizer: of all these models.
        rollouts: how answers are drawn, and how many to each prompt.
        train: the precision of products, and the length of a row, which holds a prompt and its answer.
        most_failures: answers of one model that may have no reward.
    """

    reference: Gemma2
    prompts: Prompts
    rewards: Rewards
    tokenizer: Tokenizer
    rollouts: RolloutConfig
    train: TrainConfig
    most_failures: int

    def __call__(self, model: Gemma2) -> dict[str, float]:
        """`reward` and its standard error, `kl` from the reference in nats per answer and per token, `length`, `cut`,
        and the share that `failed`: had no reward.

        Raises `BadInput` when no answer got a reward, or too many did not: models would be compared by other answers.
        """
        stops = self.tokenizer.stop_ids | frozenset(model.config.eos_ids)
        rollouts = self._answers(model, stops)
        scored = self.rewards([sample_of(rollout, self.tokenizer, stops) for rollout in rollouts])
        totals = [one.total for one in scored if one.total is not None]
        if not totals:
            raise BadInput("no answer got a reward", _reason(scored), "mend the reward, then give the same command")
        failed = len(scored) - len(totals)
        check_failures(failed, self.most_failures, _reason(scored))
        mean = fmean(totals)
        spread = math.sqrt(sum((total - mean) ** 2 for total in totals) / max(1, len(totals) - 1) / len(totals))
        kl, tokens = self._divergence(model, rollouts)
        return {
            "reward": mean,
            "reward_error": spread,
            "kl": kl / len(rollouts),
            "kl_per_token": kl / tokens,
            "length": tokens / len(rollouts),
            "cut": fmean(rollout.answer.cut for rollout in rollouts),
            "failed": failed / len(scored),
        }

    def _answers(self, model: Gemma2, stops: frozenset[int]) -> list[Rollout]:
        longest = min(self.prompts.longest + self.rollouts.max_new_tokens, model.config.max_position)
        sampler = Sampler(model, stops, self.rollouts, longest=longest, precision=self.train.precision)
        asked = list(self.prompts)
        answers = sampler.sample([prompt.ids for prompt in asked], range(len(asked)))
        pairs = enumerate(zip(asked, answers, strict=True))
        return [Rollout(prompt, answer, group) for group, (prompt, several) in pairs for answer in several]

    @torch.no_grad()
    def _divergence(self, model: Gemma2, rollouts: list[Rollout]) -> tuple[float, int]:
        """The sum over all tokens of the KL divergence, over the whole vocabulary, and how many tokens there are."""
        views, total, tokens = (of_model(model), of_model(self.reference)), 0.0, 0
        transform = LogitTransform(model.config.final_softcap, self.rollouts.sample_temperature)
        with precision(model, self.train):
            for part in pack_rollouts(rollouts, self.train.length).split(ROWS):
                seen = look(*views, part, transform, model.config.vocab_size)
                kept = part.targets != IGNORED
                total, tokens = total + float(seen.kl[kept].double().sum()), tokens + int(kept.sum())
        return total, tokens


def _reason(scored: list[Scored]) -> str:
    return next(one.reason for one in scored if one.total is None)
