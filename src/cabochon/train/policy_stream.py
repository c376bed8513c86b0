"""Answers of the policy with what they were worth: rollouts, rewards, the reference's opinion, advantages.

As with all rollouts, what comes out is a function of the seed, the step and the weights. Where the same answers serve
several passes, a checkpoint between these holds the answers, because other weights would write others.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, CabochonError
from cabochon.data.pack import IGNORED
from cabochon.data.prompts import conversation
from cabochon.text.tokenizer import Tokenizer
from cabochon.train.advantages import advantages
from cabochon.train.anchor import Seen, View, look, of_model
from cabochon.train.loop import Halted
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.policy import PolicyBatch
from cabochon.train.policy_config import PolicyConfig
from cabochon.train.rollout import Rollout, RolloutBatch, RolloutStream, pack_rollouts
from cabochon.train.scoring import Rewards, Sample, Scored, check_failures
from cabochon.train.shards import let_go
from cabochon.train.step import Trainer, precision

CURVES = {  # of what `_measures` gives
    "reward": "mean reward of an answer",
    "kl": "KL divergence from the reference, nats per token",
    "entropy": "entropy of the policy, nats per token",
    "length": "tokens of an answer",
}
MEMORY = 0.9  # of the mean reward that reinforce expects: what each step leaves of it


@dataclass(frozen=True)
class Worth:
    """What decides about the answers of a run besides the model.

    Args:
        rewards: of answers.
        most_failures: answers without one, over the whole run, before it stops.
        tokenizer: for the text of answers.
        reference: what the policy is held to.
        astray: what to say when the KL divergence is above the budget: where there are weights from before.
    """

    rewards: Rewards
    most_failures: int
    tokenizer: Tokenizer
    reference: View
    astray: Callable[[int], str]


def sample_of(rollout: Rollout, tokenizer: Tokenizer, stop_ids: Collection[int]) -> Sample:
    """What rewards are asked about: the last thing that the user said, and the answer without its end."""
    row = rollout.prompt.row
    text = tokenizer.decode([token for token in rollout.answer.ids if token not in stop_ids])
    return Sample(conversation(row, fold=True)[-1]["content"], text, row)


class PolicyStream:
    """A `Stream` without end. Every rollout serves `passes` steps.

    Args:
        rollouts: answers of `trainer.model`.
        trainer: whose weights write and learn; its configuration is a `PolicyConfig`.
        worth: see there.
    """

    def __init__(self, rollouts: RolloutStream, trainer: Trainer, worth: Worth) -> None:
        assert isinstance(trainer.config, PolicyConfig)
        self.rollouts, self.trainer, self.worth = rollouts, trainer, worth
        self.config: PolicyConfig = trainer.config
        self.temperature = rollouts.config.sample_temperature
        self.baseline: float | None = None
        self.failed, self.reason = 0, ""
        self._held: PolicyBatch | None = None  # to be learned from again
        self._passes = 0  # that were made of it

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PolicyBatch:
        """Raises `Halted` for too many answers without a reward, and `BadInput` above the KL budget."""
        if self._held is None:
            before = self.rollouts.state(), self.baseline, self.failed
            try:
                self._held = self._new()
            except CabochonError:
                self._go_to(*before)
                raise
        batch = self._held
        self._passes = (self._passes + 1) % self.config.passes
        if not self._passes:
            self._held = None
        return batch

    def _new(self) -> PolicyBatch:
        rollouts, ranks = self.rollouts.rollouts(), self.trainer.ranks
        tokenizer, stops = self.worth.tokenizer, self.rollouts.sampler.engine.stop_ids
        scored = self.worth.rewards([sample_of(rollout, tokenizer, stops) for rollout in rollouts])
        self._count_failures(scored)
        good = [(rollout, one) for rollout, one in zip(rollouts, scored, strict=True) if one.total is not None]
        batch = pack_rollouts([rollout for rollout, _ in good], self.config.length, ranks)
        seen = self._look(batch)
        measures = self._measures(batch, [one for _, one in good], seen) | {"failed": self._share_failed(scored)}
        if self.config.kl_budget and measures["kl"] > self.config.kl_budget:
            raise BadInput(
                f"training stopped: the KL divergence is {measures['kl']:.3g} nats per token",
                f"--kl-budget {self.config.kl_budget:g} allows no more",
                self.worth.astray(self.trainer.step_number),
            )
        weighed = self._advantages(batch, [float(one.total or 0) for _, one in good], seen)
        return self._made(batch, weighed, seen, measures)

    def _count_failures(self, scored: Sequence[Scored]) -> None:
        reasons = [one.reason for one in scored if one.total is None]
        if reasons:
            self.reason = reasons[-1]
        self.failed += int(self.trainer.ranks.total(len(reasons)))
        try:
            check_failures(self.failed, self.worth.most_failures, self.reason or "on another process")
        except BadInput as error:
            raise Halted(error.what, error.cause, error.hint) from None

    def _share_failed(self, scored: Sequence[Scored]) -> float:
        return self._mean([float(one.total is None) for one in scored])

    def _look(self, batch: RolloutBatch) -> Seen:
        """Policy and reference on the answers, in parts as small as those of training."""
        model, config = self.trainer.model, self.config
        transform = LogitTransform(model.config.final_softcap, self.temperature)
        was_training = model.training
        model.eval()
        with precision(model, config):
            parts = [
                look(of_model(model), self.worth.reference, part, transform, model.config.vocab_size)
                for part in batch.split(config.micro_rows or len(batch.ids))
            ]
        let_go(model)
        model.train(was_training)
        return Seen(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Seen)))

    def _mean(self, values: Sequence[float] | Tensor) -> float:
        """Over all ranks; NaN, which the log writes as null, where there is nothing."""
        total, count = self.trainer.ranks.total(float(sum(values))), self.trainer.ranks.total(len(values))
        return total / count if count else float("nan")

    def _measures(self, batch: RolloutBatch, scored: Sequence[Scored], seen: Seen) -> dict[str, float]:
        kept, answers = batch.targets != IGNORED, [rollout.answer for rollout in batch.rollouts]
        found = {"reward": self._mean([one.total for one in scored if one.total is not None])}
        if len(self.worth.rewards.scorers) > 1:
            parts = {name: [one.parts[name] for one in scored] for name in self.worth.rewards.scorers}
            found |= {f"reward_{name}": self._mean(values) for name, values in parts.items()}
        return found | {
            "kl": self._mean(seen.kl[kept].double()),
            "entropy": self._mean(seen.entropy[kept].double()),
            "length": self._mean([float(len(answer.ids)) for answer in answers]),
            "cut": self._mean([float(answer.cut) for answer in answers]),
        }

    def _advantages(self, batch: RolloutBatch, totals: Sequence[float], seen: Seen) -> Tensor:
        """Of each answer, float64 [N]; takes the rewards into what is expected of later ones."""
        config, lengths = self.config, [len(rollout.answer.ids) for rollout in batch.rollouts]
        rewards = torch.tensor(totals, dtype=torch.float64)
        rewards = rewards - config.length_penalty * torch.tensor(lengths, dtype=torch.float64)
        if not config.kl_is_in_loss:
            rewards = rewards - config.beta * _sums(batch, seen.logprobs.double() - seen.reference.double())
        groups = torch.tensor([rollout.group for rollout in batch.rollouts], dtype=torch.long)
        scale, ranks = config.advantage_scale, self.trainer.ranks
        found = advantages(config.estimator, rewards, groups, self.baseline or 0.0, scale, ranks)
        mean = self._mean(rewards)
        if mean == mean:
            self.baseline = mean if self.baseline is None else MEMORY * self.baseline + (1 - MEMORY) * mean
        return found

    def _made(self, batch: RolloutBatch, weighed: Tensor, seen: Seen, measures: Mapping[str, float]) -> PolicyBatch:
        there, ranks = batch.answers >= 0, self.trainer.ranks
        of_answer = batch.answers.clamp_min(0)
        lengths = torch.tensor([len(rollout.answer.ids) for rollout in batch.rollouts] or [1])
        if not len(weighed):
            weighed = torch.zeros(1)
        count = max(1.0, ranks.total(int(there.sum()) if self.config.average == "tokens" else len(batch.rollouts)))
        shares = there / (lengths[of_answer] * count if self.config.average == "mean" else count)
        spread = torch.where(there, weighed.float()[of_answer], 0)
        return PolicyBatch(
            batch.ids, batch.targets, batch.documents, spread, seen.logprobs, seen.reference, shares.float(), measures
        )

    def state(self) -> dict[str, Any]:
        """JSON-able: what comes next, and between passes the answers themselves."""
        held = self._held if self._passes else None
        return self.rollouts.state() | {
            "baseline": self.baseline,
            "failed": self.failed,
            "pass": self._passes,
            "answers": held
            and {name: value if name == "measures" else value.tolist() for name, value in vars(held).items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises as the rollouts do."""
        self._go_to(state, state["baseline"], state["failed"])
        self._passes, held = int(state["pass"]), state["answers"]
        if held:
            values: dict[str, Any] = {k: v if k == "measures" else torch.tensor(v) for k, v in held.items()}
            self._held = PolicyBatch(**values)

    def _go_to(self, rollouts: Mapping[str, Any], baseline: float | None, failed: int) -> None:
        self.rollouts.restore(rollouts)
        self.baseline, self.failed = baseline, failed
        self._held, self._passes = None, 0

    def empty(self) -> PolicyBatch:
        """Never asked for: no rank comes to an end."""
        raise AssertionError

    def remarks(self) -> list[str]:
        """What whoever started the run should know, in sentences."""
        found = self.rollouts.remarks()
        if self.failed:
            found.append(f"{self.failed} answers got no reward and were left out ({self.reason or 'earlier'})")
        return found


def _sums(batch: RolloutBatch, values: Tensor) -> Tensor:
    """Sums of values [B, T] over the targets of each answer [N]."""
    there = batch.answers >= 0
    out = torch.zeros(len(batch.rollouts), dtype=values.dtype)
    return out.index_add_(0, batch.answers[there], values[there])
