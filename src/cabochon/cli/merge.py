"""`cabochon merge`: several models to one, as a mergekit file says."""

import json as json_format
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.merge_adapters import merge_adapters
from cabochon.cli.merge_sweep import sweep, write_plot
from cabochon.cli.options import HubAccess, Json, check_disk, folder_argument

if TYPE_CHECKING:
    from cabochon.merge.plan import Plan
    from cabochon.merge.run import Merge

GIB = 2**30
SHARD_SIZE = 5.0


@Parameter(name="*", group="Instead of writing a model")
@dataclass(frozen=True, kw_only=True)
class Looking:
    """What can be done with a merge before it is written."""

    dry_run: Annotated[bool, Parameter(negative="", help="Check everything and print the plan.")] = False
    inspect: Annotated[
        bool, Parameter(negative="", help="Compare the models with base_model, layer by layer and kind by kind.")
    ] = False
    sweep: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            help="Measure the merge for each value of a parameter, as in t=0:1:5 (five from 0 to 1), eta=0.1,0.3 or "
            "weight@MODEL=0:1:3. Twice: every value of the one with every value of the other.",
        ),
    ] = ()
    on: Annotated[
        Path | None,
        Parameter(
            help="With --sweep: the file to measure on. A text; or .jsonl with rows of text, of prompt and completion, "
            "or of messages."
        ),
    ] = None
    plot: Annotated[
        Path | None,
        Parameter(
            help="Also draw, as SVG, here: with --inspect a map of angles; with --sweep the curve, whose points are "
            "kept beside it and not measured again."
        ),
    ] = None

    def check(self, out: Path | None) -> None:
        """Raise `UsageError` for flags that do not go together."""
        if bool(self.sweep) != bool(self.on):
            given, missing = ("--sweep", "--on") if self.sweep else ("--on", "--sweep")
            raise UsageError(f"{given} needs {missing}", "a sweep measures each merge on a file", f"add {missing}")
        if self.sweep and (out or self.inspect or self.dry_run):
            other = "--inspect" if self.inspect else "--dry-run" if self.dry_run else f"OUT, {out},"
            raise UsageError(f"{other} has no effect here", "a sweep writes no model", "leave it out, or --sweep")
        if self.plot and not self.inspect and not self.sweep:
            raise UsageError("--plot has no effect here", "it draws what --inspect or --sweep finds", "add one of them")
        if out is None and not (self.dry_run or self.inspect or self.sweep):
            raise UsageError("OUT is missing", "a merge has to be written somewhere", "cabochon merge CONFIG OUT")


def merge(
    config: Annotated[Path, Parameter(help="A YAML file as mergekit reads it; docs/merging.md has the methods.")],
    out: Annotated[Path | None, Parameter(help="The folder to write.")] = None,
    /,
    *,
    seed: Annotated[int, Parameter(help="For methods that drop weights at random: the same seed, the same model.")] = 0,
    threads: Annotated[int, Parameter(help="How many; 0: one for each core. The result does not depend on it.")] = 0,
    shard_size: Annotated[float, Parameter(help="The most GB of weights in one file.")] = SHARD_SIZE,
    hashes: Annotated[
        bool, Parameter(negative="", help="Put the SHA-256 of large weight files into the model card, too.")
    ] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace a model folder that is there.")] = False,
    json: Json = False,
    looking: Looking = Looking(),
    hub: HubAccess = HubAccess(),
) -> None:
    """Merge models of one architecture, tensor by tensor, at the speed of the disk and in little memory.

    A merge that was interrupted goes on where it stopped when the same command is given again. A file with `adapters`
    instead of models merges LoRA adapters to one.

    Example: cabochon merge slerp.yml my-merge

    Example: cabochon merge slerp.yml --dry-run

    Example: cabochon merge ties.yml --inspect --plot angles.svg

    Example: cabochon merge slerp.yml --sweep t=0:1:5 --on my-texts.txt --plot curve.svg
    """
    looking.check(out)
    _check_least({"--threads": (threads, 0), "--shard-size": (shard_size, 0.001)})
    target = folder_argument(out, "OUT") if out else None
    from cabochon.merge.adapter_parse import AdapterConfig, read_either

    chosen = read_either(config.expanduser())
    if isinstance(chosen, AdapterConfig):
        foreign = {"--inspect": looking.inspect, "--sweep": bool(looking.sweep), "--threads": threads != 0}
        foreign |= {"--shard-size": shard_size != SHARD_SIZE, "--hashes": hashes}
        same: dict[str, Any] = {"seed": seed, "overwrite": overwrite, "json": json, "hub": hub}
        merge_adapters(chosen, target, dry_run=looking.dry_run, foreign=foreign, **same)
        return
    if looking.sweep and looking.on:
        plot = looking.plot
        sweep(chosen, looking.sweep, looking.on, plot=plot, seed=seed, threads=threads, json=json, hub=hub)
        return
    from cabochon.merge.run import Merge

    work = Merge.prepare(chosen, seed=seed, **asdict(hub))
    for note in work.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if looking.inspect:
        _inspect(work, threads, looking.plot, json)
        return
    facts = _facts(work.plan)
    if target is None or looking.dry_run:
        print(json_format.dumps(facts | {"tensors": _tensors(work.plan)}) if json else _table(work.plan, facts))
        return
    settings: dict[str, Any] = {"threads": threads, "shard_bytes": int(shard_size * 1e9), "hashes": hashes}
    _write(work, target, settings | {"overwrite": overwrite})
    print(json_format.dumps({"folder": str(target), **facts}) if json else target)


def _write(work: "Merge", target: Path, settings: dict[str, Any]) -> None:
    from cabochon.base.progress import track

    check_disk(target, work.missing_bytes(target), "free some space, or name a folder on another disk")
    models = len({operand.model for job in work.plan.jobs for operand in job.inputs})
    print(f"{work.plan.method.name} of {models} models: {work.plan.nbytes / GIB:.2f} GiB", file=sys.stderr)
    with track(work.plan.nbytes, "merging", unit="bytes") as advance:
        work.write(target, report=advance, **settings)


def _check_least(values: dict[str, tuple[float, float]]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise UsageError(f"{name} cannot be {value}", f"it has to be at least {least}", "leave it out")


def _inspect(work: "Merge", threads: int, plot: Path | None, json: bool) -> None:
    from cabochon.base.progress import track
    from cabochon.merge.show import heat, table

    total = sum(model.nbytes(name) for model in work.models.values() for name in model.checked.tensors)
    with track(total, "reading", unit="bytes") as advance:
        found = work.inspect(threads=threads, report=advance)
    if plot:
        write_plot(plot, heat(found, "angle" if found.pairs else "norm"))
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
