"""`cabochon train pretrain`, `sft` and `distill`: from data to a model folder."""

import json as json_format
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubOptions, Json, Model, folder_argument
from cabochon.cli.train_options import AdapterOptions, DataOptions, OnPolicyOptions, RunOptions, TeacherOptions
from cabochon.train.config import TrainConfig, TuneConfig
from cabochon.train.distill_config import DistillConfig
from cabochon.train.rollout_config import RolloutConfig

if TYPE_CHECKING:
    from cabochon.data.config import DataConfig
    from cabochon.train.on_policy import OnPolicy
    from cabochon.train.run import Run
    from cabochon.train.teaching import StoredBy, TaughtBy

Pretrain = Annotated[TrainConfig, Parameter(name="*", group="Training")]
Tune = Annotated[TuneConfig, Parameter(name="*", group="Training")]
Distill = Annotated[DistillConfig, Parameter(name="*", group="The teacher")]
Rollouts = Annotated[RolloutConfig, Parameter(name="*", group="On-policy")]


def pretrain(
    model: Model = None,
    *,
    run: RunOptions,
    data: DataOptions = DataOptions(),
    train: Pretrain,
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn to continue text. Start from `cabochon init`, or from any model to train it further.

    A run that was stopped goes on when the same command is given again.

    Example: cabochon train pretrain start --data texts.jsonl --steps 2000 --out runs/first
    """
    asked = asdict(run) | asdict(data) | asdict(train)
    return run_training(model, run, train, json, hub, asked, data=data.config(train))


def sft(
    model: Model = None,
    *,
    run: RunOptions,
    data: DataOptions = DataOptions(),
    train: Tune = TuneConfig(),
    adapters: AdapterOptions = AdapterOptions(),
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn to answer: supervised tuning on conversations, where only the model's turns count.

    A run that was stopped goes on when the same command is given again.

    Example: cabochon train sft google/gemma-2-2b --data chats.jsonl --lora-rank 16 --out runs/mine

    Example: cabochon train sft --config runs/mine/settings.toml --out runs/again
    """
    asked = asdict(run) | asdict(data) | asdict(train) | asdict(adapters)
    return run_training(model, run, train, json, hub, asked, data=data.config(train), adapters=adapters)


def distill(
    model: Model = None,
    *,
    run: RunOptions,
    teacher: TeacherOptions = TeacherOptions(),
    how: Distill = DistillConfig(),
    on_policy: OnPolicyOptions = OnPolicyOptions(),
    rollouts: Rollouts = RolloutConfig(),
    data: DataOptions = DataOptions(),
    train: Tune = TuneConfig(),
    adapters: AdapterOptions = AdapterOptions(),
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn what a teacher thinks of every next token, as Gemma 2's small models did.

    With --prompts the student writes answers itself, and the teacher grades every token of them. Student and teacher
    need the same tokenizer. A run that was stopped goes on when the same command is given again.

    Example: cabochon train distill student --teacher google/gemma-2-9b --data texts.jsonl --steps 500 --out runs/taught

    Example: cabochon train distill student --teacher-logits stored --epochs 2 --out runs/taught

    Example: cabochon train distill student --teacher google/gemma-2-9b-it --prompts prompts.jsonl --out runs/own
    """
    parts = run, teacher, how, on_policy, rollouts, data, train, adapters
    asked = {name: value for part in parts for name, value in asdict(part).items()}
    written = _written(on_policy, rollouts, data, train)
    rows = _rows_of_teacher(teacher, data, on_policy, written.share if written else 0.0).config(train)
    teachers, stored = _teachers(teacher, hub)
    return run_training(
        model, run, train, json, hub, asked, data=rows, adapters=adapters, teachers=teachers, stored=stored,
        distill=how, on_policy=written,
    )  # fmt: skip


def _written(
    on_policy: OnPolicyOptions, rollouts: RolloutConfig, data: DataOptions, train: TrainConfig
) -> "OnPolicy | None":
    """What the student writes itself."""
    if not on_policy.prompts:
        if on_policy != OnPolicyOptions() or rollouts != RolloutConfig():
            raise UsageError("the student writes nothing", "there is nothing to answer", "add --prompts prompts.jsonl")
        return None
    from cabochon.train.on_policy import OnPolicy

    prompts = replace(data, data=on_policy.prompts, data_weights=(), held_out=0.0, eval_data=()).config(train)
    share = 1.0 if on_policy.on_policy is None else on_policy.on_policy
    return OnPolicy(prompts=prompts, rollouts=rollouts, share=share)


def _rows_of_teacher(
    teacher: TeacherOptions, data: DataOptions, on_policy: OnPolicyOptions, written: float
) -> DataOptions:
    """The flags about data, as far as they go with the kind of teacher, and with the share that the student writes."""
    if not (teacher.teacher or teacher.teacher_logits) or (teacher.teacher and teacher.teacher_logits and not written):
        raise UsageError(
            "a student needs one teacher",
            "two are given" if teacher.teacher else "neither --teacher nor --teacher-logits is given",
            "cabochon train distill STUDENT --teacher MODEL --data texts.jsonl --out RUN",
        )
    if written and not teacher.teacher:
        raise UsageError(
            "a stored teacher cannot grade what the student writes",
            "it has an opinion of its own text alone",
            "add --teacher MODEL, or leave out --prompts",
        )
    if written == 1 and (data.data or teacher.teacher_logits) and not data.held_out:
        raise UsageError(
            f"--{'data' if data.data else 'teacher-logits'} has no effect here",
            "the student writes all batches",
            "leave it out, or give the share that the student writes: --on-policy 0.5",
        )
    if written == 1:
        return data if data.data else replace(data, data=on_policy.prompts)
    if written and not (data.data or teacher.teacher_logits):
        raise UsageError(
            "there is no text for the other batches",
            f"the student writes a share of {written}",
            "add --data chats.jsonl, or leave out --on-policy: the student then writes all",
        )
    if teacher.teacher_logits is None or (data.data and data.held_out):  # to evaluate on what was not stored
        return data
    if data.data or data.held_out:
        raise UsageError(
            f"--{'data' if data.data else 'held-out'} alone has no effect here",
            "a stored teacher brings its own text",
            "leave it out; --data and --held-out together, or --eval-data, are for evaluation",
        )
    return replace(data, data=(str(teacher.teacher_logits),))


def _teachers(options: TeacherOptions, hub: HubOptions) -> "tuple[tuple[TaughtBy, ...], StoredBy | None]":
    """The live ones, and the stored one."""
    from cabochon.train.teaching import StoredBy, TaughtBy
    from cabochon.weights.hub import resolve

    names, shares = options.teacher, options.teacher_share or (1.0,) * len(options.teacher)
    if len(shares) != len(names) or not all(share > 0 for share in shares):
        raise UsageError(
            "these teachers cannot be mixed",
            f"there are {len(names)} of them, and the shares are {', '.join(map(str, shares))}",
            "give each a --teacher-share above 0, or none",
        )
    access = {name: value for name, value in asdict(hub).items() if name != "revision"}
    live = (
        TaughtBy(resolve(name, **access), name, options.teacher_weights, share)
        for name, share in zip(names, shares, strict=True)
    )
    return tuple(live), StoredBy(options.teacher_logits.expanduser()) if options.teacher_logits else None


def run_training(
    model: str | None,
    run: RunOptions,
    train: TrainConfig,
    json: bool,
    hub: HubOptions,
    asked: dict[str, Any],
    *,
    data: "DataConfig",
    adapters: AdapterOptions = AdapterOptions(),
    **more: Any,
) -> int:
    """Run what `Settings` describe, `more` of them by name, and give the exit code. For all training commands."""
    folder, adapter = folder_argument(run.out, "--out"), adapters.config(train.seed)
    from cabochon.train.build import Settings, build
    from cabochon.train.parallel import leave, setup
    from cabochon.weights.hub import BUILT_IN_ID, resolve

    ranks = setup(run.device, train.tensor_parallel)
    asked = {"model": model} | asked
    settings = Settings(
        model=resolve(model, **asdict(hub)),
        name=model or BUILT_IN_ID,
        out=folder,
        train=train,
        data=data,
        adapter=adapter,
        frozen=adapters.frozen,
        merged=adapters.merge_adapters,
        dtype=run.save_dtype,
        device=ranks.device,
        track=run.track,
        asked={k: v for k, v in asked.items() if v not in (None, ()) and k not in ("out", "config", "resume")},
        **more,
    )
    with ranks.watched():
        built = build(settings, note=_note, ranks=ranks)
    code = _go(built, run.resume, json)
    leave(ranks)
    return code


def _go(run: "Run", resume: str, json: bool) -> int:
    from cabochon.cli.train_show import shown

    if not run.ranks.first:
        signal = run.go(resume=resume == "auto")
        return 128 + signal if signal else 0
    with shown(run, json=json) as run.show:
        signal = run.go(resume=resume == "auto")
    if signal:
        print(f"stopped and saved at step {run.trainer.step_number}; the same command goes on", file=sys.stderr)
        return 128 + signal
    print(json_format.dumps({"folder": str(run.out), "steps": run.trainer.step_number}) if json else run.out)
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
