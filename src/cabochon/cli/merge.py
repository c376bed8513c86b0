"""`cabochon merge`: several models to one, as a mergekit file says."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError
from cabochon.cli.options import HubAccess, Json, check_disk, folder_argument

if TYPE_CHECKING:
    from cabochon.merge.plan import Plan
    from cabochon.merge.run import Merge

GIB = 2**30


def merge(
    config: Annotated[Path, Parameter(help="A YAML file as mergekit reads it; docs/merging.md has the methods.")],
    out: Annotated[Path | None, Parameter(help="The folder to write.")] = None,
    /,
    *,
    dry_run: Annotated[bool, Parameter(negative="", help="Check everything, print the plan, write nothing.")] = False,
    inspect: Annotated[
        bool, Parameter(negative="", help="Compare the models with base_model, layer by layer, and write nothing.")
    ] = False,
    plot: Annotated[Path | None, Parameter(help="With --inspect: also draw a map of angles, as SVG, here.")] = None,
    seed: Annotated[int, Parameter(help="For methods that drop weights at random: the same seed, the same model.")] = 0,
    threads: Annotated[int, Parameter(help="How many; 0: one for each core. The result does not depend on it.")] = 0,
    shard_size: Annotated[float, Parameter(help="The most GB of weights in one file.")] = 5.0,
    hashes: Annotated[
        bool, Parameter(negative="", help="Put the SHA-256 of large weight files into the model card, too.")
    ] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a model folder that is there.")] = False,
    json: Json = False,
    hub: HubAccess = HubAccess(),
) -> None:
    """Merge models of one architecture, tensor by tensor, at the speed of the disk and in little memory.

    A merge that was interrupted goes on where it stopped when the same command is given again.

    Example: cabochon merge slerp.yml my-merge

    Example: cabochon merge slerp.yml --dry-run

    Example: cabochon merge ties.yml --inspect --plot angles.svg
    """
    if plot and not inspect:
        raise UsageError("--plot has no effect here", "it draws what --inspect finds", "add --inspect")
    if out is None and not dry_run and not inspect:
        raise UsageError("OUT is missing", "a merge has to be written somewhere", "cabochon merge CONFIG OUT")
    _check_least({"--threads": (threads, 0), "--shard-size": (shard_size, 0.001)})
    target = folder_argument(out, "OUT") if out else None
    from cabochon.merge.parse import read_config

    chosen = read_config(config.expanduser())
    from cabochon.merge.run import Merge

    work = Merge.prepare(chosen, seed=seed, **asdict(hub))
    for note in work.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if inspect:
        _inspect(work, threads, plot, json)
        return
    facts = _facts(work.plan)
    if target is None or dry_run:
        print(json_format.dumps(facts | {"tensors": _tensors(work.plan)}) if json else _table(work.plan, facts))
        return
    check_disk(target, work.missing_bytes(target), "free some space, or name a folder on another disk")
    print(f"{facts['method']} of {facts['models']} models: {work.plan.nbytes / GIB:.2f} GiB", file=sys.stderr)
    from cabochon.base.progress import track

    settings: dict[str, Any] = {"threads": threads, "shard_bytes": int(shard_size * 1e9), "hashes": hashes}
    with track(work.plan.nbytes, "merging", unit="bytes") as advance:
        work.write(target, overwrite=overwrite, report=advance, **settings)
    print(json_format.dumps({"folder": str(target), **facts}) if json else target)


def _check_least(values: dict[str, tuple[float, float]]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise UsageError(f"{name} cannot be {value}", f"it has to be at least {least}", "leave it out")


def _inspect(work: "Merge", threads: int, plot: Path | None, json: bool) -> None:
    from cabochon.base.files import atomic_write
    from cabochon.base.progress import track
    from cabochon.merge.show import heat, table

    total = sum(model.nbytes(name) for model in work.models.values() for name in model.checked.tensors)
    with track(total, "reading", unit="bytes") as advance:
        found = work.inspect(threads=threads, report=advance)
    if plot:
        try:
            with atomic_write(plot.expanduser()) as file:
                file.write(heat(found, "angle" if found.pairs else "norm").encode())
        except OSError as error:
            raise MissingResource(
                f"{plot} was not written", error.strerror or str(error), "choose another place"
            ) from None
    if json:
        print(json_format.dumps(found.to_json()))
        return
    from rich.console import Console

    for by in ("layer", "kind"):
        Console().print(table(found, by))


def _facts(plan: "Plan") -> dict[str, Any]:
    models = {operand.model for job in plan.jobs for operand in job.inputs}
    return {
        "method": plan.method.name,
        "models": len(models),
        "parameters": plan.shape.num_parameters,
        "layers": plan.shape.num_layers,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "bytes": plan.nbytes,
        "notes": list(plan.notes),
    }


def _tensors(plan: "Plan") -> list[dict[str, Any]]:
    from cabochon.weights.names import to_hf

    return [
        {
            "name": to_hf(job.name),
            "shape": list(job.shape),
            "from": [f"{operand.model}: {to_hf(operand.name)}" for operand in job.operands],
            "base": f"{job.base.model}: {to_hf(job.base.name)}" if job.base else None,
            "parameters": dict(job.settings.shared) | {n: list(v) for n, v in job.settings.per_model.items()},
        }
        for job in plan.jobs
    ]


def _table(plan: "Plan", facts: dict[str, Any]) -> str:
    """The plan in lines: what is true of the whole, then each run of tensors of one kind with the same parameters."""
    lines = [
        f"{facts['method']} of {facts['models']} models, {facts['layers']} layers, {facts['dtype']}",
        f"{facts['parameters']:,} parameters, {plan.nbytes / GIB:.2f} GiB",
    ]
    last = None
    for tensor in _tensors(plan):
        shown = ", ".join(f"{name} {_value(value)}" for name, value in tensor["parameters"].items())
        if shown != last:
            lines.append(f"  with {shown or 'no parameters'}:")
        sources = " + ".join(tensor["from"]) + (f", base {tensor['base']}" if tensor["base"] else "")
        lines.append(f"{tensor['name']} {tensor['shape']} = {sources}")
        last = shown
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
