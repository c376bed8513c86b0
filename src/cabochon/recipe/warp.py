"""WARP, weight averaged rewarded policies (arXiv 2406.16768, algorithm 1): train, merge, train on from what came out.

OUT/warp.json                     what decides the folders
OUT/iteration-1/policy-1/ ...     runs of `cabochon train policy`, alike but for their seeds
OUT/iteration-1/slerp/            their task vectors, interpolated on the sphere, added to the start
OUT/iteration-1/liti/             that, pulled back towards the start: the start of the next iteration
OUT/baseline/                     one policy for as many steps as all of them together
OUT/front.jsonl, .json, .svg      what shares of the last slerp get, see front.py
OUT/model/                        the result

Every folder is written whole or not at all, and one that is there is not made again. So a process that was killed goes
on where it stopped, and policies can as well be trained elsewhere. Between iterations all weights are float32: a task
vector is smaller than what bfloat16 rounds away.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cabochon.base.errors import BadInput, UsageError
from cabochon.base.files import atomic_write
from cabochon.merge.config import MergeConfig, ModelRef, Slice, Source
from cabochon.merge.run import CONFIG_FILE, Merge
from cabochon.recipe.warp_config import WarpConfig

SETTINGS = "warp.json"


@dataclass(frozen=True)
class Policy:
    """A policy that is to be trained.

    Args:
        start: the model folder that it starts from.
        out: the folder of its run.
        seed: of the order of its prompts, and of its answers.
        steps: how many.
        points: checkpoints to keep, evenly spaced; 0: the last one, and none once it is merged.
    """

    start: Path
    out: Path
    seed: int
    steps: int
    points: int = 0

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.out / "config.json").exists()


# Trains policies to their end, side by side or one after the other.
Train = Callable[[Sequence[Policy]], None]


def begin(out: Path, config: WarpConfig, told: dict[str, Any]) -> None:
    """Note in a folder what decides what is written to it. `told` is what the policies are told.

    Raises `UsageError` when it holds something else, or the same with other settings, and `BadInput` when what was
    noted cannot be read.
    """
    path, now = out / SETTINGS, json.loads(json.dumps(config.settled() | {"policy": told}, default=str))
    if not path.exists():
        if any(file.name[:1] != "." for file in out.iterdir()):
            raise UsageError(f"{out} was not written", "there is something else in it", "name a new folder")
        with atomic_write(path) as file:
            file.write(json.dumps(now, indent=1).encode())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} cannot be read", f"it is not JSON: {error}", "name a new folder") from None
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{out} holds a run with other settings",
                f"{name} was {before.get(name)!r} and is {now.get(name)!r}",
                "give the settings that it had to go on with it, or name a new folder",
            )


def policies(config: WarpConfig, start: Path, out: Path) -> list[list[Policy]]:
    """Those of each iteration."""
    found = []
    for iteration in range(config.iterations):
        seeds = [config.seed + iteration * config.policies + number for number in range(config.policies)]
        folder, steps = out / f"iteration-{iteration + 1}", config.steps_of(iteration)
        found.append([Policy(start, folder / f"policy-{n}", seed, steps) for n, seed in enumerate(seeds, start=1)])
        start = folder / "liti"
    return found


def baseline(config: WarpConfig, start: Path, out: Path) -> Policy:
    """One policy for as many steps as all of WARP's together."""
    return Policy(start, out / "baseline", config.seed, config.total_steps, config.baseline_points)


def train_and_merge(
    config: WarpConfig,
    start: Path,
    out: Path,
    train: Train,
    *,
    threads: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Carry out what is left of all iterations; the folder of the last slerp.

    Args:
        start: the model folder where all begins.
        out: the folder that `begin` was asked about.
        train: called once for each iteration, with the policies that are not there yet.
        threads: for merging; 0: one for each core.
        note: called with what the user should know.

    Raises what `train` and merging raise.
    """
    slerp = out
    for number, group in enumerate(policies(config, start, out), start=1):
        base, slerp, liti = group[0].start, group[0].out.parent / "slerp", group[0].out.parent / "liti"
        waiting = [policy for policy in group if not policy.done]
        if waiting and not slerp.exists():
            note(f"iteration {number} of {config.iterations}: {len(waiting)} of {len(group)} policies to train")
            train(waiting)
        merge("warp_slerp", base, [policy.out for policy in group], slerp, threads=threads)
        if number < config.iterations:
            merge("liti", base, [slerp], liti, {"eta": config.eta}, threads)
        for policy in group:
            shutil.rmtree(policy.out / "checkpoints", ignore_errors=True)
    return slerp


def merge(
    method: str,
    base: Path,
    models: Sequence[Path],
    out: Path,
    parameters: Mapping[str, float] = MappingProxyType({}),
    threads: int = 0,
) -> None:
    """Write a merged model, in float32, unless it is there already."""
    if not out.exists():
        prepared(method, base, models, parameters).write(out, threads=threads)


def write_result(config: WarpConfig, start: Path, slerp: Path, eta: float, out: Path, *, threads: int = 0) -> Path:
    """The folder of the result: a share of the last slerp, unless the same one is there already."""
    folder = out / "model"
    work = prepared("liti", start, [slerp], {"eta": eta}, config.save_dtype)
    there = folder / CONFIG_FILE
    if not there.exists() or there.read_text(encoding="utf-8") != work.config.text:
        work.write(folder, threads=threads, overwrite=True)
    return folder


def prepared(
    method: str, base: Path, models: Sequence[Path], parameters: Mapping[str, float], dtype: str = "float32"
) -> Merge:
    """A merge of folders, in float32, ready to be written in `dtype`."""
    refs = [ModelRef(str(model)) for model in models]
    told = [f"merge_method: {method}", f"base_model: {base}", "models:", *(f"  - model: {model}" for model in models)]
    told += ["parameters:", *(f"  {name}: {value}" for name, value in parameters.items())] if parameters else []
    config = MergeConfig(
        method=method,
        slices=(Slice(tuple(map(Source, refs))),),
        base=ModelRef(str(base)),
        dtype="float32",
        out_dtype=dtype,
        parameters=dict(parameters),
        text="\n".join([*told, "dtype: float32", f"out_dtype: {dtype}", ""]),
    )
    return Merge.prepare(config)
