"""`cabochon synthesize`: a teacher's answers to a file of prompts, or the best and worst of several, to tune on."""

import json as json_format
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import DeviceOptions, HubOptions, Json, Model, SamplingOptions, load_lm
from cabochon.train.reward_config import RewardConfig

if TYPE_CHECKING:
    from cabochon.lm.best_of import Asked, BestOf
    from cabochon.train.scoring import Rewards

Reward = Annotated[RewardConfig, Parameter(name="*", group="What answers are worth")]


def synthesize(
    model: Model = None,
    /,
    *,
    data: Annotated[
        tuple[str, ...],
        Parameter(negative="", allow_leading_hyphen=True, help="Files or folders of rows with `prompt` or `messages`."),
    ],
    out: Annotated[Path, Parameter(help="The file to write: a conversation, or a pair, on each line.")],
    batch: Annotated[int, Parameter(help="Prompts that are answered side by side.")] = 64,
    best_of: Annotated[int, Parameter(help="Answers to each prompt, of which --reward chooses.")] = 1,
    pairs: Annotated[
        bool, Parameter(negative="", help="Keep the best answer and the worst, for `cabochon train dpo`.")
    ] = False,
    rewards: Reward = RewardConfig(),
    json: Json = False,
    sampling: SamplingOptions = SamplingOptions(),
    device: DeviceOptions = DeviceOptions(),
    hub: HubOptions = HubOptions(),
) -> None:
    """Let a teacher answer prompts, and keep the answers as conversations for `cabochon train sft`.

    With --best-of the answer with the largest reward is kept, with --pairs also the one with the smallest, for
    `cabochon train dpo`. Answers that did not come to their end, and conversations that are there already, are left
    out. A command that was interrupted goes on where it stopped when it is given again.

    Example: cabochon synthesize google/gemma-2-9b-it --data prompts.jsonl --out answers.jsonl --temperature 0.7

    Example: cabochon synthesize --data sums.jsonl --best-of 8 --pairs --reward exact --temperature 1 --out pairs.jsonl
    """
    settings, out = sampling.arguments(), out.expanduser()
    if out.is_dir():
        raise UsageError(f"{out} cannot be written", "it is a folder", "name a file: --out answers.jsonl")
    for flag, value in (("--batch", batch), ("--best-of", best_of)):
        if value < 1:
            raise UsageError(f"{flag} cannot be {value}", "it has to be at least 1", f"change {flag}")
    _check(best_of, pairs, rewards, sampling)
    lm = load_lm(model, hub, device)
    from cabochon.base.progress import track
    from cabochon.data.prompts import prompt_rows
    from cabochon.lm.synthesize import synthesize

    total = sum(len(rows.sizes) for rows in prompt_rows(data))
    with (
        _best(best_of, pairs, rewards, out, str(lm.model.device)) as best,
        track(total, "answering", unit="prompts") as advance,
    ):
        name = model or ""
        done = synthesize(lm, data, out, named=name, batch=batch, sampling=settings, best=best, report=advance)
    if left := done.left_out():
        print(f"note: left out: {left}", file=sys.stderr)
    print(json_format.dumps({"file": str(out), **asdict(done)}) if json else out)


def _check(best_of: int, pairs: bool, rewards: RewardConfig, sampling: SamplingOptions) -> None:
    """Raise `UsageError` for flags that have no effect together."""
    what = "answers cannot be chosen like this"
    if best_of < 2 and (pairs or rewards.reward):
        raise UsageError(what, "there is one to each prompt", "add --best-of 8")
    if best_of > 1 and not rewards.reward:
        raise UsageError(what, "nothing says which is the best", "add --reward exact, or another one")
    if best_of > 1 and not sampling.temperature:
        raise UsageError(what, "at temperature 0 all answers to a prompt are the same", "add --temperature 1")


@contextmanager
def _best(best_of: int, pairs: bool, config: RewardConfig, out: Path, device: str) -> "Iterator[BestOf | None]":
    """How answers are chosen. Whatever scores them is closed behind the block."""
    if best_of < 2:
        yield None
        return
    from cabochon.lm.best_of import BestOf
    from cabochon.train.reward_build import open_rewards

    named = repr(config.settled())
    verdicts = config.judge_cache or out.with_name(f"{out.name}.judge.jsonl")
    opened = open_rewards(replace(config, judge_cache=verdicts), out.parent, device)
    try:
        yield BestOf(best_of, _scoring(opened, config.max_failed_rewards), pairs, named)
    finally:
        opened.close()


def _scoring(rewards: "Rewards", limit: int) -> "Callable[[Sequence[Asked]], list[float | None]]":
    """Sums of rewards; so many answers may have none."""
    from cabochon.train.scoring import Sample, check_failures

    failed = 0

    def score(asked: "Sequence[Asked]") -> list[float | None]:
        nonlocal failed
        found = rewards([Sample(*one) for one in asked])
        for one in found:
            failed += one.total is None
            check_failures(failed, limit, one.reason)
        return [one.total for one in found]

    return score
