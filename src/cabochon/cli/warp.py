"""`cabochon warp`: policies trained, merged, and trained on from what came out."""

import hashlib
import json as json_format
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError
from cabochon.cli.config import arguments_of, read_toml
from cabochon.cli.options import HubOptions, Json, folder_argument
from cabochon.cli.train_options import Device
from cabochon.recipe.warp_config import WarpConfig

if TYPE_CHECKING:
    from cabochon.cli.policies import Trainer
    from cabochon.data.config import DataConfig
    from cabochon.recipe.front import Measured
    from cabochon.recipe.warp import Policy
    from cabochon.train.policy_measure import PolicyMeasure

# Flags of `cabochon train policy` that this command gives itself.
OURS = ("model", "out", "seed", "steps", "resume", "config", "save_dtype", "merge_adapters", "json")


@dataclass(frozen=True)
class Told:
    """A file in parts: what WARP is told, the flags of its policies, and what these make."""

    warp: WarpConfig
    flags: dict[str, Any]
    policy: dict[str, Any]


def warp(
    config: Annotated[Path, Parameter(help="A TOML file; docs/alignment.md has one.")],
    out: Annotated[Path, Parameter(help="The folder of all that is trained and merged.")],
    /,
    *,
    baseline: Annotated[
        bool, Parameter(negative="", help="Also train one policy for as many steps as all together, and compare.")
    ] = False,
    parallel: Annotated[int, Parameter(help="Policies trained at the same time; 0: one for each GPU.")] = 0,
    ray: Annotated[bool, Parameter(negative="", help="Train them as tasks of Ray, wherever it has room.")] = False,
    ray_gpus: Annotated[float, Parameter(help="GPUs of each of them.")] = 0.0,
    ray_cpus: Annotated[float, Parameter(help="Cores of each of them, where they have no GPU.")] = 1.0,
    plan: Annotated[
        bool, Parameter(negative="", help="Print what is to be trained next, as commands, and train nothing.")
    ] = False,
    threads: Annotated[int, Parameter(help="For merging; 0: one for each core.")] = 0,
    device: Device = None,
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Align a model by WARP: train several policies, merge them on the sphere, pull the merge back, start again there.

    At the end shares of the last merge are measured on held-out prompts, reward over distance from the start, and the
    best is written to OUT/model. A command that was stopped or killed goes on when it is given again. With --ray
    policies are trained on many machines; all of them have to see OUT, the start and the prompts under the same paths.

    Example: cabochon warp warp.toml runs/warp --baseline
    """
    if min(parallel, threads, ray_gpus, ray_cpus) < 0:
        raise UsageError("a number of processes, threads or cores cannot be negative", "it counts them", "0 chooses it")
    told, folder = _read(config), folder_argument(out, "OUT")
    from cabochon.base.files import only_writer
    from cabochon.cli.policies import RayTrainer, Signalled, Trainer, places
    from cabochon.recipe.warp import baseline as plain
    from cabochon.recipe.warp import begin, train_and_merge
    from cabochon.weights.hub import resolve

    start = resolve(told.warp.model, **asdict(hub))
    _check(told, start)
    flags = told.flags | ({"device": device} if device else {})
    train = RayTrainer(flags, (), gpus=ray_gpus, cpus=ray_cpus) if ray else Trainer(flags, places(parallel))
    try:
        with only_writer(folder):
            begin(folder, told.warp, told.flags)
            if plan:
                _print_plan(told, start, folder, train, baseline, threads)
                return 0
            slerp = train_and_merge(told.warp, start, folder, train, threads=threads, note=_note)
            single = plain(told.warp, start, folder)
            if baseline and not single.done:
                _note(f"the plain run: {single.steps} steps")
                train([single])
            return _finish(told, start, slerp, folder, baseline=baseline, device=device, json=json, threads=threads)
    except Signalled as stopped:
        print("stopped and saved; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    except OSError as error:
        raise MissingResource(
            f"{folder} cannot be written", error.strerror or str(error), "name another folder, or free some space"
        ) from None


def _read(path: Path) -> Told:
    """Everything that can be wrong with the file is said before anything is trained."""
    from cabochon.cli.train_policy import policy

    values = read_toml(path)
    flags = values.pop("policy", {})
    if not isinstance(flags, dict) or not flags:
        raise UsageError(
            f"{path} does not say how policies are trained", "it has no table [policy]", 'add one: reward = ["exact"]'
        )
    ours = next((name for name in flags if name in OURS), None)
    if ours:
        raise UsageError(
            f"[policy] of {path} cannot have {ours}", "each policy gets its own", "write it above the table, or nowhere"
        )
    if isinstance(values.get("steps"), int):
        values["steps"] = [values["steps"]]
    known = arguments_of(_warp_config, "warp", values, str(path))
    # A run has to have a folder, which is not known here.
    parsed = arguments_of(policy, "train policy", flags | {"out": "."}, f"[policy] of {path}")
    if not parsed["rewards"].reward or not parsed["prompts"].prompts:
        missing = "prompts" if parsed["rewards"].reward else "reward"
        raise UsageError(f"[policy] of {path} cannot be trained", f"it has no {missing}", f'add {missing} = ["..."]')
    return Told(known["config"], flags, parsed)


def _warp_config(*, config: Annotated[WarpConfig, Parameter(name="*")]) -> None:
    """What the keys above the table make."""


def _check(told: Told, start: Path) -> None:
    """Raise what policies and measurements would, hours later."""
    import tempfile

    from cabochon.text.tokenizer import load_tokenizer
    from cabochon.train.on_policy import prompts_of
    from cabochon.train.policy_config import check_policy
    from cabochon.train.reward_build import open_rewards

    train, answers = told.policy["train"], told.policy["answers"]
    check_policy(train, answers)
    for data in (told.policy["prompts"].config(train), _held_out(told)):
        if data:
            prompts_of(data, load_tokenizer(start), train, answers)
    with tempfile.TemporaryDirectory() as folder:
        open_rewards(told.policy["rewards"], Path(folder), "cpu").close()


def _held_out(told: Told) -> "DataConfig | None":
    from cabochon.data.config import DataConfig

    prompts = told.policy["prompts"]
    options = {"fold_system": prompts.fold_system, "max_bad_rows": prompts.max_bad_rows}
    return DataConfig(sources=told.warp.held_out, **options) if told.warp.held_out else None


def _finish(
    told: Told, start: Path, slerp: Path, out: Path, *, baseline: bool, device: str | None, json: bool, threads: int
) -> int:
    """Measure, choose, write the result."""
    from cabochon.recipe.front import best_share, front_table, summary, write_front
    from cabochon.recipe.warp import write_result

    config, beta = told.warp, told.policy["train"].beta
    points = list(_points(told, start, slerp, out, baseline, device)) if config.held_out else []
    eta = config.choose or best_share(points, beta)
    if points:
        write_front(out, points, beta, eta)
    folder = write_result(config, start, slerp, eta, out, threads=threads)
    if json:
        print(json_format.dumps({"folder": str(folder), **summary(points, beta, eta)}))
        return 0
    if points:
        from rich.console import Console

        Console(stderr=True).print(front_table(points, beta, eta))
    print(folder)
    return 0


def _points(
    told: Told, start: Path, slerp: Path, out: Path, baseline: bool, device: str | None
) -> "Iterator[Measured]":
    from cabochon.base.progress import track
    from cabochon.recipe.front import measured_run, measured_shares
    from cabochon.recipe.warp import baseline as plain

    config = told.warp
    with _measure(told, start, out, device) as (measure, word):
        where: dict[str, Any] = {"word": word, "out": out, "device": str(measure.reference.device)}
        total = len(config.etas) + (config.baseline_points if baseline else 0)
        with track(total, "measuring", unit="models") as advance:
            for point in measured_shares(start, slerp, config.etas, measure, **where):
                yield point
                advance(1)
            for point in measured_run(plain(config, start, out), measure, **where) if baseline else ():
                yield point
                advance(1)


@contextmanager
def _measure(told: Told, start: Path, out: Path, device: str | None) -> "Iterator[tuple[PolicyMeasure, str]]":
    """What measures a model, and a word for what its scores depend on beside the model."""
    import torch

    from cabochon.text.tokenizer import load_tokenizer
    from cabochon.train.on_policy import prompts_of
    from cabochon.train.parallel import setup
    from cabochon.train.policy_measure import PolicyMeasure
    from cabochon.train.reward_build import open_rewards
    from cabochon.weights.folder import load_model

    train, rewards = told.policy["train"], told.policy["rewards"]
    rollouts = replace(told.policy["answers"], samples=told.warp.held_out_samples)
    tokenizer, data = load_tokenizer(start), _held_out(told)
    assert data is not None
    prompts = prompts_of(data, tokenizer, train, rollouts)
    reference = load_model(start, dtype=torch.float32, device=setup(device).device).requires_grad_(False)
    depends = [told.warp.settled(), told.flags, rollouts.settled(), rewards.settled(), prompts.identity()]
    word = hashlib.sha256(json_format.dumps(depends, default=str).encode()).hexdigest()[:16]
    opened = open_rewards(rewards, out, str(reference.device))
    try:
        yield PolicyMeasure(reference, prompts, opened, tokenizer, rollouts, train, rewards.max_failed_rewards), word
    finally:
        opened.close()


class _Left(Exception):
    """Policies that are still to be trained before anything else is merged."""

    def __init__(self, policies: "Sequence[Policy]") -> None:
        super().__init__(policies)
        self.policies = policies


def _print_plan(told: Told, start: Path, out: Path, train: "Trainer", baseline: bool, threads: int) -> None:
    """The commands of the first iteration that has something left: those of later ones have no start yet.

    What can be merged already is merged, so that there is a start for them.
    """
    from cabochon.recipe.warp import baseline as plain
    from cabochon.recipe.warp import train_and_merge

    def leave(policies: "Sequence[Policy]") -> None:
        raise _Left(policies)

    left: list[Policy] = []
    try:
        train_and_merge(told.warp, start, out, leave, threads=threads)
    except _Left as found:
        left = list(found.policies)
    single = plain(told.warp, start, out)
    for policy in [*left, *([single] if baseline and not single.done else [])]:
        print(shlex.join(["cabochon", *train.command(policy)]))
    if not left:
        print("all policies are trained: without --plan the result is measured and written", file=sys.stderr)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
