"""From the names of rewards to what scores answers."""

from pathlib import Path

from cabochon.base.errors import MissingResource, UsageError
from cabochon.train.judge import JudgeConfig, open_judge
from cabochon.train.reward_config import RewardConfig
from cabochon.train.reward_process import FunctionScorer
from cabochon.train.scoring import Rewards, Scorer

VERDICTS = "judge.jsonl"


def open_rewards(config: RewardConfig, out: Path, device: str) -> Rewards:
    """The rewards of a configuration, checked as far as they can be without an answer.

    Args:
        config: names, weights, limits.
        out: a folder, in which a judge's verdicts are kept unless the configuration names a file.
        device: where reward models compute.

    Raises:
        UsageError: there is none, or one has no such name or option.
        BadInput, MissingResource: a file of functions, a schema, or the judge's prompt or cache cannot be used.
    """
    if not config.reward:
        raise UsageError("answers cannot be told apart", "no reward is named", "--reward exact, or another one")
    scorers: dict[str, Scorer] = {}
    try:
        for named in config.reward:
            scorers[_label(named, scorers)] = _open(named, config, out, device)
    except BaseException:
        Rewards(scorers).close()
        raise
    return Rewards(scorers, config.reward_weights)


def _open(named: str, config: RewardConfig, out: Path, device: str) -> Scorer:
    kind, _, option = named.partition(":")
    if kind == "model":
        from cabochon.train.reward_model import ModelScorer  # torch, which other rewards do without

        if not option:
            raise UsageError("a reward model has no folder", "nothing stands behind it", "--reward model:runs/reward")
        return ModelScorer(Path(option).expanduser(), device)
    if kind == "judge":
        return open_judge(_judge(option, config, out))
    return FunctionScorer(named, config.reward_seconds)


def _judge(url: str, config: RewardConfig, out: Path) -> JudgeConfig:
    asked = {"url": url, "model": config.judge_model}
    if config.judge_prompt is not None:
        try:
            asked["template"] = config.judge_prompt.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise MissingResource(f"{config.judge_prompt} cannot be read", cause, "check --judge-prompt") from None
    return JudgeConfig(
        **asked,
        scale=config.judge_scale,
        seconds=max(60.0, config.reward_seconds),
        cache=(config.judge_cache or out / VERDICTS).expanduser(),
    )


def _label(named: str, taken: dict[str, Scorer]) -> str:
    """What a reward is called in the log: its kind, or the user's function; numbered where there are several."""
    kind, _, _ = named.partition(":")
    label = named.rpartition(":")[2] if kind.endswith(".py") or "/" in kind else kind
    return label if label not in taken else f"{label}_{len(taken) + 1}"
