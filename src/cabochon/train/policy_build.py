"""What policy optimisation needs besides rollouts: rewards, a reference, and where to send those who went astray."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cabochon.base.errors import UsageError
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import adapters
from cabochon.text.tokenizer import Tokenizer
from cabochon.train import checkpoint
from cabochon.train.anchor import View, beneath_adapters, of_average, of_model
from cabochon.train.optim import Average
from cabochon.train.policy_config import PolicyConfig
from cabochon.train.policy_stream import PolicyStream, Worth
from cabochon.train.rollout import RolloutStream
from cabochon.train.scoring import Rewards
from cabochon.train.step import Trainer


def policy_stream(
    rollouts: RolloutStream,
    trainer: Trainer,
    rewards: Rewards,
    most_failures: int,
    *,
    tokenizer: Tokenizer,
    start: Callable[[], Gemma2],
    out: Path,
) -> PolicyStream:
    """Answers of the trained model with what they are worth. An average that is the reference is put into the trainer.

    Args:
        rollouts: answers of `trainer.model`.
        trainer: its configuration is a `PolicyConfig`.
        rewards: of the answers.
        most_failures: answers without one before the run stops.
        tokenizer: for the text of answers.
        start: loads the model that the run starts from, frozen, where a copy is needed.
        out: the run's folder.

    Raises `UsageError` for what several processes cannot do, and what `start` raises.
    """
    config = trainer.config
    assert isinstance(config, PolicyConfig)
    if trainer.ranks.world > 1 and (config.passes > 1 or config.reference == "ema"):
        raise UsageError(
            "several processes cannot optimise this policy together",
            "--passes and --reference ema are for one process",
            "start it without torchrun, or leave these out",
        )
    reference = _reference(trainer, config, start)
    worth = Worth(rewards, most_failures, tokenizer, reference, partial(_astray, out))
    return PolicyStream(rollouts, trainer, worth)


def _reference(trainer: Trainer, config: PolicyConfig, start: Callable[[], Gemma2]) -> View:
    model = trainer.model
    if config.reference == "ema":
        trainer.average = Average(model, 1 - config.mu)
        return of_average(model, trainer.average)
    return beneath_adapters(model) if adapters(model) else of_model(start())


def _astray(out: Path, step: int) -> str:
    """What to do when the weights of this step are too far from the reference."""
    found = checkpoint.before(out, step)
    where = f"{found} is from before" if found else "the model that the run started from is the last one before"
    return f"{where}; start again with a larger --beta or a lower --learning-rate"
